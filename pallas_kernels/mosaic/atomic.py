"""Counters in global memory: that blocks take numbers from, and that tell what others have done."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import memref

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import instruct, llvm
from pallas_kernels.mosaic.memory import Ref
from pallas_kernels.mosaic.warps import one_thread


def counter() -> Ref | None:
    """A counter that all blocks of the running kernel share, zero when the kernel starts."""
    if interpreter.is_interpreting():
        return None
    # A semaphore is the one thing in global memory that Pallas zeroes before each launch.
    return pl.get_global(plgpu.SemaphoreType.REGULAR)


def counters(number: int) -> Ref:
    """So many likewise, for `count_up` and `wait_count`; not interpreted."""
    return pl.get_global(plgpu.SemaphoreType.REGULAR((number,)))


def count_up(counters: Ref, which: Any) -> None:
    """Raises a counter by one, once what this warpgroup has done or seen is there for all."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_: Any, counter: Any) -> None:
        mgpu_utils.warpgroup_barrier()
        with one_thread():  # its release covers what the barrier has shown it
            instruct(
                [mgpu_utils.memref_ptr(counter)],
                "red.release.gpu.global.add.u32 [$0], 1;",
                "l,~{memory}",
            )

    run(counters.at[which])


def wait_count(counters: Ref, which: Any, value: int) -> None:
    """Waits until a counter is as high; each thread then sees what was there for all before."""
    wait = """{
        .reg .pred p;
        .reg .u32 t;
        WAIT: ld.acquire.gpu.global.u32 t, [$0];
        setp.lt.u32 p, t, $1;
        @p bra WAIT;
    }"""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_: Any, counter: Any) -> None:
        limit = mgpu_utils.c(value, ir.IntegerType.get_signless(32))
        instruct([mgpu_utils.memref_ptr(counter), limit], wait, "l,r,~{memory}")

    run(counters.at[which])


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
        with one_thread():
            number = llvm.inline_asm(
                ir.IntegerType.get_signless(32),
                [mgpu_utils.memref_ptr(counter)],
                "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;",
                "=r,l",
                has_side_effects=True,
            )
            memref.store(number, ticket, [mgpu_utils.c(0, ir.IndexType.get())])

    take(counter, ticket)
