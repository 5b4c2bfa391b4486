"""Numbers of 8 bits in shared memory as left operands of products in float16.

They are widened on their way to registers. A load brings four numbers that lie side by side, a
product has others in a thread: so a matrix's columns come in another order. `ordered` brings to
that order what it is multiplied with, and back what results.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, llvm
from pallas_kernels.mosaic.matrix import Matrix
from pallas_kernels.mosaic.memory import ref_type, tiling_of

_WARPS, _LANES = 4, 8  # that share the columns of a matrix which is turned
WIDENED_COLUMNS = (64, 128)  # that it may have


def widened_rows(x: Matrix) -> jax.Array:
    """A matrix [rows, columns] of one strip; columns are as `store_for_widened_rows` has them."""
    ((strip, *_),) = x.strips()
    if interpreter.is_interpreting():
        return strip.tiled[...].astype(jnp.float16)
    rows, columns = strip.tiled.shape

    def widen(ref: Any, is_int: bool, swizzle: int) -> Any:
        loaded = _load(ref, is_int, swizzle, fa.WGMMA_LAYOUT_8BIT)
        quads = loaded.registers.reshape(rows // 64, columns // 16, 2)  # halves of rows
        registers = np.empty((rows // 64, columns // 16, 2, 2), dtype=object)
        for row, group, half in np.ndindex(quads.shape):
            low, high = _halves(mgpu_utils.bitcast(quads[row, group, half], _i32()), is_int)
            registers[row, group, :, half] = low, high
        return registers

    return _run(strip.tiled, (rows, columns), widen)


def widened_columns(x: Matrix) -> jax.Array:
    """A matrix [rows, columns] of one strip turned, [columns, rows].

    A product with it has rows that `store_from_widened_columns` brings back to their order.
    """
    ((strip, *_),) = x.strips()
    if interpreter.is_interpreting():
        return strip.tiled[...].astype(jnp.float16).T
    rows, columns = strip.tiled.shape
    at_once, of_warp = _at_once(columns), columns // _WARPS
    # A warp has a quarter of the columns, of each sixteen rows a thread two and two, and of those
    # neighbours.
    layout = fa.TiledLayout(
        fa.Tiling(((16, columns), (16, of_warp), (8, of_warp), (2, at_once))),
        warp_dims=(-7,),
        lane_dims=(-3, -4),
        vector_dim=-1,
    )

    def widen(ref: Any, is_int: bool, swizzle: int) -> Any:
        loaded = _load(ref, is_int, swizzle, layout).registers.reshape(rows // 16, 2, 2)
        registers = np.empty((columns // 64, rows // 16, 2, 2), dtype=object)
        bits = ir.IntegerType.get_signless(8 * at_once)
        for group, half in np.ndindex(loaded.shape[:2]):
            first, second = (mgpu_utils.bitcast(x, bits) for x in loaded[group, half])
            if at_once < 4:
                first, second = (arith.extui(_i32(), x) for x in (first, second))
            for pair in range(at_once // 2):
                both = _zipped(first, second, pair)
                registers[pair, group, half, :] = _halves(both, is_int)
        return registers

    return _run(strip.tiled, (columns, rows), widen)


def _at_once(columns: int) -> int:
    """Numbers of a row that a thread has."""
    return columns // (_WARPS * _LANES)


def _run(ref: Any, shape: tuple[int, int], widen: Any) -> jax.Array:
    _, swizzle = tiling_of(ref)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float16, plgpu.Layout.WGMMA)
    is_int = jnp.issubdtype(ref.dtype, jnp.integer)

    @plgpu.inline_mgpu(arg_types=(ref_type(ref),), return_type=result)
    def run(_: Any, ref: Any) -> Any:
        layout = fa.WGMMA_LAYOUT
        # By 64 rows, eight columns, halves of rows.
        registers = widen(ref, is_int, swizzle).reshape(layout.registers_shape(shape))
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(ref)


def _load(ref: Any, is_int: bool, swizzle: int, layout: Any) -> Any:
    return fa.FragmentedArray.load_tiled(
        ref, swizzle, is_signed=True if is_int else None, layout=layout, optimized=False
    )


def _halves(numbers: Any, is_int: bool) -> tuple[Any, Any]:
    """Four numbers of 8 bits as two pairs of float16."""
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    found = []
    for instructions in _OF_INT8 if is_int else _OF_FLOAT8:
        wide = llvm.inline_asm(_i32(), [numbers], instructions, "=r,r")
        found.append(mgpu_utils.bitcast(wide, pair))
    return found[0], found[1]


def _zipped(first: Any, second: Any, pair: int) -> Any:
    """Two numbers each of two registers in turns, the first pair of them or the second."""
    return permuted(first, second, ("0x5140", "0x7362")[pair])


def permuted(first: Any, second: Any, selector: str) -> Any:
    """For inlined code: some four bytes of two registers."""
    return llvm.inline_asm(_i32(), [first, second], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r")


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


_OF_FLOAT8 = (
    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }",
    "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, h; }",
)
# With 128 added, a number is the lower bits of the fraction of 1024.
_OF_INT8 = tuple(
    f"""
    {{
    .reg .b32 t, u;
    mov.b32 u, 0x64646464;
    prmt.b32 t, $1, u, {selector};
    xor.b32 t, t, 0x00800080;
    mov.b32 u, 0x64806480;
    sub.f16x2 $0, t, u;
    }}
    """
    for selector in ("0x4140", "0x4342")
)
