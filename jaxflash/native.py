"""The Hopper kernels as a backend: with configurations of the table, a rule for vmap, gradients."""

from typing import Any

import jax

from jaxflash import tuning, xla
from jaxflash.folding import folding
from jaxflash.varying import varying_like
from pallas_kernels import hopper, spec

forward = folding(tuning.hopper_forward)
_backward = folding(hopper.backward, differentiates=True)


def backward(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
    """Gradients by the kernel where it has them, else by XLA; takes out, lse and cotangents."""
    if hopper.supports_backward(problem):
        return xla.backward(problem, operands, *rest)
    return varying_like(operands, _backward(problem, operands, *rest))
