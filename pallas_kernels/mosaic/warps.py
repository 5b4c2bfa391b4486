"""Who a thread is within its warpgroup, and what four of a warp exchange."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic.dialects import arith, llvm, scf


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
