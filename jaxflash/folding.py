"""vmap of kernels: the mapped axis becomes part of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec

# Takes a problem, its operands, and further arrays whose first axis is the batch. Returns a pytree
# of arrays with a first axis of the batch, or with the shapes of operands that have none.
Function = Callable[..., Any]

_BY_BATCH = [name for name, axes in spec.AXES.items() if axes.startswith("b")]


def folding(function: Function, *, differentiates: bool = False) -> Function:
    """``function`` with a rule for vmap.

    Where the number of a batch element matters (score_mod, mask_mod, dropout), or what has no batch
    axis is mapped (slopes, sinks) or could be (pages), the calls run one after the other; so they
    do where gradients for those are to be returned, or for a bias that batch elements share.
    """

    def folded(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
        @jax.custom_batching.custom_vmap
        def call(operands: spec.Operands, *rest: jax.Array) -> Any:
            return function(problem, operands, *rest)

        @call.def_vmap
        def rule(size: int, mapped: list[Any], operands: spec.Operands, *rest: jax.Array) -> Any:
            given = (operands, *rest)
            if not _folds(problem, mapped[0], differentiates):
                results = lax.map(lambda i: call(*_pick(given, mapped, i)), jnp.arange(size))
            else:
                wide = _fold(operands, mapped[0], size, problem.B)
                others = (
                    _fold_one(x, m, size, problem.B) for x, m in zip(rest, mapped[1:], strict=True)
                )
                results = folded(problem.of(wide), wide, *others)
                results = jax.tree.map(lambda x: x.reshape(size, problem.B, *x.shape[1:]), results)
            return results, jax.tree.map(lambda _: True, results)

        return call(operands, *rest)

    return folded


def _folds(problem: spec.Problem, is_mapped: spec.Operands, differentiates: bool) -> bool:
    if problem.asks_for_numbers or problem.operands.page_table is not None:
        return False
    others = set(is_mapped._fields) - set(_BY_BATCH)
    if differentiates and jax.tree.leaves([getattr(problem.operands, n) for n in others]):
        return False
    of_bias = differentiates and problem.differentiates("bias")
    if of_bias and problem.operands.bias.shape[0] == 1 and (problem.B > 1 or not is_mapped.bias):
        return False
    return not any(jax.tree.leaves([getattr(is_mapped, name) for name in others]))


def _pick(given: Any, is_mapped: Any, i: Any) -> Any:
    return jax.tree.map(lambda x, m: x[i] if m else x, tuple(given), tuple(is_mapped))


def _fold(operands: spec.Operands, is_mapped: spec.Operands, size: int, B: int) -> spec.Operands:
    """Operands with a batch of ``size * B``."""

    def fold(name: str) -> Any:
        x, mapped = getattr(operands, name), getattr(is_mapped, name)
        if x is None or (not mapped and name in ("bias", "mask") and x.shape[0] == 1):
            return x
        return _fold_one(x, mapped, size, B)

    return operands._replace(**{name: fold(name) for name in _BY_BATCH})


def _fold_one(x: jax.Array, mapped: bool, size: int, B: int) -> jax.Array:
    """An array with a batch axis of ``size * B``."""
    shape = x.shape[1:] if mapped else x.shape
    x = jnp.broadcast_to(x if mapped else x[None], (size, *shape))
    x = jnp.broadcast_to(x, (size, B, *shape[1:]))
    return x.reshape(size * B, *shape[1:])
