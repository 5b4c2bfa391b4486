"""Rows of few new tokens packed into one tile for each head of the keys, and parts put together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import spec


def pack(
    problem: spec.Problem, operands: spec.Operands, block_q: int
) -> tuple[spec.Problem, spec.Operands]:
    """The problem of K heads whose rows are all heads of a group at each token.

    The query is then [B, K, rows, H]. Sinks are left to the end: each takes part once, whatever the
    number of parts.
    """
    p = problem
    rows = p.T * p.G
    query = operands.query.reshape(p.B, p.T, p.K, p.G, p.H).swapaxes(1, 2)
    query = query.reshape(p.B, p.K, rows, p.H)
    slopes = by_row(p, operands.alibi_slopes)
    if slopes is not None:
        slopes = jnp.pad(slopes, ((0, 0), (0, -rows % block_q)))
    x = operands._replace(query=query, alibi_slopes=slopes, sinks=None)
    by_rows = jax.ShapeDtypeStruct((p.B, rows, p.K, p.H), p.dtype)
    packed = p.of(x._replace(query=by_rows))
    return dataclasses.replace(packed, rows_per_position=p.G), x


def by_row(problem: spec.Problem, of_heads: Any) -> Any:
    """Numbers of heads [N] as numbers of packed rows [K, rows] float32."""
    if of_heads is None:
        return None
    by_group = of_heads.astype(jnp.float32).reshape(problem.K, problem.G)
    return jnp.tile(by_group, (1, problem.T))


def unpack(problem: spec.Problem, x: jax.Array, columns: int) -> jax.Array:
    """[B, K, rows, columns] as [B, T, N, columns]."""
    p = problem
    return x.reshape(p.B, p.K, p.T, p.G, columns).swapaxes(1, 2).reshape(p.B, p.T, p.N, columns)


def merge(out: jax.Array, lse: jax.Array, sinks: Any) -> tuple[jax.Array, jax.Array]:
    """Of parts [B, K, splits, rows, Hv] the whole [B, K, rows, Hv], with sinks [K, rows]."""
    # Written out, and all of one shape, it is one kernel of elementwise operations. XLA makes
    # several of reductions, and two where a row's maximum is a smaller array.
    lse = jnp.broadcast_to(lse[..., None], out.shape)
    parts = [(out[:, :, i].astype(lse.dtype), lse[:, :, i]) for i in range(lse.shape[2])]
    m = functools.reduce(jnp.maximum, (x for _, x in parts))
    highest = m if sinks is None else jnp.maximum(m, sinks[..., None])
    base = jnp.where(highest == -jnp.inf, 0, highest)
    total = jnp.zeros_like(m) if sinks is None else jnp.exp(sinks[..., None] - base)
    acc = jnp.zeros_like(m)
    for part_out, part_lse in parts:
        weight = jnp.exp(part_lse - base)
        total += weight
        acc += jnp.where(weight > 0, weight * part_out, 0)
    lse = jnp.where(m == -jnp.inf, m, base + jnp.log(total))
    return acc / jnp.where(total == 0, 1, total), lse[..., 0]
