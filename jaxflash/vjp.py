"""The custom_vjp that joins a backend's forward with its backward; rings have one of their own."""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxflash.dispatch import Backend
from jaxflash.partitioning import divided_as_typed
from jaxflash.varying import varying_like
from pallas_kernels import spec
from pallas_kernels.spec.quantization import FP8

# A jax.checkpoint policy that saves these names runs no forward kernel a second time.
CHECKPOINT_NAMES = ("jaxflash_out", "jaxflash_lse")


def attention(
    backend: Backend, problem: spec.Problem, operands: spec.Operands
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] and lse [B, T, N] by ``backend``, differentiable in both."""
    found = divided_as_typed(functools.partial(attention, backend), problem, operands)
    if found is not None:
        return found
    operands = varying_like(operands, operands)
    if backend.backward is None:
        return backend.forward(problem, operands)
    return _compiled_attention(backend, problem, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    backend: Backend, problem: spec.Problem, operands: spec.Operands
) -> tuple[jax.Array, jax.Array]:
    return backend.forward(problem, operands)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Constant:
    """Names of the operands that nobody differentiates by."""

    names: frozenset[str]


def _forward(backend: Backend, problem: spec.Problem, primals: spec.Operands) -> Any:
    operands, perturbed = (
        jax.tree.map(operator.attrgetter(name), primals) for name in ("value", "perturbed")
    )
    names = [
        name for name in perturbed._fields if not any(jax.tree.leaves(getattr(perturbed, name)))
    ]
    if operands.is_quantized and len(names) < len(operands):
        raise TypeError(
            "quantised arrays have no gradients: pass 16-bit arrays and precision='fp8' instead"
        )
    results = backend.forward(problem, operands)
    out, lse = (checkpoint_name(x, n) for x, n in zip(results, CHECKPOINT_NAMES, strict=True))
    return (out, lse), (operands, out, lse, _Constant(frozenset(names)))


def _backward(
    backend: Backend, problem: spec.Problem, residuals: Any, cotangents: Any
) -> tuple[spec.Operands]:
    assert backend.backward is not None
    operands, out, lse, constant = residuals
    # Products of 8 bits are for the forward: gradients are those of the operands before.
    precision = None if problem.precision == FP8 else problem.precision
    problem = dataclasses.replace(problem, constant=constant.names, precision=precision)
    dout, dlse = (
        varying_like(operands, jnp.zeros(x.shape, x.dtype)) if isinstance(ct, SymbolicZero) else ct
        for x, ct in zip((out, lse), cotangents, strict=True)
    )
    return (backend.backward(problem, operands, out, lse, dout, dlse),)


_attention.defvjp(_forward, _backward, symbolic_zeros=True)
# Where something is traced nothing but the function itself; an eager `shard_map` cannot do without.
_compiled_attention = jax.jit(_attention, static_argnums=(0, 1), inline=True)
