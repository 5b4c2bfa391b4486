"""The Hopper kernels as a backend: with configurations of the table, a rule for vmap, gradients."""

from typing import Any

import jax

from jaxflash import tuning, xla
from jaxflash.folding import folding
from pallas_kernels import hopper, spec

forward = folding(tuning.hopper_forward)
_backward = folding(hopper.backward, differentiates=True)


def backward(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
    """Gradients by the kernel where it has them, else by XLA; takes out, lse and cotangents."""
    chosen = xla.backward if hopper.supports_backward(problem) else _backward
    return chosen(problem, operands, *rest)
