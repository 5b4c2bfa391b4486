"""8-bit floating point (e4m3) with scales: what the numbers mean, and how they lie in memory.

A scale belongs to a block of `SCALED` tokens of a head; or, if there is one block, to all tokens.
Values are held turned, [B, columns, heads, tokens], of whole blocks: a product of 8-bit matrices
reads both operands along the axis that it sums over.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCALED = 128  # tokens of a block
DTYPE = np.dtype(jnp.float8_e4m3fn)
LARGEST = float(jnp.finfo(DTYPE).max)
FP8 = "fp8"  # the precision that asks for it

LEAST = 2.0**-50  # of scales: those of zeros are no zeros, nor are products of two


def scales_of(x: jax.Array, per: str = "block") -> jax.Array:
    """What makes the largest entries of [B, T, N, H] the largest number: [B, blocks, N] float32.

    ``per`` is what has a scale: a "block", a "head" of a batch element, or the "tensor".
    """
    size = jnp.abs(x.astype(jnp.float32))
    if per == "block":
        size = _blocks(size)  # [B, blocks, tokens, N, H]
        size = jnp.max(size, axis=(2, 4), initial=0)
    else:
        of_heads = jnp.max(size, axis=(1, 3) if per == "head" else None, initial=0)
        size = jnp.broadcast_to(of_heads, (x.shape[0], x.shape[2]))[:, None]
    return jnp.maximum(size / LARGEST, LEAST)


def quantize(x: jax.Array, scales: jax.Array, *, turned: bool = False) -> jax.Array:
    """The 8-bit numbers whose products with scales are nearest to [B, T, N, H].

    Rounded to nearest, ties to even. Turned: [B, H, N, tokens of whole blocks], each sixteen
    `in_operand_order`.
    """
    wide = x.astype(jnp.float32) * _spread(1 / scales, x.shape[1])
    narrow = jnp.clip(wide, -LARGEST, LARGEST).astype(DTYPE)
    if not turned:
        return narrow
    narrow = jnp.pad(narrow, ((0, 0), (0, -x.shape[1] % SCALED), (0, 0), (0, 0)))
    return in_operand_order(narrow.transpose(0, 3, 2, 1))


def dequantize(
    values: jax.Array, scales: jax.Array, tokens: int, *, turned: bool = False
) -> jax.Array:
    """What `quantize` returned, as [B, T, N, H] float32."""
    if turned:
        values = from_operand_order(values).transpose(0, 3, 2, 1)[:, :tokens]
    return values.astype(jnp.float32) * _spread(scales, tokens)


def in_operand_order(x: Any) -> Any:
    """Entries along the last axis as 8-bit left operands in registers have their columns.

    Of each sixteen, numbered ``8 a + 2 q + b`` with a and b below 2 and q below 4, that one comes
    to place ``4 q + 2 a + b``: where a thread finds what it holds of a product's result.
    """
    return x.reshape(*x.shape[:-1], x.shape[-1] // 16, 2, 4, 2).swapaxes(-3, -2).reshape(x.shape)


def from_operand_order(x: jax.Array) -> jax.Array:
    """Undoes `in_operand_order`."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // 16, 4, 2, 2).swapaxes(-3, -2).reshape(x.shape)


def hadamard(columns: int) -> np.ndarray:
    """An orthogonal matrix [columns, columns] that spreads what is large over many columns.

    For each group of columns a Hadamard matrix, whose rows have random signs, over the root of its
    size: the largest power of two that divides the columns, 128 at the most.
    """
    size = min(columns & -columns, 128)
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], columns)
    return signs[:, None] * np.kron(np.eye(columns // size), matrix) / np.sqrt(size)


def _blocks(x: jax.Array) -> jax.Array:
    """[B, T, ...] as [B, blocks, SCALED, ...]; one of fewer tokens if there are fewer."""
    size = min(SCALED, max(x.shape[1], 1))
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], x.shape[1] // size, size, *x.shape[2:])


def _spread(scales: jax.Array, tokens: int) -> jax.Array:
    """For each token: [B, T|1, N, 1]."""
    if scales.shape[1] > 1:
        scales = jnp.repeat(scales, SCALED, axis=1)[:, :tokens]
    return scales[..., None]
