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
_LEAST = 2.0**-100  # of scales: those of zeros are no zeros


def largest(dtype: Any) -> float:
    """The largest number of a dtype whose negative it has, too."""
    return float((jnp.finfo if dtype == FLOATING else jnp.iinfo)(dtype).max)


def scales_for(size: jax.Array, dtype: Any) -> jax.Array:
    """The least powers of two by which numbers up to a size are divided to fit into a dtype."""
    fraction, exponent = jnp.frexp(size / largest(dtype))  # fractions from a half to one
    scale = jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5))
    return jnp.maximum(scale, _LEAST)


def narrow(x: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """The numbers of a dtype whose products with scales are nearest to x; 0 where it has no NaN."""
    x = jnp.clip(x / scales, -largest(dtype), largest(dtype))
    return (x if dtype == FLOATING else jnp.nan_to_num(jnp.round(x))).astype(dtype)


def bits(x: jax.Array) -> jax.Array:
    """The numbers of a dtype, or their bits where kernels do not know it, as int8."""
    return jax.lax.bitcast_convert_type(x, jnp.int8) if x.dtype == FLOATING else x


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """What `bits` returned, in float32."""
    if dtype != FLOATING:
        return x.astype(jnp.float32)
    # With three bits of the fraction and four of the exponent where float32 has its own, only the
    # exponent's bias is another: 7, not 127.
    x = x.astype(jnp.int32)
    moved = ((x & 0x80) << 24) | ((x & 0x7F) << 20)
    return jax.lax.bitcast_convert_type(moved, jnp.float32) * 2.0**120


def widen(x: jax.Array, scales: jax.Array) -> jax.Array:
    """What `narrow` returned, in float32."""
    return x.astype(jnp.float32) * scales
