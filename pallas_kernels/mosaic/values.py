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

_COLUMNS_OF_TILE = 8  # of a matrix: a thread has two of them
_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def full(shape: tuple[int, ...], value: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A matrix, or a vector with an entry for each row of one."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else _ROWS
    return layout_cast(jnp.full(shape, value, dtype), layout)


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


def row_iota(rows: int) -> jax.Array:
    """The int32 index of each row of a matrix, a vector."""
    if interpreter.is_interpreting():
        return lax.iota(jnp.int32, rows)

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((rows,), jnp.int32, _ROWS))
    def run(_: Any) -> Any:
        i32, layout = ir.IntegerType.get_signless(32), fa.WGMMA_ROW_LAYOUT
        return fa.FragmentedArray.broadcasted_iota(i32, (rows,), 0, layout, is_signed=True)

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


def half(x: jax.Array) -> jax.Array:
    """A matrix [rows, columns] of 8-bit numbers in float16, as `load_matrix` loads it."""
    if interpreter.is_interpreting() or not jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.float16)
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float16, plgpu.Layout.WGMMA)

    # Mosaic's own conversion takes several instructions for each number, this one three for two:
    # with 128 added, a number is the lower bits of the fraction of 1024.
    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def run(_: Any, x: Any) -> Any:
        i16, i32 = (ir.IntegerType.get_signless(bits) for bits in (16, 32))
        pair = ir.VectorType.get((2,), ir.F16Type.get())
        registers = np.empty_like(x.registers)
        for at, numbers in np.ndenumerate(x.registers):
            both = arith.extui(i32, mgpu_utils.bitcast(numbers, i16))
            found = llvm.inline_asm(i32, [both], _HALF_OF_INT8, "=r,r")
            registers[at] = mgpu_utils.bitcast(found, pair)
        return fa.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return run(x)


_HALF_OF_INT8 = """
{
.reg .b32 t, u;
mov.b32 u, 0x64646464;
prmt.b32 t, $1, u, 0x4140;
xor.b32 t, t, 0x00800080;
mov.b32 u, 0x64806480;
sub.f16x2 $0, t, u;
}
"""


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
    layout = _ROWS if axis == 0 else _COLUMNS
    result = plgpu.ShapeDtypeStruct(shape, x.dtype, plgpu.Layout.WGMMA)

    # Not Mosaic's own, whose layouts it would search for, in a time exponential in their number.
    @plgpu.inline_mgpu(arg_types=(layout,), return_type=result)
    def run(_: Any, x: Any) -> Any:
        return x.broadcast_in_dim(shape, (axis,), fa.WGMMA_LAYOUT)

    return run(x)


def spread_parts(parts: tuple[Any, ...], shape: tuple[int, ...]) -> jax.Array:
    """The matrix of float32 whose columns, in as many parts of one size, are a number each.

    It takes no registers but those of the numbers.
    """
    width = shape[1] // len(parts)
    if interpreter.is_interpreting():
        return jnp.broadcast_to(jnp.repeat(jnp.stack(parts), width), shape)
    splat, f32 = plgpu.Layout.WG_SPLAT, jnp.float32
    result = plgpu.ShapeDtypeStruct(shape, f32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(splat,) * len(parts), return_type=result)
    def run(_: Any, *parts: Any) -> Any:
        layout = fa.WGMMA_LAYOUT
        vectors = ir.VectorType.get((layout.vector_length,), ir.F32Type.get())
        numbers = [vector.broadcast(vectors, x.registers.item()) for x in parts]
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for at in np.ndindex(registers.shape):
            registers[at] = numbers[at[1] * _COLUMNS_OF_TILE // width]
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(*(f32(x) for x in parts))


def fold_parts(x: jax.Array, parts: int, combine: Any) -> jax.Array:
    """A matrix of float32 whose parts are folded to eight columns each: its maxima, or its sums.

    A thread combines what it has. One part is left as it is.
    """
    if parts == 1:
        return x
    rows, columns = x.shape
    shape = rows, parts * _COLUMNS_OF_TILE
    if interpreter.is_interpreting():
        tiles = jnp.moveaxis(x.reshape(rows, parts, -1, _COLUMNS_OF_TILE), 2, 0)
        return functools.reduce(combine, tiles).reshape(shape)
    operation = {jnp.maximum: arith.maximumf, jnp.add: arith.addf}[combine]
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=result)
    def run(_: Any, x: Any) -> Any:
        each = columns // _COLUMNS_OF_TILE // parts
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
