"""Caches of 8 bits: what their numbers mean. The tokens of a page share a scale for each head.

Scales that this library finds are powers of two. Then a page whose scale has grown is rounded again
without a loss in floating point, but for what is smallest, and products with scales are exact in 16
bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATING = np.dtype(jnp.float8_e4m3fn)
DTYPES = (FLOATING, np.dtype(jnp.int8))
LEAST = 2.0**-64  # of scales: those of zeros are no zeros


def largest(dtype: Any) -> float:
    """The largest number of a dtype whose negative it has, too."""
    return float((jnp.finfo if dtype == FLOATING else jnp.iinfo)(dtype).max)


def scales_for(size: jax.Array, dtype: Any) -> jax.Array:
    """The least powers of two by which numbers up to a size are divided to fit into a dtype."""
    ratio = jnp.maximum(size / largest(dtype), LEAST)
    fraction, exponent = jnp.frexp(ratio)  # fractions from a half to one
    return jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5))


def narrow(x: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """Pages [..., page_size, K, H] in 8 bits: their products with scales [..., K] come nearest.

    NaN is 0 where the dtype has none.
    """
    x = jnp.clip(x / _of_tokens(scales), -largest(dtype), largest(dtype))
    return (x if dtype == FLOATING else jnp.nan_to_num(jnp.round(x))).astype(dtype)


def of_pages(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`narrow` of pages, with the least scales for them."""
    x = x.astype(jnp.float32)
    scales = scales_for(jnp.max(jnp.abs(x), axis=(-3, -1)), dtype)
    return narrow(x, scales, dtype), scales


def bits(x: jax.Array) -> jax.Array:
    """The numbers of a dtype, or their bits where kernels do not know it, as int8."""
    return jax.lax.bitcast_convert_type(x, jnp.int8) if x.dtype == FLOATING else x


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """What `bits` returned, in float32."""
    if dtype != FLOATING:
        return x.astype(jnp.float32)
    # With three bits of the fraction and four of the exponent where float16 has its own, only the
    # exponent's bias is another: 7, not 15.
    x = x.astype(jnp.int32)
    moved = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).astype(jnp.int16)
    wide = jax.lax.bitcast_convert_type(moved, jnp.float16).astype(jnp.float32) * 2.0**8
    return jnp.where((x & 0x7F) == 0x7F, jnp.nan, wide)


def widen(x: jax.Array, scales: jax.Array) -> jax.Array:
    """What `narrow` returned, in float32."""
    return x.astype(jnp.float32) * _of_tokens(scales)


def _of_tokens(scales: jax.Array) -> jax.Array:
    return scales[..., None, :, None]
