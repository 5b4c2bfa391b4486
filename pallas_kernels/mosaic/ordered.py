"""Matrices of 16 bits in shared memory, in the order of columns that `widen` makes necessary.

They are in tiles of eight rows, each of 128 bytes; where a thread's bytes are in them is computed
anew each time, for it would be held in registers from before a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, instruct, llvm
from pallas_kernels.mosaic.matrix import Matrix
from pallas_kernels.mosaic.memory import Ref, ref_type
from pallas_kernels.mosaic.warps import lane_and_warp
from pallas_kernels.mosaic.widen import permuted

_WARPS, _SIDE = 4, 8  # of a warpgroup; rows of a tile
_WIDTH, _CHUNK = 128, 16  # bytes of a row of a tile, and of what a swizzle moves
_MOST = float(jnp.finfo(jnp.float16).max)


def store_for_widened_rows(x: Matrix, target: Matrix) -> None:
    """Stores a matrix [rows, columns] of 16 bits as one of float16 to multiply `widened_rows` with.

    What is too large for float16 becomes the largest number there is. Strips have 64 columns, and
    may be in the same place as those of the target.
    """
    strips, places = ([view.tiled for view, *_ in y.strips()] for y in (x, target))
    if interpreter.is_interpreting():
        for strip, place in zip(strips, places, strict=True):
            wide = strip[...].astype(jnp.float32)
            place[...] = jnp.clip(wide, -_MOST, _MOST).astype(place.dtype)
        return
    tiles, is_bfloat16 = strips[0].shape[0] // _SIDE, strips[0].dtype == jnp.bfloat16

    @plgpu.inline_mgpu(arg_types=tuple(ref_type(y) for y in strips + places))
    def run(_: Any, *refs: Any) -> None:
        bases = _addresses(refs)
        lane, warp = lane_and_warp()
        # Of eight rows of a strip, a warp has sixteen columns, and a thread four neighbours of a
        # row, which a product takes for two and two of eight columns each.
        row, four = arith.divui(lane, _number(4)), arith.remui(lane, _number(4))
        start = arith.muli(warp, _number(2 * _CHUNK))
        source = arith.addi(start, arith.muli(four, _number(_CHUNK // 2)))
        found = [
            [_load_two(arith.addi(base, _at(row, source, tile))) for tile in range(tiles)]
            for base in bases[: len(strips)]
        ]
        mgpu_utils.warpgroup_barrier()  # all have read what is written next
        target = arith.addi(start, arith.muli(four, _number(_CHUNK // 4)))
        for base, of_strip in zip(bases[len(strips) :], found, strict=True):
            for tile, words in enumerate(of_strip):
                for half, word in enumerate(words):
                    column = arith.addi(target, _number(half * _CHUNK))
                    number = _as_float16(word) if is_bfloat16 else word
                    _store(arith.addi(base, _at(row, column, tile)), [number])

    run(*strips, *places)


def store_from_widened_columns(places: Sequence[Ref], parts: Sequence[jax.Array]) -> None:
    """Stores a product with `widened_columns` turned, [columns, rows], its columns in order.

    Args:
      places: Strips of 64 columns.
      parts: Of 64 rows of the product each, of 16 bits.
    """
    if interpreter.is_interpreting():
        for place, part in zip(places, parts, strict=True):
            place[...] = part.T
        return
    types = [ref_type(x) for x in places] + [plgpu.Layout.WGMMA] * len(parts)

    @plgpu.inline_mgpu(arg_types=tuple(types))
    def run(_: Any, *given: Any) -> None:
        refs, parts = given[: len(given) // 2], given[len(given) // 2 :]
        lane, warp = lane_and_warp()
        warps = _WARPS // len(refs)  # that have a strip
        base, *others = _addresses(refs)
        for i, other in enumerate(others, 1):
            follows = arith.cmpi(arith.CmpIPredicate.uge, warp, _number(i * warps))
            base = arith.select(follows, other, base)
        # A thread has two rows of the product in each part, whose columns are neighbours here.
        mine = arith.muli(arith.divui(lane, _number(4)), _number(4 * len(parts)))
        start = arith.muli(arith.remui(warp, _number(warps)), _number(_WIDTH // warps))
        column = arith.addi(start, mine)
        row0 = arith.muli(arith.remui(lane, _number(4)), _number(2))
        tiles = [x.registers.reshape(-1, 2) for x in parts]
        for tile in range(len(tiles[0])):
            for i, selector in enumerate(("0x5410", "0x7632")):
                row = arith.addi(row0, _number(i))
                pairs = [map(_word, of_part[tile]) for of_part in tiles]
                words = [permuted(first, second, selector) for first, second in pairs]
                _store(arith.addi(base, _at(row, column, tile)), words)

    run(*places, *parts)


def _addresses(refs: Sequence[Any]) -> list[Any]:
    return [llvm.ptrtoint(_i32(), mgpu_utils.memref_ptr(x)) for x in refs]


def _at(row: Any, column: Any, tile: int) -> Any:
    """Where bytes of a row of a tile are: the row's number is added to a chunk's without carry."""
    swizzled = arith.xori(column, arith.muli(row, _number(_CHUNK)))
    place = arith.addi(swizzled, arith.muli(row, _number(_WIDTH)))
    return arith.addi(place, _number(tile * _SIDE * _WIDTH))


def _load_two(place: Any) -> list[Any]:
    pair = ir.Type.parse("!llvm.struct<(i32, i32)>")
    found = llvm.inline_asm(
        pair, [place], "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", has_side_effects=True
    )
    return [llvm.extractvalue(_i32(), found, [i]) for i in range(2)]


def _store(place: Any, words: list[Any]) -> None:
    names = ", ".join(f"${i + 1}" for i in range(len(words)))
    many = f".v{len(words)}" if len(words) > 1 else ""
    constraints = ",".join("r" * (len(words) + 1))
    instruct([place, *words], f"st.shared{many}.b32 [$0], {{{names}}};", constraints)


def _as_float16(word: Any) -> Any:
    """Two bfloat16 as float16."""
    return llvm.inline_asm(_i32(), [word], _FLOAT16_OF_BFLOAT16, "=r,r")


def _word(pair: Any) -> Any:
    return mgpu_utils.bitcast(pair, _i32())


def _number(x: int) -> Any:
    return mgpu_utils.c(x, _i32())


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


_FLOAT16_OF_BFLOAT16 = """
    {
    .reg .f32 l, h;
    .reg .b32 t;
    shl.b32 t, $1, 16;
    mov.b32 l, t;
    and.b32 t, $1, 0xffff0000;
    mov.b32 h, t;
    min.NaN.f32 l, l, 0f477FE000;
    min.NaN.f32 h, h, 0f477FE000;
    max.NaN.f32 l, l, 0fC77FE000;
    max.NaN.f32 h, h, 0fC77FE000;
    cvt.rn.f16x2.f32 $0, h, l;
    }
"""
