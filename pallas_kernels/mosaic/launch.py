"""Launching a kernel: one spelling of arguments and parameters for every JAX version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu

from pallas_kernels.mosaic import interpreter


def compiler_params(*, approx_math: bool = True, **fields: Any) -> plgpu.CompilerParams:
    """Compiler parameters of attention kernels.

    Args:
      approx_math: Use the hardware's approximate exp2, tanh, ... Default: True.
      **fields: Further fields of ``plgpu.CompilerParams``.
    """
    # JAX 0.10.2 defaults to Lane semantics, which knows none of the layouts used here.
    fields = {"lowering_semantics": plgpu.LoweringSemantics.Warpgroup} | fields
    return plgpu.CompilerParams(approx_math=approx_math, **fields)


def kernel(
    body: Callable[..., None],
    *,
    out_type: Any,
    scratch_types: Any = (),
    grid: Mapping[str, int],
    threads: tuple[str, int] | None = None,
    params: plgpu.CompilerParams | None = None,
) -> Callable[..., Any]:
    """Makes a callable that launches `body`, compiled or, under `interpreting`, interpreted.

    Args:
      body: Takes the references of operands, outputs and scratch, in this order.
      out_type: Pytree of ``jax.ShapeDtypeStruct``.
      scratch_types: Sequence or pytree of shared-memory buffers and barriers.
      grid: Axis name to number of blocks; the first axis varies fastest.
      threads: Axis name and number of warpgroups in a block. Default: one unnamed warpgroup.
      params: Default: ``compiler_params()``.

    Returns:
      A function from operands to the outputs.
    """
    thread_name, num_threads = threads or (None, None)
    launch = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        compiler_params=params or compiler_params(),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=num_threads,
        thread_name=thread_name,
    )

    def run(*operands: jax.Array) -> Any:
        outputs = launch(*operands)
        if interpreter.is_interpreting():
            interpreter.record_races(getattr(body, "__name__", repr(body)))
        return outputs

    return run
