"""What a warp does with the sixteen of 64 rows that it has, by itself or with the other three."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, llvm, scf, vector
from pallas_kernels.mosaic.memory import Ref

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_OF_WARP, _OF_WARPGROUP, _WARPS = 16, 64, 4
_COLUMNS_OF_TILE = 8


def maximum_if_much(old: jax.Array, new: jax.Array, much: float) -> jax.Array:
    """The larger of two entries a row, float32, where in some row of a warp it is larger by much.

    Elsewhere the old one, which is -inf where there was none.
    """
    if interpreter.is_interpreting():
        some = jnp.any((new - old > much).reshape(-1, _OF_WARP), axis=1)
        return jnp.where(jnp.repeat(some, _OF_WARP), jnp.maximum(old, new), old)
    result = plgpu.ShapeDtypeStruct(old.shape, jnp.float32, _ROWS)

    @plgpu.inline_mgpu(arg_types=(_ROWS, _ROWS), return_type=result)
    def run(_: Any, old: Any, new: Any) -> Any:
        limit = mgpu_utils.c(much, ir.F32Type.get())
        grows = [
            arith.cmpf(arith.CmpFPredicate.OGT, _scalar(x), limit)
            for x in (new - old).registers.flat
        ]
        some, larger = _any_of_warp(grows), old.max(new)
        pairs = zip(larger.registers.flat, old.registers.flat, strict=True)
        return _like(old, [arith.select(some, *pair) for pair in pairs])

    return run(old, new)


def scaled_rows(pieces: Sequence[jax.Array], factor: jax.Array) -> tuple[jax.Array, ...]:
    """Matrices, float32, whose rows are multiplied: by no instruction where a warp's are all 1."""
    if interpreter.is_interpreting():
        return tuple(x * factor[:, None] for x in pieces)
    results = tuple(
        plgpu.ShapeDtypeStruct(x.shape, jnp.float32, plgpu.Layout.WGMMA) for x in pieces
    )
    types = (_ROWS, *(plgpu.Layout.WGMMA for _ in pieces))

    @plgpu.inline_mgpu(arg_types=types, return_type=results)
    def run(_: Any, factor: Any, *pieces: Any) -> Any:
        one = mgpu_utils.c(1.0, ir.F32Type.get())
        changes = [
            arith.cmpf(arith.CmpFPredicate.UNE, _scalar(x), one) for x in factor.registers.flat
        ]
        before = [x for piece in pieces for x in piece.registers.flat]
        branch = scf.IfOp(_any_of_warp(changes), [x.type for x in before], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scaled = [x * factor.broadcast_in_dim(x.shape, (0,), x.layout) for x in pieces]
            scf.yield_([x for piece in scaled for x in piece.registers.flat])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(before)
        after = iter(branch.results)
        return tuple(_like(x, itertools.islice(after, x.registers.size)) for x in pieces)

    return run(factor, *pieces)


def over_rows(x: jax.Array, meeting: Ref, combine: Any) -> jax.Array:
    """Of each column of a matrix, float32, the largest (jnp.maximum) or the sum (jnp.add).

    Warps of one warpgroup tell each other at ``meeting``, float32 [4, columns] in shared memory. It
    may be used again once the warpgroup has met elsewhere.
    """
    if interpreter.is_interpreting():
        return functools.reduce(combine, list(x))
    operation = {jnp.maximum: arith.maximumf, jnp.add: arith.addf}[combine]
    result = plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, _COLUMNS)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)
    def run(_: Any, x: Any, meeting: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)

        def remainder(number: Any, divisor: int) -> Any:
            return arith.remui(number, mgpu_utils.c(divisor, i32))

        def index(number: Any) -> Any:
            return arith.index_cast(ir.IndexType.get(), number)

        rows, columns = x.shape
        tiles = range(columns // _COLUMNS_OF_TILE)
        # By 64 rows, eight columns, halves of a warp's rows: two neighbours of a row.
        pairs = x.registers.reshape(rows // _OF_WARPGROUP, len(tiles), 2)
        warp = remainder(mgpu_utils.warp_idx(sync=False), _WARPS)
        lane = remainder(mgpu_utils.thread_idx(), 4)  # those of the same columns are alike
        places = [
            index(arith.addi(mgpu_utils.c(tile * _COLUMNS_OF_TILE, i32), arith.addi(lane, lane)))
            for tile in tiles
        ]
        for tile, place in zip(tiles, places, strict=True):
            of_warp = functools.reduce(operation, pairs[:, tile].flat)
            vector.store(_over_lanes(of_warp, operation), meeting, [index(warp), place])
        mgpu_utils.warpgroup_barrier()
        layout = fa.WGMMA_COL_LAYOUT
        registers = np.empty(len(tiles), dtype=object)
        for tile, place in zip(tiles, places, strict=True):
            of_warps = [
                vector.load(
                    pairs[0, tile, 0].type,
                    meeting,
                    [arith.constant(ir.IndexType.get(), i), place],
                )
                for i in range(_WARPS)
            ]
            registers[tile] = functools.reduce(operation, of_warps)
        registers = registers.reshape(layout.registers_shape((columns,)))
        return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(x, meeting)


def _over_lanes(pair: Any, operation: Any) -> Any:
    """Of two neighbours of a row, what the lanes have that have the same columns."""
    for distance in (4, 8, 16):
        others = [
            mgpu_utils.shfl_bfly(
                vector.extract(pair, dynamic_position=[], static_position=[i]), distance
            )
            for i in range(2)
        ]
        pair = operation(pair, vector.from_elements(pair.type, others))
    return pair


def _like(x: Any, registers: Iterable[Any]) -> Any:
    """An array in the layout of another, float32."""
    found = np.empty(x.registers.size, dtype=object)
    for i, register in enumerate(registers):
        found[i] = register
    found = found.reshape(x.registers.shape)
    return fa.FragmentedArray(_registers=found, _layout=x.layout, _is_signed=None)


def _scalar(register: Any) -> Any:
    """Of a register with one entry."""
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=[0])


def _any_of_warp(flags: Sequence[Any]) -> Any:
    """Whether some thread of this warp has a flag that is set."""
    some = flags[0]
    for flag in flags[1:]:
        some = arith.ori(some, flag)
    i32 = ir.IntegerType.get_signless(32)
    vote = (
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff;"
        " selp.s32 $0, 1, 0, p; }"
    )
    found = llvm.inline_asm(i32, [arith.extui(i32, some)], vote, "=r,r", has_side_effects=True)
    return arith.cmpi(arith.CmpIPredicate.ne, found, mgpu_utils.c(0, i32))
