"""The Hopper kernels as a backend: with configurations, rules for vmap and meshes, gradients."""

import dataclasses
from typing import Any

import jax

from jaxflash import tuning, xla
from jaxflash.folding import folding
from jaxflash.partitioning import partitioned
from jaxflash.quantization import lowered
from jaxflash.varying import varying_like
from pallas_kernels import hopper, spec


def _forward(problem: spec.Problem, operands: spec.Operands) -> Any:
    out, lse = tuning.hopper_forward(*lowered(problem, operands, by_kernel=True))
    return out.astype(problem.dtype), lse


forward = folding(partitioned(_forward, hopper.is_interpreting))
_decode = folding(partitioned(hopper.decode, hopper.is_interpreting))
_backward = folding(partitioned(hopper.backward, hopper.is_interpreting), differentiates=True)


def attend_cache(problem: spec.Problem, operands: spec.Operands) -> Any:
    """New tokens at the end of what a cache holds: few of them, or a chunk of a prompt."""
    if operands.query_lengths is None:
        # The kernels find offsets from lengths: a subtraction less to launch.
        operands = operands._replace(query_offset=None)
        problem = problem.of(operands)
        problem = dataclasses.replace(problem, query_offset=-problem.T, from_last_key=True)
    return (forward if hopper.supports_decode(problem) else _decode)(problem, operands)


def backward(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
    """Gradients by the kernel where it has them, else by XLA; takes out, lse and cotangents."""
    if hopper.supports_backward(problem):
        return xla.backward(problem, operands, *rest)
    return varying_like(operands, _backward(problem, operands, *rest))
