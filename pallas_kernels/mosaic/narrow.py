"""A matrix of 16 bits in shared memory that becomes one of 8 bits where it is.

A thread takes eight neighbours of a row at a time, which are 16 bytes, and then 8.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, llvm, vector
from pallas_kernels.mosaic.matrix import Matrix
from pallas_kernels.mosaic.memory import Ref, ref_type, tiling_of
from pallas_kernels.mosaic.warps import lane_and_warp
from pallas_kernels.spec import quantization as rules

_WARPS, _AT_ONCE = 4, 8
_ROWS_OF_WARP, _ROWS_AT_ONCE = 16, 4
NARROWED_NUMBERS = _WARPS + 1  # that `narrow_rows` needs
# Of 64 rows and columns a warp has sixteen rows, and four of them at a time.
_EIGHTS = fa.TiledLayout(fa.Tiling(((64, 64), (16, 64), (4, 64), (8,))), (-7,), (-3, -2), -1)


def narrow_rows(
    x: Matrix,  # [64, columns] in strips of 64
    target: Matrix,  # likewise, in the same place
    numbers: Ref,  # [NARROWED_NUMBERS] float32
    count: Any | None = None,  # of rows that count, the others being zero
) -> None:
    """Rounds rows to 8-bit floating point; the last of ``numbers`` is then their scale."""
    strips, places = ([view.tiled for view, *_ in y.strips()] for y in (x, target))
    if interpreter.is_interpreting():
        _emulate(strips, places, numbers, count)
        return
    (_, swizzle), (_, swizzle_of_target) = tiling_of(strips[0]), tiling_of(places[0])
    types = [ref_type(y) for y in strips + places]
    counts, many = () if count is None else (jnp.int32(count),), len(strips)

    @plgpu.inline_mgpu(
        arg_types=(*types, plgpu.RefType(), *(plgpu.Layout.WG_SPLAT for _ in counts))
    )
    def run(_: Any, *given: Any) -> None:
        strips, places = given[:many], given[many : 2 * many]
        numbers, *counts = given[2 * many :]
        load = functools.partial(fa.FragmentedArray.load_tiled, layout=_EIGHTS, optimized=False)
        found = [load(strip, swizzle).registers for strip in strips]
        if counts:
            count = counts[0].registers.item()
            found = [_kept(registers, count) for registers in found]
        scale = _scale(found, numbers)  # all have read what is written next
        factor = arith.divf(mgpu_utils.c(1.0, scale.type), scale)
        for registers, place in zip(found, places, strict=True):
            narrowed = np.empty_like(registers)
            for at, eight in np.ndenumerate(registers):
                narrowed[at] = _narrowed(eight, factor)
            result = fa.FragmentedArray(_registers=narrowed, _layout=_EIGHTS, _is_signed=None)
            result.store_tiled(place, swizzle_of_target, optimized=False)

    run(*strips, *places, numbers, *counts)


def _emulate(strips: list[Ref], places: list[Ref], numbers: Ref, count: Any | None) -> None:
    given = jnp.concatenate([strip[...] for strip in strips], axis=1)
    if count is not None:
        given = jnp.where(jnp.arange(len(given))[:, None] < count, given, 0)
    given = given[None, :, None]  # [B, T, N, H]
    scales = rules.scales_of(given, "head")
    narrowed = rules.quantize(given, scales)[0, :, 0]
    for part, place in zip(jnp.split(narrowed, len(places), axis=1), places, strict=True):
        place[...] = part
    numbers[NARROWED_NUMBERS - 1] = scales[0, 0, 0]


def _kept(registers: np.ndarray, count: Any) -> np.ndarray:
    """Zeros in place of rows from ``count`` on."""
    i32 = ir.IntegerType.get_signless(32)
    lane, warp = lane_and_warp()
    row = arith.addi(
        arith.muli(warp, mgpu_utils.c(_ROWS_OF_WARP, i32)),
        arith.divui(lane, mgpu_utils.c(32 // _ROWS_AT_ONCE, i32)),
    )
    kept = np.empty_like(registers)
    flat = kept.reshape(-1)
    for i, eight in enumerate(registers.flat):
        mine = arith.addi(row, mgpu_utils.c(i * _ROWS_AT_ONCE, i32))
        exists = arith.cmpi(arith.CmpIPredicate.slt, mine, count)
        zeros = arith.constant(eight.type, ir.DenseElementsAttr.get_splat(eight.type, _zero(eight)))
        flat[i] = arith.select(exists, eight, zeros)
    return kept


def _zero(eight: Any) -> Any:
    return ir.FloatAttr.get(ir.VectorType(eight.type).element_type, 0.0)


def _scale(found: list[np.ndarray], numbers: Any) -> Any:
    """Of the elements of all threads, float32; once it is there, each has read its own."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    (of_element,) = {ir.VectorType(x.type).element_type for y in found for x in y.flat}
    words = [word for registers in found for eight in registers.flat for word in _words(eight)]
    # Without their signs, numbers are ordered as their bits are.
    sizes = [arith.andi(word, mgpu_utils.c(0x7FFF7FFF, i32)) for word in words]
    while len(sizes) > 1:  # in pairs, for fewer to wait for each other
        pairs = itertools.zip_longest(sizes[::2], sizes[1::2])
        sizes = [_max_of_halves(*pair) if pair[1] is not None else pair[0] for pair in pairs]
    halves = [
        arith.andi(sizes[0], mgpu_utils.c(0xFFFF, i32)),
        arith.shrui(sizes[0], mgpu_utils.c(16, i32)),
    ]
    of_warp = llvm.inline_asm(
        i32,
        [arith.maxui(*halves)],
        "redux.sync.max.u32 $0, $1, 0xffffffff;",
        "=r,r",
        has_side_effects=True,
    )
    bits = arith.trunci(ir.IntegerType.get_signless(16), of_warp)
    largest = arith.extf(f32, arith.bitcast(of_element, bits))
    _, warp = lane_and_warp()
    base = mgpu_utils.memref_ptr(numbers)
    llvm.store(largest, mgpu_utils.getelementptr(base, [warp], f32))
    mgpu_utils.warpgroup_barrier()
    of_warps = [llvm.load(f32, mgpu_utils.getelementptr(base, [i], f32)) for i in range(_WARPS)]
    largest = functools.reduce(arith.maximumf, of_warps)
    scale = arith.mulf(largest, mgpu_utils.c(1 / rules.LARGEST, f32))
    scale = arith.maximumf(scale, mgpu_utils.c(rules.LEAST, f32))
    llvm.store(scale, mgpu_utils.getelementptr(base, [_WARPS], f32))
    return scale


def _words(eight: Any) -> list[Any]:
    i32 = ir.IntegerType.get_signless(32)
    words = vector.bitcast(ir.VectorType.get((_AT_ONCE // 2,), i32), eight)
    return [
        vector.extract(words, dynamic_position=[], static_position=[i])
        for i in range(_AT_ONCE // 2)
    ]


def _max_of_halves(first: Any, second: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [first, second], "max.u16x2 $0, $1, $2;", "=r,r,r")


def _narrowed(eight: Any, factor: Any) -> Any:
    """Eight numbers, multiplied, in 8 bits."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    wide = arith.extf(ir.VectorType.get((_AT_ONCE,), f32), eight)
    wide = arith.mulf(wide, vector.broadcast(wide.type, factor))
    numbers = [
        vector.extract(wide, dynamic_position=[], static_position=[i]) for i in range(_AT_ONCE)
    ]
    words = [
        llvm.inline_asm(i32, numbers[i : i + 4], _FOUR_TO_FLOAT8, "=r,f,f,f,f")
        for i in range(0, _AT_ONCE, 4)
    ]
    both = vector.from_elements(ir.VectorType.get((len(words),), i32), words)
    return vector.bitcast(ir.VectorType.get((_AT_ONCE,), ir.Float8E4M3FNType.get()), both)


_FOUR_TO_FLOAT8 = """
    {
    .reg .b16 l, h;
    cvt.rn.satfinite.e4m3x2.f32 l, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;
    mov.b32 $0, {l, h};
    }
"""
