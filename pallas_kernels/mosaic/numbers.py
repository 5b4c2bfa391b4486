"""Single numbers copied from global to shared memory while threads go on."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import instruct, llvm
from pallas_kernels.mosaic.memory import Ref
from pallas_kernels.mosaic.warps import one_thread

_BYTES = 4
_SPLAT = plgpu.Layout.WG_SPLAT


def copy_number_in(source: Ref, target: Ref, exists: jax.Array) -> None:
    """Starts the copy of a number of 32 bits; zero, and nothing is read, if it does not exist.

    `wait_numbers` waits for it.
    """
    if interpreter.is_interpreting():
        target[...] = jnp.where(exists, source[...], 0)
        return
    count = jnp.where(exists, _BYTES, 0).astype(jnp.int32)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT))
    def run(_: Any, source: Any, target: Any, count: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        place = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(target))
        with one_thread():
            instruct(
                [place, mgpu_utils.memref_ptr(source), count.registers.item()],
                f"cp.async.ca.shared.global [$0], [$1], {_BYTES}, $2;",
                "r,l,r,~{memory}",
            )

    run(source, target, count)


def wait_numbers() -> None:
    """Waits for numbers whose copies have been started; others see them after `commit_smem`."""
    if interpreter.is_interpreting():
        return

    @plgpu.inline_mgpu()
    def run(_: Any) -> None:
        instruct([], "cp.async.wait_all;", "~{memory}")

    run()
