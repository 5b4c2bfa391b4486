"""A counter in global memory that blocks take numbers from."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import memref

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import llvm, scf
from pallas_kernels.mosaic.memory import Ref


def counter() -> Ref | None:
    """A counter that all blocks of the running kernel share, zero when the kernel starts."""
    if interpreter.is_interpreting():
        return None
    # A semaphore is the one thing in global memory that Pallas zeroes before each launch.
    return pl.get_global(plgpu.SemaphoreType.REGULAR)


def take_number(
    counter: Ref | None,
    ticket: Ref,  # [1] int32 in shared memory
    step: int,
) -> None:
    """Writes the counter's value to `ticket` and raises the counter by one, in one step.

    Interpreted, when there is no order among blocks to speak of, the ticket grows by `step`.
    One warpgroup calls this; others see the ticket after it has called ``commit_smem``.
    """
    if interpreter.is_interpreting():
        ticket[0] = ticket[0] + step
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def take(_: Any, counter: Any, ticket: Any) -> None:
        # Not Mosaic's own single_thread(): it keeps what it knows in a global variable, which
        # kernels traced in other threads change.
        one = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
        with ir.InsertionPoint(scf.IfOp(one).then_block):
            number = llvm.inline_asm(
                ir.IntegerType.get_signless(32),
                [mgpu_utils.memref_ptr(counter)],
                "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;",
                "=r,l",
                has_side_effects=True,
            )
            memref.store(number, ticket, [mgpu_utils.c(0, ir.IndexType.get())])
            scf.yield_([])

    take(counter, ticket)
