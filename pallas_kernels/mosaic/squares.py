"""Matrices on their way from registers to shared memory, square by square of 8 x 8."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, instruct, llvm
from pallas_kernels.mosaic.memory import Ref, ref_type, tiling_of
from pallas_kernels.mosaic.warps import lane_and_warp

_ROWS, _SIDE = 64, 8  # of a product's tile; of a square that a warp stores
_SWIZZLE, _CHUNK = 128, 16  # bytes of a row of a tile; of a square's


def store_turned(ref: Ref, value: jax.Array) -> None:
    """Stores a matrix [rows, columns] of 16 bits as [columns, rows] into tiled shared memory.

    Tiles have rows of 128 bytes.
    """
    if interpreter.is_interpreting():
        ref[...] = value.T
        return
    _check(ref)

    @plgpu.inline_mgpu(arg_types=(ref_type(ref), plgpu.Layout.WGMMA))
    def run(_: Any, ref: Any, value: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        rows, columns = value.shape
        # [columns / 8, rows / 64, 8, 64]
        (down, across, *_), _ = ir.MemRefType(ref.type).get_strides_and_offset()
        base = arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)), _start())
        squares = value.registers.reshape(rows // _ROWS, columns // _SIDE, 2)
        for row in range(rows // _ROWS):
            for column in range(columns // _SIDE):
                elements = column * down + row * across
                place = arith.addi(base, mgpu_utils.c(2 * elements, i32))
                words = [mgpu_utils.bitcast(x, i32) for x in squares[row, column]]
                store = "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [$0], {$1, $2};"
                instruct([place, *words], store, "r,r,r")

    run(ref, value)


def store_operand(ref: Ref, value: jax.Array) -> None:
    """Stores a matrix [64, 64] of 16 bits from registers that are a product's left operand, too.

    They are written in the order in which the product has them, so that none moves. Tiles have
    rows of 128 bytes.
    """
    if interpreter.is_interpreting():
        ref[...] = value
        return
    _check(ref)

    @plgpu.inline_mgpu(arg_types=(ref_type(ref), plgpu.Layout.WGMMA))
    def run(_: Any, ref: Any, value: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        (down, *_), _ = ir.MemRefType(ref.type).get_strides_and_offset()  # [8, 1, 8, 64]
        start = arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)), _start_of_rows(2 * down))
        _, columns = value.shape
        for i, four in enumerate(value.registers.reshape(columns // (2 * _SIDE), 4)):
            # Chunks are numbered with the row's number added without carry: so is what is added.
            place = arith.xori(start, mgpu_utils.c(2 * i * _CHUNK, i32))
            words = [mgpu_utils.bitcast(x, i32) for x in four]
            store = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {$1, $2, $3, $4};"
            instruct([place, *words], store, "r,r,r,r,r")

    run(ref, value)


def _check(ref: Ref) -> None:
    _, swizzle = tiling_of(ref)
    assert swizzle == _SWIZZLE, f"knows tiles of {_SWIZZLE} bytes a row; got {swizzle}"


def _start_of_rows(tile: int) -> Any:
    """Where a thread's row of the first four squares of a warp is, in bytes: two by two, by column.

    A tile has eight rows, and so many bytes.
    """
    i32 = ir.IntegerType.get_signless(32)

    def number(x: int) -> Any:
        return mgpu_utils.c(x, i32)

    lane, warp = lane_and_warp()
    row, square = arith.remui(lane, number(_SIDE)), arith.divui(lane, number(_SIDE))
    down, right = arith.remui(square, number(2)), arith.divui(square, number(2))
    chunk = arith.xori(right, row)
    start = arith.muli(arith.addi(arith.muli(warp, number(2)), down), number(tile))
    start = arith.addi(start, arith.muli(row, number(_SWIZZLE)))
    return arith.addi(start, arith.muli(chunk, number(_CHUNK)))


def _start() -> Any:
    """Where in a tile a thread's row is, in bytes: of sixteen lanes, each tells one of two squares.

    Of 64 rows a warp has sixteen, which are two chunks of each row of the tile. The number of that
    row is added to the number of a chunk without carry: that is how the tile is swizzled.
    """
    i32 = ir.IntegerType.get_signless(32)

    def number(x: int) -> Any:
        return mgpu_utils.c(x, i32)

    thread = mgpu_utils.thread_idx()
    of_warpgroup = arith.remui(thread, number(128))
    row = arith.remui(thread, number(_SIDE))
    square = arith.remui(arith.divui(thread, number(_SIDE)), number(2))
    first = arith.muli(arith.divui(of_warpgroup, number(32)), number(2))
    chunk = arith.xori(arith.addi(first, square), row)
    return arith.addi(arith.muli(row, number(_SWIZZLE)), arith.muli(chunk, number(_CHUNK)))
