"""Which tiles of the logits matter where only data tells: segments, dense masks, mask functions.

Computed by XLA before a kernel starts. Memory is that of one entry for each tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import spec
from pallas_kernels.spec import Operands, Problem


class BlockMap(NamedTuple):
    """Axes of batch and head have size 1 where they make no difference."""

    tiles: Any  # [B|1, N|1, q_blocks, kv_blocks] int32: visits, those that need a mask first
    masked: Any  # [B|1, N|1, q_blocks] int32: how many need a mask
    count: Any  # [B|1, N|1, q_blocks] int32: how many there are
    seen: Any  # [B|1, N|1, kv_blocks * block_kv] int8: keys that some row may see
    hiding: Any  # [B|1, N|1, kv_blocks] int32: whether a tile has keys that no row sees


def needs_map(problem: Problem) -> bool:
    """Whether lengths and the band do not tell everything."""
    x = problem.operands
    arrays = (x.mask, x.query_segment_ids)
    return problem.mask_mod is not None or any(a is not None for a in arrays)


def block_map(problem: Problem, x: Operands, block_q: int, block_kv: int) -> BlockMap:
    """The map of all tiles of ``block_q`` x ``block_kv`` logits."""
    elementwise = x.mask is not None or problem.mask_mod is not None
    look = _by_elements if elementwise else _by_ranges
    some, every, seen = look(problem, x, block_q, block_kv)
    partial = some & ~every
    blocks = jnp.arange(some.shape[-1], dtype=jnp.int32)
    masked, count = (jnp.sum(m, axis=-1, dtype=jnp.int32) for m in (partial, some))
    place = jnp.where(
        partial, _rank(partial), jnp.where(some, masked[..., None] + _rank(some & every), -1)
    )
    here = place[..., None, :] == blocks[:, None]  # [B|1, N|1, q_blocks, visit, tile]
    tiles = jnp.sum(jnp.where(here, blocks, 0), axis=-1, dtype=jnp.int32)
    hiding = ~jnp.all(_blocks(seen, -1, block_kv, True), axis=-1)
    return BlockMap(
        tiles,
        masked,
        count,
        _cover(seen, -1, block_kv, False).astype(jnp.int8),
        hiding.astype(jnp.int32),
    )


def _by_elements(problem: Problem, x: Operands, block_q: int, block_kv: int) -> Any:
    """Looks at every element, fused into the reductions over tiles."""
    one = _representative(problem, x)
    tile = spec.tile_of(problem, x, (0, problem.T), (0, problem.S))
    tile = tile._replace(batch=tile.batch[: one.B], head=tile.head[:, : one.N])
    allowed = spec.mask.allowed(problem, tile)
    allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], problem.T, problem.S))
    by_key = jnp.any(allowed, axis=2)

    def tiles(fill: bool) -> jax.Array:
        rows = _blocks(allowed, 2, block_q, fill)  # [B|1, N|1, q_blocks, block_q, S]
        return _blocks(rows, 4, block_kv, fill)

    return jnp.any(tiles(False), axis=(3, 5)), jnp.all(tiles(True), axis=(3, 5)), by_key


class _Sizes(NamedTuple):
    B: int
    N: int


def _representative(problem: Problem, x: Operands) -> _Sizes:
    """How many batch elements and heads differ in what a mask function is given."""
    if problem.mask_mod is None:
        return _Sizes(1, 1)
    *_, b, h, _, _ = problem.mask_mod.program.jaxpr.invars
    used = {v for e in problem.mask_mod.program.jaxpr.eqns for v in e.invars if not _literal(v)}
    return _Sizes(problem.B if b in used else 1, problem.N if h in used else 1)


def _literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _by_ranges(problem: Problem, x: Operands, block_q: int, block_kv: int) -> Any:
    """Looks at the least and the greatest segment of each tile.

    Segments between them count as there: right for documents in ascending order.
    """
    offset = problem.query_offset if x.query_offset is None else _outer(x.query_offset)
    rows = problem.T if x.query_lengths is None else _outer(x.query_lengths).clip(0, problem.T)
    keys: Any = problem.S
    if x.key_value_lengths is not None:
        keys = _outer(x.key_value_lengths).clip(0, problem.S)
    band = problem.band.shift(offset)
    q0 = jnp.arange(0, problem.T, block_q, dtype=jnp.int32)[:, None]
    k0 = jnp.arange(0, problem.S, block_kv, dtype=jnp.int32)
    q1 = jnp.maximum(jnp.minimum(q0 + block_q, rows), q0 + 1)
    reach, common = band.any_keys(q0, q1, keys), band.all_keys(q0, q1, keys)
    some = (jnp.maximum(reach[0], k0) < jnp.minimum(reach[1], k0 + block_kv)) & (q0 < rows)
    every = (common[0] <= k0) & (k0 + block_kv <= common[1])
    q_low, q_high = _extremes(x.query_segment_ids, block_q)
    k_low, k_high = _extremes(x.key_value_segment_ids, block_kv)
    q_low, q_high = q_low[:, None, :, None], q_high[:, None, :, None]
    k_low, k_high = k_low[:, None, None, :], k_high[:, None, None, :]
    some = some & (q_low <= k_high) & (k_low <= q_high)
    every = some & every & (q_low == q_high) & (k_low == k_high)
    ids = x.key_value_segment_ids[:, None, None, :]
    key = jnp.arange(problem.S, dtype=jnp.int32)
    near = (reach[0] <= key) & (key < reach[1]) & (q0 < rows)
    seen = jnp.any(near & (q_low <= ids) & (ids <= q_high), axis=2)
    return some, every, seen


def _extremes(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest segment of each tile, [B, blocks]."""
    limits = jnp.iinfo(ids.dtype)
    low = jnp.min(_blocks(ids, 1, block, limits.max), axis=-1)
    return low, jnp.max(_blocks(ids, 1, block, limits.min), axis=-1)


def _rank(which: jax.Array) -> jax.Array:
    """How many come before each, along the last axis."""
    return jnp.cumsum(which, axis=-1, dtype=jnp.int32) - 1


def _outer(x: jax.Array) -> jax.Array:
    return x[:, None, None, None]


def _cover(x: jax.Array, axis: int, block: int, fill: Any) -> jax.Array:
    """Pads an axis to whole tiles."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=fill)


def _blocks(x: jax.Array, axis: int, block: int, fill: Any) -> jax.Array:
    """Splits an axis, padded with ``fill``, into tiles."""
    axis %= x.ndim
    x = _cover(x, axis, block, fill)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
