"""Matrices from registers to rows of global memory, 16 bytes by each thread.

A thread has two neighbours of a row, of each eight columns. Written as they are, 16-bit elements
take four times as many instructions, each of which fills half of what the L2 cache takes at once.
So the four threads of a row exchange what they have: each gets all of eight columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, instruct, scf
from pallas_kernels.mosaic.memory import Ref
from pallas_kernels.mosaic.warps import lane_and_warp, turned_among_four

_LANES = 4  # that share a row
_HALVES, _ROWS_OF_HALF, _ROWS_OF_WARP = 2, 8, 16
_COLUMNS = 8  # of 16 bits, that a lane stores at once
_SPLAT = plgpu.Layout.WG_SPLAT


def store_rows(ref: Ref, value: jax.Array, start: tuple[Any, Any] | None = None) -> None:
    """Stores a matrix [64, columns] of 16 bits to global memory.

    Args:
      ref: Rows that begin at a multiple of 16 bytes: as many and as long, if there is no ``start``.
      value: ``columns`` is a multiple of 32.
      start: Row and column at which the matrix begins. The reference may end within it, after a
        multiple of 8 columns.
    """
    if interpreter.is_interpreting():
        assert start is None, "an array does not end within what is stored there"
        ref[...] = value
        return
    limits = None if start is None else ref.shape
    given = () if start is None else tuple(map(jnp.int32, start))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, *(_SPLAT for _ in given)))
    def run(_: Any, ref: Any, value: Any, *given: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        zero = mgpu_utils.c(0, i32)
        row, column = (x.registers.item() for x in given) if given else (zero, zero)
        store = _storer(ref, row, column, limits)
        tiles = value.registers.reshape(-1, _HALVES)
        for left in range(0, len(tiles), _LANES):
            for half in range(_HALVES):
                four = tiles[left : left + _LANES, half]
                words = turned_among_four([mgpu_utils.bitcast(x, i32) for x in four])
                store(half * _ROWS_OF_HALF, left * _COLUMNS, words)

    run(ref, value, *given)


def _storer(
    ref: Any, row: Any, column: Any, limits: tuple[int, ...] | None
) -> Callable[[int, int, list[Any]], None]:
    """Stores what a lane has of 32 columns so far below and right of those that begin there."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    memref = ir.MemRefType(ref.type)
    (of_row, *_), _ = memref.get_strides_and_offset()
    lane, warp = lane_and_warp()
    lanes = mgpu_utils.c(_LANES, i32)
    row = arith.addi(row, arith.muli(warp, mgpu_utils.c(_ROWS_OF_WARP, i32)))
    row = arith.addi(row, arith.divui(lane, lanes))
    mine = arith.muli(arith.remui(lane, lanes), mgpu_utils.c(_COLUMNS, i32))
    column = arith.addi(column, mine)
    first = arith.muli(arith.extui(i64, row), mgpu_utils.c(of_row, i64))
    first = arith.addi(first, arith.extui(i64, column))
    start = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(ref), [first], memref.element_type)

    def store(below: int, right: int, words: list[Any]) -> None:
        place = mgpu_utils.getelementptr(start, [below * of_row + right], memref.element_type)
        if limits is None:
            store_four(place, words)
            return
        exists = arith.andi(_is_below(row, below, limits[0]), _is_below(column, right, limits[1]))
        with ir.InsertionPoint(scf.IfOp(exists).then_block):
            store_four(place, words)
            scf.yield_([])

    return store


def store_four(place: Any, words: list[Any]) -> None:
    """For inlined code: stores four words of 32 bits to global memory at once."""
    instruct([place, *words], "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r")


def _is_below(index: Any, more: int, limit: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    index = arith.addi(index, mgpu_utils.c(more, i32))
    return arith.cmpi(arith.CmpIPredicate.slt, index, mgpu_utils.c(limit, i32))
