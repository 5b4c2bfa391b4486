"""The backward: one walk, in which each tile recomputes its probabilities from the lse."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxflash.varying import varying_like
from jaxflash.xla import tiles
from pallas_kernels import spec
from pallas_kernels.spec import softmax


class Gradients(NamedTuple):
    """Sums in the compute dtype, in the layout of the walk."""

    q: Any  # [B, K, G, T, H]
    k: Any  # [B, K, S, H]
    v: Any  # [B, K, S, Hv]
    parameters: spec.ScoreParameters  # None for the ones that are not floating


class Rows(NamedTuple):
    """What the backward knows of a tile's rows."""

    dout: Any  # [B, K, G, block_q, Hv]
    lse: Any  # [B, K, G, block_q]
    delta: Any  # [B, K, G, block_q]


@functools.partial(jax.jit, static_argnums=0)
def backward(
    problem: spec.Problem,
    operands: spec.Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> spec.Operands:
    """Gradients of the floating operands; None for the others."""
    tiling = tiles.Tiling.of(problem, operands)
    delta = softmax.delta(out, lse, dout, dlse)
    of_rows = [tiles.by_group(problem, tiling.pad_rows(x, 1)) for x in (dout, lse, delta)]

    def visit(grads: Gradients, block: spec.Tiles, masked: bool) -> Gradients:
        part = tiling.part(block, masked)
        rows = Rows(*(tiling.take(x, tiles.QUERY, block) for x in of_rows))

        def add(here: Gradients) -> Gradients:
            found = _of_tile(problem, operands.dropout_seed, part, rows)
            return jax.tree.map(jnp.add, here, found)

        here = _map(lambda x, axes: tiling.take(x, axes, block), grads)
        here = tiles.if_seen(problem, part, add, here)
        return _map(lambda x, axes, y: tiling.put(x, y, axes, block), grads, here)

    grads = tiling.walk(visit, varying_like(operands, _start(tiling)))
    return _as_operands(problem, operands, grads, softmax.of_sinks(operands.sinks, lse, delta))


def _of_tile(problem: spec.Problem, seed: Any, part: tiles.Part, rows: Rows) -> Gradients:
    """What one tile adds to the gradients (FlashAttention-2, Dao 2023, algorithm 2)."""
    dout, lse, delta = rows
    if part.allowed is not None:
        seen = tiles.any_key(problem, part.allowed)
        dout = jnp.where(seen[..., None], dout, 0)
        delta = jnp.where(seen, delta, 0)
    pulls: list[Callable[..., Any]] = []

    def modify(s: jax.Array) -> jax.Array:
        modified, pull = spec.score.differentiate(problem, part.tile, s)
        pulls.append(pull)
        return modified

    s = tiles.logits(problem, part, modify)
    p = softmax.probabilities(s.reshape(*lse.shape, s.shape[-1]), lse)
    kept = tiles.dropped(problem, seed, part, p).astype(dout.dtype)
    dv = tiles.dot(problem, "bkgqs,bkgqh->bksh", kept, dout)
    dp = tiles.dot(problem, "bkgqh,bksh->bkgqs", dout, part.v)
    ds = p * (tiles.dropped(problem, seed, part, dp) - delta[..., None])
    ds, parameters = pulls[0](ds.reshape(s.shape))
    if part.allowed is not None:
        ds = jnp.where(part.allowed, ds, 0)
    ds = (ds * problem.scale).reshape(p.shape).astype(part.q.dtype)
    dq = tiles.dot(problem, "bkgqs,bksh->bkgqh", ds, part.k)
    dk = tiles.dot(problem, "bkgqs,bkgqh->bksh", ds, part.q)
    return Gradients(dq, dk, dv, parameters)


def _start(tiling: tiles.Tiling) -> Gradients:
    """Nothing summed yet."""
    slopes = tiling.operands.alibi_slopes

    def zeros(x: Any) -> Any:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.zeros(x.shape, tiling.problem.compute_dtype) if floating else None

    parameters = spec.ScoreParameters(
        bias=tiling.operands.bias,
        alibi_slope=None if slopes is None else slopes.reshape(1, -1, 1, 1),
        consts=tiling.operands.score_consts,
    )
    q, k, v = map(zeros, tiling.qkv)
    return Gradients(q, k, v, jax.tree.map(zeros, parameters))


def _map(function: Callable[..., Any], grads: Gradients, *rest: Any) -> Gradients:
    """Maps ``function(array, axes, *rest)`` over gradients."""
    bias = grads.parameters.bias
    parameters = jax.tree.map(lambda _: tiles.Axes(), grads.parameters)
    if bias is not None:
        spread = tiles.Axes(*(axis if bias.shape[axis] > 1 else None for axis in (2, 3)))
        parameters = parameters._replace(bias=spread)
    axes = Gradients(tiles.QUERY, tiles.KEY, tiles.KEY, parameters)
    return jax.tree.map(function, grads, axes, *rest)


def _as_operands(
    problem: spec.Problem, operands: spec.Operands, grads: Gradients, sinks: Any
) -> spec.Operands:
    """Gradients in the shapes and dtypes of the operands."""
    T, S = problem.T, problem.S
    bias, slopes = grads.parameters.bias, grads.parameters.alibi_slope
    if bias is not None:
        rows, keys = problem.operands.bias.shape[2:]
        bias = bias[:, :, :rows, :keys]
    found = spec.Operands(
        query=tiles.rows_first(problem, grads.q)[:, :T],
        key=grads.k.swapaxes(1, 2)[:, :S],
        value=grads.v.swapaxes(1, 2)[:, :S],
        bias=bias,
        alibi_slopes=None if slopes is None else slopes.reshape(-1),
        sinks=sinks,
        score_consts=grads.parameters.consts,
    )
    return spec.gradients(operands, found)
