"""What the backward must know of each row before it visits it, by XLA."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec
from pallas_kernels.hopper.backward_kernel import TINY, BackwardConfig
from pallas_kernels.hopper.kernel import LOG2_E


def of_rows(
    p: spec.Problem,
    c: BackwardConfig,
    q_blocks: int,
    operands: spec.Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Delta, [B, T, N]; as `Refs` has them, the statistics and `empty`; and units of integers."""
    by_tile = functools.partial(_by_tile, c, q_blocks)
    norms = _norms(dout) if p.deterministic else None
    # The barrier keeps XLA from sums within the transpose, which reads column by column.
    sums = spec.softmax.sums_of_rows(out, dout, lse.dtype)
    sums, norms = lax.optimization_barrier((sums, norms))
    delta = spec.softmax.delta_of_sums(sums, lse, dlse)
    empty = lse == -math.inf
    base2 = jnp.where(empty, math.inf, lse * LOG2_E)
    filled = [(base2, math.inf), (delta, 0.0)]
    if norms is not None:
        is_number = jnp.isfinite(lse - delta) | empty
        norms = jnp.where(is_number, norms, math.nan)
        filled.append((_units(operands, delta, norms, p.dropout_rate), 0.0))
    stats = by_tile(*filled)
    flags = jnp.any(by_tile((empty, False)), axis=-1).astype(jnp.int32)
    units = stats[..., 2 * c.block_q :] if p.deterministic else None
    return delta, lax.bitcast_convert_type(stats, jnp.int32), flags, units


def _units(
    x: spec.Operands, delta: jax.Array, of_dout: jax.Array, dropout_rate: float
) -> jax.Array:
    """How many units a 1 is, such that no row of dQ exceeds 2^30 of them, [B, T, N].

    It is NaN, which no integer is, where the norm is.

    ``|dq| <= max|k| sum(p (|dp| + |delta|))``, where p sums to 1 and ``|dp| <= |dout| |v|``. Keys
    that are not finite count as none: rows that see them are no numbers anyway.
    """
    groups = x.query.shape[2] // x.key.shape[2]

    def largest(y: jax.Array) -> jax.Array:
        y = y.swapaxes(1, 2)  # XLA then writes it so, and reads rows
        found = jnp.max(jnp.where(jnp.isfinite(y), y, 0), axis=2)
        return jnp.repeat(found, groups, axis=-1)[:, None]

    keys = largest(jnp.max(jnp.abs(x.key.astype(jnp.float32)), axis=-1))
    dp = of_dout * largest(_norms(x.value)) / (1 - dropout_rate)
    limit = keys * (dp + jnp.abs(delta))
    units = jnp.where(limit > TINY, 2.0**30 / jnp.maximum(limit, TINY), 0.0)
    return jnp.where(jnp.isnan(of_dout), math.nan, units)


def _norms(x: jax.Array) -> jax.Array:
    """Of rows: [..., columns] to [...]."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def _by_tile(c: BackwardConfig, q_blocks: int, *filled: tuple[jax.Array, Any]) -> jax.Array:
    """Arrays [B, T, N], each with what fills it up, as one [B, N, q_blocks, arrays * block_q]."""
    batch, tokens, heads = filled[0][0].shape
    missing = (0, 0), (0, q_blocks * c.block_q - tokens), (0, 0)
    # As one array they are turned by one kernel.
    x = jnp.stack([jnp.pad(x, missing, constant_values=fill) for x, fill in filled], axis=1)
    x = x.reshape(batch, -1, q_blocks, c.block_q, heads).transpose(0, 4, 2, 1, 3)
    return x.reshape(batch, heads, q_blocks, -1)
