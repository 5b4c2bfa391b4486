"""Matrix products of tiles: wgmma when compiled, ``jnp.dot`` when interpreted.

A product that has been started runs while the kernel goes on. What `start` returns is not there
yet: nothing may be done with it but start another product that adds to it, or `settle` it.

Elements of operands have 16 bits, or 8: then the right operand is [N, K], and a left one in
registers is what `as_left_operand` makes of a result's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as _mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import nvvm
from pallas_kernels.mosaic.matrix import Matrix
from pallas_kernels.mosaic.memory import Ref, ref_type, tiling_of
from pallas_kernels.spec.quantization import in_operand_order

# Their annotations and signatures differ between JAX versions: no type checker can agree with all.
mgpu: Any = _mgpu
plgpu: Any = mosaic_gpu

_STRIPS = 3  # the rank of a matrix in strips, [strips, rows, width]


def matmul(
    a: Ref | Matrix | jax.Array,
    b: Ref | Matrix,
    acc: jax.Array | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> jax.Array:
    """``acc + a @ b``; operands as in `start`."""
    return settle(start(a, b, acc, transpose_a=transpose_a, transpose_b=transpose_b))


def start(
    a: Ref | Matrix | jax.Array,  # [M, K], or [K, M] with transpose_a
    b: Ref | Matrix,  # [K, N], or [N, K] with transpose_b
    acc: jax.Array | None = None,  # [M, N] float32; default: zero
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> jax.Array:
    """Starts ``acc + a @ b``, which will be [M, N] float32.

    Left operands are in shared memory or in registers, right operands in shared memory. A `Matrix`
    is multiplied with one alike, its columns being those that are summed over; if it is in one
    piece, it may be multiplied with registers.
    """
    if not isinstance(b, Matrix):
        return _start(a, b, acc, transpose_a, transpose_b)
    assert transpose_b
    assert not transpose_a
    if not isinstance(a, Matrix):
        (view,) = b.views
        return _start(a, view.tiled, acc, transpose_a, transpose_b)
    for left, right in zip(a.views, b.views, strict=True):
        acc = _start(left.tiled, right.tiled, acc, transpose_a, transpose_b)
    assert acc is not None
    return acc


def start_columns(
    a: jax.Array,  # [M, K]
    b: Matrix,  # [K, N]; with transpose [N, K], in one piece
    accs: Sequence[jax.Array],  # for each piece of b: [M, columns] float32
    *,
    transpose: bool = False,
) -> tuple[jax.Array, ...]:
    """Starts ``acc + a @ piece`` for each piece of b: a product each."""
    pairs = zip(b.views, accs, strict=True)
    return tuple(_start(a, view.tiled, acc, False, transpose) for view, acc in pairs)


def start_turned(a: Matrix, b: Ref, accs: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Starts ``acc + piece^T @ b^T`` for each piece of a matrix: a product each."""
    pairs = zip(a.views, accs, strict=True)
    return tuple(_start(view.tiled, b, acc, True, True) for view, acc in pairs)


def settle(value: jax.Array, *, in_flight: int = 0) -> jax.Array:
    """What `start` returned, once at most so many of the products started last still run."""
    if interpreter.is_interpreting():
        return value

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=_like(value.shape))
    def wait(_: Any, value: Any) -> Any:
        nvvm.wgmma_wait_group_sync_aligned(in_flight)
        return fa.optimization_barrier(value)  # nothing that reads it may move up

    return wait(value)


def _start(
    a: Ref | jax.Array, b: Ref, acc: jax.Array | None, transpose_a: bool, transpose_b: bool
) -> jax.Array:
    if interpreter.is_interpreting():
        product = _emulated(a, b, transpose_a, transpose_b)
        return product if acc is None else acc + product
    in_registers = isinstance(a, jax.Array)
    types: list[Any] = [_layout_of(a.dtype) if in_registers else ref_type(a), ref_type(b)]
    shape = (_size(a, 1 if transpose_a else 0), _size(b, 0 if transpose_b else 1))
    operands = [a, b]
    if acc is not None:
        types.append(plgpu.Layout.WGMMA)
        operands.append(acc)
    _, swizzle = tiling_of(b)

    @plgpu.inline_mgpu(arg_types=tuple(types), return_type=_like(shape))
    def issue(_: Any, a: Any, b: Any, *acc: Any) -> Any:
        if acc:
            total = mgpu.WGMMAAccumulator.from_registers(*acc)
        else:
            total = mgpu.WGMMAAccumulator.zero(*shape)
        left = a if in_registers else _tiles(a, transpose_a)
        total = mgpu.wgmma(total, left, _tiles(b, transpose_b), swizzle=swizzle)
        nvvm.wgmma_commit_group_sync_aligned()
        return total.value

    return issue(*operands)


def as_left_operand(x: jax.Array) -> jax.Array:
    """A matrix of 8-bit elements, in the layout of results, as a left operand: no data moves.

    Its columns are then `in_operand_order`, as what they are multiplied with must be.
    """
    if interpreter.is_interpreting():
        return in_operand_order(x)
    layout = _layout_of(x.dtype)

    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def relabel(_: Any, x: Any) -> Any:
        # A thread has two neighbours of each eight columns as a result, four of sixteen as operand.
        pairs = x.registers.reshape(len(x.registers), x.registers.shape[1] // 2, 2, -1)
        quads = np.empty(fa.WGMMA_LAYOUT_8BIT.registers_shape(x.shape), dtype=object)
        flat = quads.reshape(*quads.shape[:2], -1)
        for at in np.ndindex(flat.shape):
            tile, group, register = at
            low, high = pairs[tile, group, :, register]
            flat[at] = mgpu_utils.vector_concat([low, high])
        return fa.FragmentedArray(
            _registers=quads, _layout=fa.WGMMA_LAYOUT_8BIT, _is_signed=x.is_signed
        )

    return relabel(x)


def _layout_of(dtype: Any) -> Any:
    """Of left operands in registers."""
    return plgpu.Layout.WGMMA if jnp.dtype(dtype).itemsize > 1 else plgpu.Layout.WGMMA_8BIT


def _like(shape: tuple[int, ...]) -> Any:
    return plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA)


def _size(operand: Any, axis: int) -> int:
    """Rows (0) or columns (1) of a matrix, which may be in strips."""
    *strips, rows, columns = operand.shape
    return rows if axis == 0 else columns * (strips[0] if strips else 1)


def _tiles(ref: Any, transpose: bool) -> Any:
    """A matrix as wgmma wants it: tiles by rows and columns, then elements likewise."""
    if ir.MemRefType(ref.type).rank > _STRIPS + 1:
        ref = mgpu_utils.memref_slice(ref, (slice(None), slice(None), 0))
        ref = mgpu_utils.memref_transpose(ref, (1, 0, 2, 3))
    return mgpu_utils.memref_transpose(ref, (1, 0, 3, 2)) if transpose else ref


def _emulated(a: Any, b: Any, transpose_a: bool, transpose_b: bool) -> jax.Array:
    a, b = (_widened(_whole(x[...])) for x in (a, b))
    if transpose_a:
        a = a.T
    if transpose_b:
        b = b.T
    product = jnp.dot(a, b, preferred_element_type=jnp.float32)
    # wgmma reads through the same proxy as TMA writes, these loads do not: without the fence the
    # detector would take the next copy into the tile for a race.
    plgpu.commit_smem()
    return product


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x


def _whole(x: jax.Array) -> jax.Array:
    return jnp.concatenate(list(x), axis=1) if x.ndim == _STRIPS else x
