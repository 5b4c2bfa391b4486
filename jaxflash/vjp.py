"""The only custom_vjp of the library: it joins a backend's forward with its backward."""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxflash.dispatch import Backend
from jaxflash.varying import varying_like
from pallas_kernels import spec

# A jax.checkpoint policy that saves these names runs no forward kernel a second time.
CHECKPOINT_NAMES = ("jaxflash_out", "jaxflash_lse")


def attention(
    backend: Backend, problem: spec.Problem, operands: spec.Operands
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] and lse [B, T, N] by ``backend``, differentiable in both."""
    operands = varying_like(operands, operands)
    if backend.backward is None:
        return backend.forward(problem, operands)
    return _attention(backend, problem, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    backend: Backend, problem: spec.Problem, operands: spec.Operands
) -> tuple[jax.Array, jax.Array]:
    return backend.forward(problem, operands)


def _forward(backend: Backend, problem: spec.Problem, operands: spec.Operands) -> Any:
    results = backend.forward(problem, operands)
    out, lse = (checkpoint_name(x, n) for x, n in zip(results, CHECKPOINT_NAMES, strict=True))
    return (out, lse), (operands, out, lse)


def _backward(
    backend: Backend, problem: spec.Problem, residuals: Any, cotangents: Any
) -> tuple[spec.Operands]:
    assert backend.backward is not None
    return (backend.backward(problem, *residuals, *cotangents),)


_attention.defvjp(_forward, _backward)
