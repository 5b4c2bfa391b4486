"""The Hopper kernels as a backend: with configurations, rules for vmap and meshes, gradients."""

import dataclasses
from typing import Any

import jax

from jaxflash import tuning, xla
from jaxflash.device import target
from jaxflash.folding import folding
from jaxflash.gathering import gathering
from jaxflash.partitioning import partitioned
from jaxflash.quantization import by_xla, lowered
from jaxflash.varying import varying_like
from pallas_kernels import hopper, spec


def quantize(x: jax.Array, per: str, turned: bool, rotate: bool) -> tuple[jax.Array, jax.Array]:
    """`quantization.by_xla`, by the kernel where there is one: arrays are of one device."""
    if per != "block" or not hopper.supports_quantize(x, target(), rotate=rotate):
        return by_xla(x, per, turned, rotate)

    @jax.custom_batching.custom_vmap
    def call(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return varying_like(x, hopper.quantize(x, turned=turned, rotate=rotate))

    @call.def_vmap
    def rule(size: int, _: Any, x: jax.Array) -> Any:
        found = call(x.reshape(-1, *x.shape[2:]))
        values, scales = (y.reshape(size, -1, *y.shape[1:]) for y in found)
        return (values, scales), (True, True)

    values, scales = call(x)
    return values, scales


def _forward(problem: spec.Problem, operands: spec.Operands) -> Any:
    leave_query = hopper.rounds_queries(problem)
    low = lowered(problem, operands, quantize, leave_query=leave_query)
    out, lse = tuning.hopper_forward(*low)
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
    if hopper.supports_decode(problem) is None:
        return _decode(problem, operands)
    return (gathering(forward) if operands.has_narrow_pages else forward)(problem, operands)


lacks_gradients = hopper.supports_backward


def backward(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
    """Gradients by the kernel where it has them, else by XLA; takes out, lse and cotangents."""
    if lacks_gradients(problem):
        return xla.backward(problem, operands, *rest)
    return _backward(problem, operands, *rest)
