"""The Triton kernels as a backend, if this JAX has Pallas-Triton."""

import functools
import importlib
from typing import Any

import jax

from jaxflash import xla
from jaxflash.folding import folding
from jaxflash.partitioning import partitioned
from pallas_kernels import spec


@functools.cache
def _kernels() -> tuple[Any, str | None]:
    """The package of kernels, or why it is not there."""
    try:
        return importlib.import_module("pallas_kernels.triton"), None
    except ImportError as error:  # JAX has deprecated it
        return None, f"this JAX has no Pallas-Triton: {error}"


def supports(problem: spec.Problem) -> str | None:
    """Why it cannot run a problem, or None."""
    kernels, reason = _kernels()
    return reason or kernels.supports(problem)


def forward(problem: spec.Problem, operands: spec.Operands) -> Any:
    return folding(partitioned(_kernels()[0].forward))(problem, operands)


def attend_cache(problem: spec.Problem, operands: spec.Operands) -> Any:
    """New tokens at the end of what a cache holds: few of them, or a chunk of a prompt."""
    kernels, _ = _kernels()
    few = kernels.supports_decode(problem) is None
    return folding(partitioned(kernels.decode if few else kernels.forward))(problem, operands)


def lacks_gradients(problem: spec.Problem) -> str | None:
    """Why gradients are by XLA, or None."""
    reason: str | None = _kernels()[0].supports_backward(problem)
    return reason


def backward(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
    """Gradients by the kernels where they have them, else by XLA."""
    kernels, _ = _kernels()
    if lacks_gradients(problem):
        return xla.backward(problem, operands, *rest)
    return folding(partitioned(kernels.backward), differentiates=True)(problem, operands, *rest)
