"""The switch between compiled and interpreted kernels, and the verdict of the race detector."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

# The interpreter's own flag is read rather than kept a second time here: it is thread-local and
# part of jit's cache key, so a kernel traced for one mode is never run in the other.
from jax._src import config as jax_config

# No public module offers the race detector's verdict or the reset after a failed kernel.
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as gpu_interpreter

# Public as plgpu.InterpretGPUParams and plgpu.force_gpu_interpret_mode from JAX 0.11, here since
# 0.10.2.
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
    force_gpu_interpret_mode,
)
from jax.experimental import io_callback

_racy_kernels: list[str] = []


class RaceError(AssertionError):
    """An interpreted kernel reads or writes memory without having waited for another access."""


def is_interpreting() -> bool:
    """Whether a kernel traced now will be interpreted."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None


@contextlib.contextmanager
def interpreting(**options: Any) -> Iterator[None]:
    """Runs the kernels of this package on the CPU, watched by the race detector.

    Args:
      **options: Fields of JAX's ``InterpretGPUParams``, to override. Default: races are detected.

    Raises:
      RaceError: On leaving, if a kernel launched inside had a data race. The accesses that collide
        are printed or logged by JAX as they are found.

    Example:
      >>> with interpreting():
      ...     assert is_interpreting()
    """
    if is_interpreting():
        raise RuntimeError("interpreting() does not nest: leave the outer context first")
    _racy_kernels.clear()
    finished = False
    try:
        with force_gpu_interpret_mode(_parameters(options)):
            yield
            jax.effects_barrier()  # kernels run asynchronously; their callbacks must be done
        finished = True
    finally:
        racy = list(_racy_kernels)
        if not finished:
            racy += _abandon_failed_kernel()
        if racy:
            raise RaceError(
                f"data race in interpreted kernel {', '.join(dict.fromkeys(racy))}: see the "
                "colliding accesses reported above as RACE DETECTED, and add the missing wait"
            )


def record_races(name: str) -> None:
    """Notes, once the kernel launched just before has run, whether it had a race.

    The verdict lives until the next kernel starts. Kernels and this callback are ordered effects,
    so it is read between the two, for every kernel and not for the last one only.
    """

    def read_verdict() -> None:
        if gpu_interpreter.get_races().races_found:
            _racy_kernels.append(name)

    io_callback(read_verdict, None, ordered=True)


def _parameters(options: dict[str, Any]) -> InterpretGPUParams:
    # JAX 0.12 can raise at the first race; all versions can go on and keep the verdict.
    if any(field.name == "on_race" for field in dataclasses.fields(InterpretGPUParams)):
        options = {"on_race": "warn"} | options
    return InterpretGPUParams(**({"detect_races": True} | options))


def _abandon_failed_kernel() -> list[str]:
    """Clears the state that a kernel stopped by an error leaves behind; names it if it raced."""
    try:
        raced = gpu_interpreter.get_races().races_found
    except AssertionError:  # no kernel has started
        raced = False
    gpu_interpreter.reset_gpu_interpret_mode_state()
    return ["(stopped by an error)"] if raced else []
