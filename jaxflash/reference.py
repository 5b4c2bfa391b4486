"""Dense attention in plain jnp: what every option means.

It holds the whole [T, S] matrix and is differentiated by JAX itself, so it defines the gradients
too. Every other backend is tested against it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec


def supports(problem: spec.Problem) -> str | None:
    """Everything is supported."""
    del problem
    return None


@functools.partial(jax.jit, static_argnums=(0, 2))
def forward(
    problem: spec.Problem, operands: spec.Operands, compute_dtype: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in the compute dtype.

    ``compute_dtype`` is that of logits, probabilities and sums: float32, or float64 for float64
    inputs, unless it is given. Giving bfloat16 shows what jnp attains in that precision.
    """
    dtype = problem.compute_dtype if compute_dtype is None else compute_dtype
    tile = spec.tile_of(problem, operands, (0, problem.T), (0, problem.S))
    allowed = spec.mask.allowed(problem, tile)
    query, key, value = (x.astype(dtype) for x in operands[:3])
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (problem.B, problem.N, problem.T, problem.S))
        query, key, value = _without_unseen(problem, allowed, query, key, value)
    key, value = (jnp.repeat(x, problem.G, axis=2) for x in (key, value))

    einsum = functools.partial(jnp.einsum, precision=_precision(problem))
    s = einsum("btnh,bsnh->bnts", query, key) * jnp.asarray(problem.scale, dtype)
    s = spec.score.modify(problem, tile, s)
    if allowed is not None:
        s = jnp.where(allowed, s, -jnp.inf)

    rows = spec.softmax.start((problem.B, problem.N, problem.T, problem.Hv), dtype)
    if problem.S > 0:
        rows, p = spec.softmax.update(rows, s)
        if problem.dropout_rate > 0.0:
            p = spec.dropout.apply(problem, tile, operands.dropout_seed, p)
        rows = rows._replace(acc=einsum("bnts,bsnh->bnth", p, value))
    sinks = operands.sinks
    if sinks is not None:
        sinks = sinks.astype(dtype).reshape(1, problem.N, 1)
    out, lse = spec.softmax.finish(spec.softmax.keep_nan(rows), sinks)
    return out.swapaxes(1, 2).astype(problem.dtype), lse.swapaxes(1, 2)


def _without_unseen(
    problem: spec.Problem, allowed: jax.Array, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Zeroes rows that see no key and keys that no row sees: NaN there must not spread."""
    row_sees = jnp.any(allowed, axis=3).swapaxes(1, 2)[..., None]  # [B, T, N, 1]
    by_group = allowed.reshape(problem.B, problem.K, problem.G, problem.T, problem.S)
    key_seen = jnp.any(by_group, axis=(2, 3)).swapaxes(1, 2)[..., None]  # [B, S, K, 1]
    return (
        jnp.where(row_sees, query, 0),
        jnp.where(key_seen, key, 0),
        jnp.where(key_seen, value, 0),
    )


def _precision(problem: spec.Problem) -> lax.Precision:
    return lax.Precision.HIGHEST if problem.precision is None else problem.precision
