"""Values in registers, in the layout that matrix products give and take."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, llvm, vector
from pallas_kernels.mosaic.memory import Ref, layout_cast, load

FOLDED = _COLUMNS_OF_TILE = 8  # of a matrix: a thread has two of them
_ROWS_OF_TILE, _ROWS_OF_WARP = 64, 16
_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def full(
    shape: tuple[int, ...], value: float, dtype: jax.typing.DTypeLike, *, by_row: bool = True
) -> jax.Array:
    """A matrix, or a vector with an entry for each row of one, or for each column."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else _of_vector(by_row)
    return layout_cast(jnp.full(shape, value, dtype), layout)


def _of_vector(by_row: bool) -> Any:
    return _ROWS if by_row else _COLUMNS


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """The int32 index of each element of a matrix along an axis.

    Mosaic's own divides the number of an element by the size of a row, of which the compiler does
    not find that most results are equal. Here a thread's indices are one number plus constants.
    """
    if interpreter.is_interpreting():
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, plgpu.Layout.WGMMA))
    def run(_: Any) -> Any:
        layout = fa.WGMMA_LAYOUT
        # By how much the index grows along each axis that warps, lanes and registers count.
        steps = layout.tiling.tile_strides(tuple(int(i == axis) for i in range(len(shape))))
        i32 = ir.IntegerType.get_signless(32)
        of_threads = [mgpu_utils.c(step, i32) for step in steps[-layout.tiled_tiling_rank :]]
        warp, lane = (
            mgpu_utils.dyn_dot(indices, of_threads)
            for indices in (layout.warp_indices(), layout.lane_indices())
        )
        vectors = ir.VectorType.get((layout.vector_length,), i32)
        first = vector.broadcast(vectors, arith.addi(warp, lane))
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for at in np.ndindex(registers.shape):
            numbers = np.dot(at, steps) + np.arange(layout.vector_length) * steps[-1]
            constants = ir.DenseElementsAttr.get(numbers.astype(np.int32), type=vectors)
            registers[at] = arith.addi(first, arith.constant(vectors, constants))
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return run()


def vector_iota(size: int, *, by_row: bool = True) -> jax.Array:
    """The int32 index of each row of a matrix, or of each column, a vector."""
    if interpreter.is_interpreting():
        return lax.iota(jnp.int32, size)
    result = plgpu.ShapeDtypeStruct((size,), jnp.int32, _of_vector(by_row))

    @plgpu.inline_mgpu(return_type=result)
    def run(_: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        layout = fa.WGMMA_ROW_LAYOUT if by_row else fa.WGMMA_COL_LAYOUT
        return fa.FragmentedArray.broadcasted_iota(i32, (size,), 0, layout, is_signed=True)

    return run()


def uniform(x: Any) -> Any:
    """An int32 scalar that was read from memory, in a form that tells the compiler it is uniform.

    What follows from it then needs no register in every thread.
    """
    return _through("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", x)


def opaque(x: Any) -> Any:
    """An int32 scalar of which the compiler knows nothing.

    What depends on it is computed where it is used, not before a loop to be held in registers.
    """
    return _through("mov.b32 $0, $1;", jnp.int32(x))


def _through(instruction: str, x: Any) -> Any:
    """The result of one instruction on a scalar."""
    if interpreter.is_interpreting():
        return jnp.int32(x)
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(splat,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, splat))
    def run(_: Any, x: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        operands = [x.registers.item()]
        value = llvm.inline_asm(i32, operands, instruction, "=r,r", has_side_effects=True)
        return fa.FragmentedArray.splat(value, (), fa.WGSplatFragLayout(()), is_signed=True)

    return run(x)


def load_matrix(ref: Ref) -> jax.Array:
    """Loads [rows, columns]."""
    return load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def kept_rows(x: jax.Array, kept: jax.Array) -> jax.Array:
    """A matrix of 8 or 16 bits where ``kept``, which is alike in a whole row, else zero."""
    if interpreter.is_interpreting() or x.dtype.itemsize > 1:
        return jnp.where(kept, x, jnp.zeros((), x.dtype))
    wgmma = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, wgmma)

    # Mosaic selects no numbers of 8 bits.
    @plgpu.inline_mgpu(arg_types=(wgmma, wgmma), return_type=result)
    def run(_: Any, x: Any, mask: Any) -> Any:
        i16 = ir.IntegerType.get_signless(16)
        registers = np.empty_like(x.registers)
        for at, pair in np.ndenumerate(x.registers):
            of_row = vector.extract(mask.registers[at], dynamic_position=[], static_position=[0])
            bits = arith.andi(mgpu_utils.bitcast(pair, i16), arith.trunci(i16, of_row))
            registers[at] = mgpu_utils.bitcast(bits, pair.type)
        return fa.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)

    return run(x, jnp.where(kept, jnp.int32(-1), jnp.int32(0)))


def load_rows(ref: Ref) -> jax.Array:
    """Loads an entry for each row of a matrix."""
    return load(ref, layout=_ROWS, optimized=False)


def load_columns(ref: Ref) -> jax.Array:
    """Loads an entry for each column of a matrix."""
    return load(ref, layout=_COLUMNS, optimized=False)


def spread_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The matrix whose every column is `x`."""
    return _spread(x, shape, 0)


def spread_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The matrix whose every row is `x`."""
    return _spread(x, shape, 1)


def _spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    if interpreter.is_interpreting():
        return lax.broadcast_in_dim(x, shape, [axis])
    layout = _of_vector(axis == 0)
    result = plgpu.ShapeDtypeStruct(shape, x.dtype, plgpu.Layout.WGMMA)

    # Not Mosaic's own, whose layouts it would search for, in a time exponential in their number.
    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def run(_: Any, x: Any) -> Any:
        return x.broadcast_in_dim(shape, (axis,), fa.WGMMA_LAYOUT)

    return run(x)


def spread_parts(parts: tuple[Any, ...], shape: tuple[int, ...], axis: int = 1) -> jax.Array:
    """The matrix of float32 that along an axis, in parts of one size, is a number in each.

    It takes no registers but those of the numbers. Where parts are fewer than 64 rows, a warp takes
    those of its own.
    """
    width = shape[axis] // len(parts)
    if interpreter.is_interpreting():
        along = jnp.repeat(jnp.stack(parts), width)
        return jnp.broadcast_to(along[:, None] if axis == 0 else along, shape)
    splat, f32 = plgpu.Layout.WG_SPLAT, jnp.float32
    result = plgpu.ShapeDtypeStruct(shape, f32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(splat,) * len(parts), return_type=result)
    def run(_: Any, *parts: Any) -> Any:
        layout = fa.WGMMA_LAYOUT
        vectors = ir.VectorType.get((layout.vector_length,), ir.F32Type.get())
        numbers = [x.registers.item() for x in parts]
        if axis == 0:
            starts = range(0, shape[0], _ROWS_OF_TILE)
            of_tiles = [_of_warp(numbers, start, width) for start in starts]
        else:
            of_tiles = [numbers[i // width] for i in range(0, shape[1], _COLUMNS_OF_TILE)]
        of_tiles = [vector.broadcast(vectors, x) for x in of_tiles]
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for at in np.ndindex(registers.shape):
            registers[at] = of_tiles[at[axis]]
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(*(f32(x) for x in parts))


def _of_warp(numbers: list[Any], row: int, width: int) -> Any:
    """Of numbers for each ``width`` rows, that of this warp's rows of the 64 from ``row`` on."""
    starts = range(row, row + _ROWS_OF_TILE, min(width, _ROWS_OF_TILE))
    first, *others = (numbers[start // width] for start in starts)
    i32 = ir.IntegerType.get_signless(32)
    my_row = arith.muli(mgpu_utils.warp_idx(sync=False), mgpu_utils.c(_ROWS_OF_WARP, i32))
    my_row = arith.remui(my_row, mgpu_utils.c(_ROWS_OF_TILE, i32))
    for start, number in zip(starts[1:], others, strict=True):
        follows = arith.cmpi(arith.CmpIPredicate.uge, my_row, mgpu_utils.c(start - row, i32))
        first = arith.select(follows, number, first)
    return first


def fold_parts(x: jax.Array, parts: int, combine: Any) -> jax.Array:
    """A matrix of float32 whose parts are folded to `FOLDED` columns each: its maxima, or its sums.

    A thread combines what it has.
    """
    rows, columns = x.shape
    shape = rows, parts * FOLDED
    if interpreter.is_interpreting():
        tiles = jnp.moveaxis(x.reshape(rows, parts, -1, FOLDED), 2, 0)
        return functools.reduce(combine, tiles).reshape(shape)
    operation = {jnp.maximum: arith.maximumf, jnp.add: arith.addf}[combine]
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def run(_: Any, x: Any) -> Any:
        each = columns // FOLDED // parts
        registers = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
        for at in np.ndindex(registers.shape):
            row, part, *rest = at
            of_part = [x.registers[row, part * each + i, *rest] for i in range(each)]
            while len(of_part) > 1:  # in pairs, for fewer to wait for each other
                pairs = zip(of_part[::2], of_part[1::2], strict=False)
                odd = of_part[-1:] if len(of_part) % 2 else []
                of_part = [operation(*pair) for pair in pairs] + odd
            registers[at] = of_part[0]
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return run(x)
