"""Numbers of 8 bits in shared memory as left operands of products in float16.

They are widened on their way to registers. A load brings four numbers that lie side by side, a
product has others in a thread: so a matrix's columns come in another order.
`store_for_widened_rows` and `store_from_widened_columns` bring to that order what it is multiplied
with, and back what results.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, instruct, llvm
from pallas_kernels.mosaic.matrix import Matrix
from pallas_kernels.mosaic.memory import Ref, ref_type, tiling_of
from pallas_kernels.mosaic.warps import lane_and_warp

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


def store_for_widened_rows(x: Matrix, target: Matrix) -> None:
    """Stores a matrix [rows, columns] of 16 bits as one of float16 to multiply `widened_rows` with.

    What is too large for float16 becomes the largest number there is. Strips have 64 columns, and
    may be in the same place as those of the target.
    """
    most = float(jnp.finfo(jnp.float16).max)
    strips, places = ([view.tiled for view, *_ in y.strips()] for y in (x, target))
    if interpreter.is_interpreting():
        for strip, place in zip(strips, places, strict=True):
            wide = strip[...].astype(jnp.float32)
            place[...] = jnp.clip(wide, -most, most).astype(place.dtype)
        return
    (_, swizzle), fits = tiling_of(strips[0]), strips[0].dtype == places[0].dtype

    @plgpu.inline_mgpu(arg_types=tuple(ref_type(y) for y in strips + places))
    def run(_: Any, *refs: Any) -> None:
        strips, places = refs[: len(refs) // 2], refs[len(refs) // 2 :]
        load = functools.partial(fa.FragmentedArray.load_tiled, layout=_FOURS, optimized=False)
        given = [load(strip, swizzle) for strip in strips]
        mgpu_utils.warpgroup_barrier()  # all have read what is written next
        for found, place in zip(given, places, strict=True):
            numbers = found
            if not fits:
                wide = found.astype(ir.F32Type.get())
                numbers = wide.max(-most).min(most).astype(ir.F16Type.get())
            registers = np.empty(_PAIRS.registers_shape(numbers.shape), dtype=object)
            pairs = registers.reshape(-1, 2)
            for i, four in enumerate(numbers.registers.flat):
                pairs[i] = [mgpu_utils.vector_slice(four, slice(j, j + 2)) for j in (0, 2)]
            ordered = fa.FragmentedArray(_registers=registers, _layout=_PAIRS, _is_signed=None)
            ordered.store_tiled(place, swizzle, optimized=False)

    run(*strips, *places)


# Of eight rows of a strip, a warp has sixteen columns, a thread four of a row: neighbours, and as
# a product wants them, which takes them for those of two times eight columns.
_FOURS = fa.TiledLayout(fa.Tiling(((8, 64), (8, 16), (4,))), (-4,), (-3, -2), -1)
_PAIRS = fa.TiledLayout(fa.Tiling(((8, 64), (8, 16), (8, 8), (2,))), (-6,), (-3, -2), -1)


def store_from_widened_columns(places: list[Ref], parts: list[jax.Array]) -> None:
    """Stores a product with `widened_columns` turned, [columns, rows], its columns in order.

    Args:
      places: Strips of 64 columns, tiled.
      parts: Of 64 rows of the product each, of 16 bits.
    """
    if interpreter.is_interpreting():
        for place, part in zip(places, parts, strict=True):
            place[...] = part.T
        return
    types = [ref_type(x) for x in places] + [plgpu.Layout.WGMMA] * len(parts)

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def run(_: Any, *given: Any) -> None:
        places, parts = given[: len(given) // 2], given[len(given) // 2 :]
        i32 = _i32()

        def number(x: int) -> Any:
            return mgpu_utils.c(x, i32)

        lane, warp = lane_and_warp()
        at_once, of_place = 2 * len(parts), _WARPS // len(places)
        bases = [llvm.ptrtoint(i32, mgpu_utils.memref_ptr(x)) for x in places]
        base = bases[0]
        for i, other in enumerate(bases[1:], 1):
            follows = arith.cmpi(arith.CmpIPredicate.uge, warp, number(i * of_place))
            base = arith.select(follows, other, base)
        # In bytes of a row of the strip, of 128: where this thread's columns are.
        warp = arith.remui(warp, number(of_place))
        column = arith.muli(warp, number(128 // of_place))
        four, query = arith.divui(lane, number(4)), arith.remui(lane, number(4))
        column = arith.addi(column, arith.muli(four, number(2 * at_once)))
        (down, *_), _ = ir.MemRefType(places[0].type).get_strides_and_offset()
        tiles = [x.registers.reshape(-1, 2) for x in parts]
        for at in range(len(tiles[0])):
            for of_pair in range(2):
                row = arith.addi(arith.muli(query, number(2)), number(of_pair))
                place = arith.addi(arith.muli(row, number(128)), number(2 * at * down))
                place = arith.addi(place, arith.xori(column, arith.muli(row, number(16))))
                place = arith.addi(base, place)
                words = []
                for tile in tiles:
                    first, second = (mgpu_utils.bitcast(x, i32) for x in tile[at])
                    selector = ("0x5410", "0x7632")[of_pair]
                    words.append(_permuted(first, second, selector))
                names = ", ".join(f"${i + 1}" for i in range(len(words)))
                vector = f".v{len(words)}" if len(words) > 1 else ""
                store = f"st.shared{vector}.b32 [$0], {{{names}}};"
                instruct([place, *words], store, ",".join("r" * (len(words) + 1)))

    run(*places, *parts)


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
    return _permuted(first, second, ("0x5140", "0x7362")[pair])


def _permuted(first: Any, second: Any, selector: str) -> Any:
    """Some four bytes of two registers."""
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
