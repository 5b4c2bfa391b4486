"""What a warp decides by itself, for the sixteen rows of a matrix that it has; and who it is."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
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

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_OF_WARP = 16


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


def lane_and_warp() -> tuple[Any, Any]:
    """Within the warpgroup, for inlined code.

    Asked for anew each time: what follows from it would be held in registers from before a loop.
    """
    i32 = ir.IntegerType.get_signless(32)
    thread = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
    lane = arith.remui(thread, mgpu_utils.c(32, i32))
    return lane, arith.remui(arith.divui(thread, mgpu_utils.c(32, i32)), mgpu_utils.c(4, i32))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For inlined code: what follows is for one thread of the warpgroup.

    Not Mosaic's own single_thread(): it keeps what it knows in a global variable, which kernels
    traced in other threads change.
    """
    one = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
    with ir.InsertionPoint(scf.IfOp(one).then_block):
        yield
        scf.yield_([])


def turned_among_four(words: Sequence[Any]) -> list[Any]:
    """Of four lanes that follow each other, with four words of 32 bits each: their matrix, turned.

    For inlined code. A lane gets the word of its own number from each, in the lanes' order.
    """
    i32 = ir.IntegerType.get_signless(32)
    lane, _ = lane_and_warp()
    words = list(words)
    for distance in (1, 2):
        bit = arith.andi(lane, mgpu_utils.c(distance, i32))
        later = arith.cmpi(arith.CmpIPredicate.ne, bit, mgpu_utils.c(0, i32))
        for i in range(len(words)):
            if i & distance:
                continue
            j = i | distance
            kept, given = (arith.select(later, words[a], words[b]) for a, b in ((j, i), (i, j)))
            got = mgpu_utils.shfl_bfly(given, distance)
            words[i] = arith.select(later, got, kept)
            words[j] = arith.select(later, kept, got)
    return words


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
