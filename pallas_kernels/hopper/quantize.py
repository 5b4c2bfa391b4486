"""Rounding to 8 bits in one pass: each block reads 128 tokens of a head, and writes them.

Two things that would cost passes of their own are products on the way, whose operands are exact:
queries and keys may be rotated, and values are turned and ordered as the forward needs them, by a
product of their transpose with a permutation. See `pallas_kernels.spec.quantization`.

Shared memory of a block:

    x_smem       [128, H]           as it is
    matrix_smem  [H, H] or [64, 64]  what it is multiplied with, if it is
    out_smem     [128, H], or [H, 128]  8 bits, on its way out
    rows_smem    [64] float32       an entry for each row
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.spec import quantization as rules

TOKENS = rules.SCALED
_WIDTH = 64  # of strips of the result


class _Form(NamedTuple):
    """How a block holds what it reads and what it writes."""

    x: mosaic.Form
    matrix: mosaic.Form | None
    out: mosaic.Form  # of 64 rows
    parts: int  # of so many rows that the result has

    @classmethod
    def of(cls, columns: int, turned: bool, rotate: bool) -> "_Form":
        size = _WIDTH if turned else columns
        result = TOKENS if turned else columns
        return cls(
            mosaic.Form.of(TOKENS, columns),
            mosaic.Form.of(size, size) if turned or rotate else None,
            mosaic.Form.of(ROWS, result, dividing=_WIDTH, itemsize=1),
            (columns if turned else TOKENS) // ROWS,
        )

    def scratch(self, dtype: Any) -> list[Any]:
        matrices = [self.matrix.smem(dtype=dtype)] if self.matrix else []
        copies = self.x.copies + (self.matrix.copies if self.matrix else 0)
        return [
            self.x.smem(dtype=dtype),
            *matrices,
            self.out.smem(self.parts, dtype=rules.DTYPE),
            mosaic.SMEM((ROWS,), jnp.float32),
            mosaic.Barrier(num_arrivals=copies),
        ]


def rounds_queries(problem: spec.Problem) -> bool:
    """Whether the forward may be given queries as they are, which it then rounds as it reads them.

    Each 64 have a scale.
    """
    return _is_in_strips(problem.operands.query)


def supports_quantize(x: Any, device: spec.Device, *, rotate: bool) -> bool:
    """Whether the kernel takes an array [B, T, N, H] on a device."""
    is_here = gpu.is_hopper(device) or mosaic.is_interpreting()
    most = 128 if rotate else 256  # the matrix is in shared memory, too
    return is_here and _is_in_strips(x) and x.shape[3] <= most


def _is_in_strips(x: Any) -> bool:
    """Whether rows of [B, T, N, H] are whole strips of 16 bits, and there are some."""
    is_half = x.dtype in (jnp.bfloat16, jnp.float16)
    return is_half and x.size > 0 and x.shape[3] % ROWS == 0


@functools.partial(jax.jit, static_argnames=("turned", "rotate"))
def quantize(
    x: jax.Array, *, turned: bool = False, rotate: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Rounds [B, T, N, H] that `supports_quantize` accepts; each block of tokens has a scale.

    Returns:
      What `rules.quantize` returns of the array, or of its product with `rules.hadamard`, and its
      scales.
    """
    B, T, N, H = x.shape
    form, blocks = _Form.of(H, turned, rotate), pl.cdiv(T, TOKENS)
    operands = [form.x.array(x)]
    if form.matrix:
        operands.append(form.matrix.array(jnp.asarray(_matrix(H, turned), x.dtype)))
    shape = (B, H, N, blocks * TOKENS) if turned else x.shape

    def quantize_kernel(x: mosaic.Ref, *rest: Any) -> None:
        matrix, (values, scales, *scratch) = rest[: len(operands) - 1], rest[len(operands) - 1 :]
        x_smem, *matrix_smem, out_smem, rows_smem, barrier = scratch
        x_smem, out_smem, *matrix_smem = map(mosaic.Matrix.of, (x_smem, out_smem, *matrix_smem))
        number = lax.axis_index("block")
        of_batch, head = lax.div(number, N), lax.rem(number, N)
        batch, block = lax.div(of_batch, blocks), lax.rem(of_batch, blocks)
        tokens = pl.ds(block * TOKENS, TOKENS)
        mosaic.copy_in(x.at[batch, tokens, head], x_smem, barrier)
        for gmem, smem in zip(matrix, matrix_smem, strict=True):
            mosaic.copy_in(gmem, smem, barrier)
        mosaic.barrier_wait(barrier)

        part = functools.partial(_part, form, x_smem, matrix_smem, turned)

        def measure(i: Any, largest: jax.Array) -> jax.Array:
            for strip in part(i):
                largest = jnp.maximum(largest, jnp.max(jnp.abs(strip), axis=1))
            return largest

        largest = lax.fori_loop(0, form.parts, measure, mosaic.full((ROWS,), 0, jnp.float32))
        unit = _root(H) if rotate else 1.0
        scale = jnp.maximum(_of_all(largest, rows_smem) * (unit / rules.LARGEST), rules.LEAST)
        factor = unit / scale

        def narrow(i: Any, carry: None) -> None:
            del carry
            for (view, _, _), strip in zip(out_smem.at(i).strips(), part(i), strict=True):
                wide = strip * mosaic.spread_rows(factor, strip.shape)
                wide = jnp.clip(wide, -rules.LARGEST, rules.LARGEST)
                mosaic.store(view.tiled, wide.astype(rules.DTYPE), optimized=False)

        lax.fori_loop(0, form.parts, narrow, None)
        mosaic.store(rows_smem, scale, optimized=False)
        mosaic.commit_smem()
        scales[batch, block, head] = rows_smem[0]
        for i in range(form.parts):
            rows = pl.ds(i * ROWS, ROWS) if turned else pl.ds(block * TOKENS + i * ROWS, ROWS)
            out = values.at[batch, rows, head, tokens] if turned else values.at[batch, rows, head]
            for view, column, _ in out_smem.at(i).strips():
                mosaic.copy_out(view, out, column)
        mosaic.wait_smem_to_gmem(0, wait_read_only=True)

    call = mosaic.kernel(
        quantize_kernel,
        out_type=[
            jax.ShapeDtypeStruct(shape, rules.DTYPE),
            jax.ShapeDtypeStruct((B, blocks, N), jnp.float32),
        ],
        scratch_types=form.scratch(x.dtype),
        # Along one axis, for the others may have no more than 65,535.
        grid={"block": N * blocks * B},
    )
    values, scales = call(*operands)
    return values, scales


def _of_all(rows: jax.Array, smem: mosaic.Ref) -> jax.Array:
    """The largest of an entry for each row, in each row."""
    mosaic.store(smem, rows, optimized=False)
    mosaic.commit_smem()
    columns = mosaic.spread_columns(mosaic.load_columns(smem), (ROWS, ROWS))
    largest = jnp.max(columns, axis=1)
    mosaic.commit_smem()  # it may be written again
    return largest


def _part(
    form: _Form, x: mosaic.Matrix, matrix: list[mosaic.Matrix], turned: bool, i: Any
) -> Iterator[jax.Array]:
    """The strips of a part of the result before it is rounded, float32.

    They are computed twice rather than held: there are more of them than registers.
    """
    rows = pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS)
    if not matrix:
        for strip, _, _ in x.strips():
            yield mosaic.load_matrix(strip.tiled.at[rows]).astype(jnp.float32)
        return
    (by,) = matrix
    if turned:
        (from_view,), (by_view,) = x.views, by.views
        for start in range(0, TOKENS, _WIDTH):
            strip = from_view.tiled.at[i, pl.ds(start, _WIDTH)]
            yield mosaic.matmul(strip, by_view.tiled, transpose_a=True, transpose_b=True)
        return
    product = mosaic.matmul(x.rows(rows), by, transpose_b=True)
    start = 0
    for piece in form.out.pieces:
        for _ in range(piece.strips):
            yield product[:, start : start + piece.width]
            start += piece.width


def _matrix(columns: int, turned: bool) -> np.ndarray:
    """What the array, or its transpose, is multiplied with: its transpose, of whole numbers."""
    if turned:
        return np.eye(_WIDTH)[rules.in_operand_order(np.arange(_WIDTH))]
    return rules.hadamard(columns).T / _root(columns)


def _root(columns: int) -> float:
    """What makes whole numbers of the orthogonal matrix."""
    return float(np.abs(rules.hadamard(columns)).max())
