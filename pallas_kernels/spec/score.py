"""From ``scale * q.k`` to the logits of the softmax.

Backends differentiate ``modify`` with ``jax.vjp``: no modification has a hand-written derivative.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.spec.problem import Problem
from pallas_kernels.spec.tile import Tile, coordinates


def modify(problem: Problem, tile: Tile, s: Any) -> Any:
    """The logits of a tile; ``s`` is ``scale * q.k`` in the compute dtype.

    Bias, then the soft cap ``cap * tanh(s / cap)``, then ALiBi ``- slope * |position - key|``,
    then ``score_mod(s, batch, head, position, key)``.
    """
    parameters = tile.parameters
    if parameters.bias is not None:
        s = s + parameters.bias.astype(s.dtype)
    if problem.soft_cap is not None:
        s = problem.soft_cap * jnp.tanh(s * (1 / problem.soft_cap))
    if parameters.alibi_slope is not None:
        s = s - parameters.alibi_slope.astype(s.dtype) * distance(tile).astype(s.dtype)
    if problem.score_mod is not None:
        where = coordinates(problem, tile)
        score = s.astype(problem.compute_dtype)
        s = _all(problem.score_mod(parameters.consts, score, *where), s)
    return s


def modifies(problem: Problem) -> bool:
    """Whether logits are more than ``scale * q.k``."""
    x = problem.operands
    changes = (x.bias, x.alibi_slopes, problem.soft_cap, problem.score_mod)
    return any(change is not None for change in changes)


def distance(tile: Tile) -> Any:
    """What ALiBi's slope is multiplied with."""
    return jnp.abs(tile.position - tile.key)


def modify_with_slope(problem: Problem, tile: Tile, s: Any) -> tuple[Any, Any]:
    """``modify`` and its derivative by ``s``, element by element; None where that is 1.

    ``score_mod`` has to come with a derivative.
    """
    function = problem.score_mod
    before = dataclasses.replace(problem, score_mod=None)
    slope = None
    if problem.soft_cap is None:
        s = modify(before, tile, s)
    else:
        s, slope = jax.jvp(lambda s: modify(before, tile, s), (s,), (jnp.ones_like(s),))
    if function is None:
        return s, slope
    score = s.astype(problem.compute_dtype)
    where = coordinates(problem, tile)
    value, last = function.with_slope(tile.parameters.consts, score, *where)
    last = _all(last, s)
    return _all(value, s), last if slope is None else slope * last


def _all(found: Any, like: Any) -> Any:
    """What a function gives for each element, which need not depend on it."""
    return jnp.broadcast_to(found.astype(like.dtype), like.shape)


def differentiate(problem: Problem, tile: Tile, s: Any) -> tuple[Any, Any]:
    """``modify`` and its pullback ``ds -> (d s, d parameters)``.

    Integer parameters have None for a derivative. Others are raised to the compute dtype first, so
    that their derivatives are summed in it.
    """
    leaves, tree = jax.tree.flatten(tile.parameters)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    leaves = [x.astype(s.dtype) if is_ else x for is_, x in zip(floating, leaves, strict=True)]

    def of_floating(s: Any, varied: list[Any]) -> Any:
        values = iter(varied)
        full = [next(values) if is_ else x for is_, x in zip(floating, leaves, strict=True)]
        return modify(problem, tile._replace(parameters=jax.tree.unflatten(tree, full)), s)

    varied = [x for is_, x in zip(floating, leaves, strict=True) if is_]
    modified, pull = jax.vjp(of_floating, s, varied)

    def pull_back(ds: Any) -> tuple[Any, Any]:
        d_s, d_varied = pull(ds)
        values = iter(d_varied)
        leaves = [next(values) if is_ else None for is_ in floating]
        return d_s, jax.tree.unflatten(tree, leaves)

    return modified, pull_back
