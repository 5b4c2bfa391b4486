"""vmap of kernels: the mapped axis becomes part of the batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec

Results = tuple[jax.Array, jax.Array]
Forward = Callable[[spec.Problem, spec.Operands], Results]

# Operands whose first axis is the batch. In bias and mask it may have size 1.
_BY_BATCH = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "query_lengths",
    "key_value_lengths",
    "query_offset",
    "query_segment_ids",
    "key_value_segment_ids",
)


def folding(forward: Forward) -> Forward:
    """``forward`` with a rule for vmap.

    Where the number of a batch element matters (score_mod, mask_mod, dropout), or what has no batch
    axis is mapped (slopes, sinks), the calls run one after the other.
    """

    def folded(problem: spec.Problem, operands: spec.Operands) -> Results:
        @jax.custom_batching.custom_vmap
        def call(operands: spec.Operands) -> Results:
            return forward(problem, operands)

        @call.def_vmap
        def rule(size: int, mapped: list[spec.Operands], operands: spec.Operands) -> Any:
            (is_mapped,) = mapped
            if not _folds(problem, is_mapped):
                results = lax.map(lambda i: call(_pick(operands, is_mapped, i)), jnp.arange(size))
                return results, (True, True)
            wide = _fold(operands, is_mapped, size, problem.B)
            structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wide)
            results = folded(dataclasses.replace(problem, operands=structs), wide)
            results = tuple(x.reshape(size, problem.B, *x.shape[1:]) for x in results)
            return results, (True, True)

        results: Results = call(operands)
        return results

    return folded


def _folds(problem: spec.Problem, is_mapped: spec.Operands) -> bool:
    if problem.score_mod or problem.mask_mod or problem.dropout_rate > 0:
        return False
    others = set(is_mapped._fields) - set(_BY_BATCH)
    return not any(jax.tree.leaves([getattr(is_mapped, name) for name in others]))


def _pick(operands: spec.Operands, is_mapped: spec.Operands, i: Any) -> spec.Operands:
    return jax.tree.map(lambda x, m: x[i] if m else x, operands, is_mapped)


def _fold(operands: spec.Operands, is_mapped: spec.Operands, size: int, B: int) -> spec.Operands:
    """Operands with a batch of ``size * B``."""

    def fold(name: str) -> Any:
        x, mapped = getattr(operands, name), getattr(is_mapped, name)
        if x is None or (not mapped and name in ("bias", "mask") and x.shape[0] == 1):
            return x
        shape = x.shape[1:] if mapped else x.shape
        x = jnp.broadcast_to(x if mapped else x[None], (size, *shape))
        x = jnp.broadcast_to(x, (size, B, *shape[1:]))
        return x.reshape(size * B, *shape[1:])

    return operands._replace(**{name: fold(name) for name in _BY_BATCH})
