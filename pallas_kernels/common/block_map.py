"""Which tiles of the logits matter where only data tells: segments, dense masks, mask functions.

Computed by XLA before a kernel starts. Memory is that of one entry for each tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec
from pallas_kernels.common.walk import Walk
from pallas_kernels.spec import Operands, Problem

# Of rows of the same segment in a tile of queries, that are looked at one by one.
_RUNS = 4


class BlockMap(NamedTuple):
    """The tiles that others visit. Axes of batch and head have size 1 where they tell nothing.

    Tiles of queries visit tiles of keys, or, where `by_key` made the map, the reverse.
    """

    # [B|1, N|1, blocks, visits] int32: the tiles in the order of visits, those that need a mask
    # first; each is twice its index, plus one if the tile of keys has some that nobody sees.
    visits: Any
    masked: Any  # [B|1, N|1, blocks] int32: how many need a mask
    count: Any  # [B|1, N|1, blocks] int32: how many there are
    # [B|1, heads|1, kv_blocks * block_kv] int8: keys that a row of the head may see, by key: a row
    # of some head of the group.
    seen: Any

    def walk(self, at: tuple[Any, ...]) -> Walk:
        """The visits of one tile; inside a kernel."""
        count, masked = self.count[at], self.masked[at]
        return Walk(
            jnp.maximum(count, 1),
            jnp.where(count > 0, masked, 1),
            lambda visit: lax.shift_right_logical(self.visits[*at, visit], 1),
            lambda visit: self.visits[*at, visit] & 1 > 0,
        )


def needs_map(problem: Problem) -> bool:
    """Whether lengths and the band do not tell everything."""
    x = problem.operands
    found = (x.mask, x.query_segment_ids, problem.mask_mod)
    return any(y is not None for y in found)


def block_map(problem: Problem, x: Operands, block_q: int, block_kv: int) -> BlockMap:
    """Which tiles of keys each tile of queries visits."""
    some, every, seen = _look(problem, x, block_q, block_kv)
    entries, masked, count = _ordered(some, every)
    hiding = jnp.broadcast_to(_hiding(seen, block_kv)[..., None, :], some.shape)
    hiding = jnp.take_along_axis(hiding, entries, axis=-1)
    return BlockMap(2 * entries + hiding, masked, count, _flags(seen, block_kv))


def by_key(problem: Problem, x: Operands, block_q: int, block_kv: int) -> BlockMap:
    """Which tiles of queries each tile of keys visits."""
    some, every, seen = _look(problem, x, block_q, block_kv)
    entries, masked, count = _ordered(some.mT, every.mT)
    if seen.shape[1] > 1:
        seen = jnp.any(seen.reshape(seen.shape[0], problem.K, problem.G, -1), axis=2)
    hiding = _hiding(seen, block_kv)
    if hiding.shape[1] > 1:
        hiding = jnp.repeat(hiding, problem.G, axis=1)
    return BlockMap(2 * entries + hiding[..., None], masked, count, _flags(seen, block_kv))


def _look(problem: Problem, x: Operands, block_q: int, block_kv: int) -> Any:
    """Whether tiles have visible elements, only visible ones; and keys that somebody sees."""
    elementwise = x.mask is not None or problem.mask_mod is not None
    return (_by_elements if elementwise else _by_ranges)(problem, x, block_q, block_kv)


def _ordered(some: jax.Array, every: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tiles of each row of tiles, those that need a mask first; how many do; how many."""
    partial, blocks = some & ~every, jnp.arange(some.shape[-1], dtype=jnp.int32)
    masked, count = (jnp.sum(m, axis=-1, dtype=jnp.int32) for m in (partial, some))
    place = jnp.where(
        partial, _rank(partial), jnp.where(some, masked[..., None] + _rank(some & every), -1)
    )
    here = place[..., None, :] == blocks[:, None]  # [B|1, N|1, blocks, visit, tile]
    return jnp.sum(jnp.where(here, blocks, 0), axis=-1, dtype=jnp.int32), masked, count


def _hiding(seen: jax.Array, block_kv: int) -> jax.Array:
    """Which tiles of keys have some that nobody sees."""
    return ~jnp.all(_blocks(seen, -1, block_kv, True), axis=-1)


def _flags(seen: jax.Array, block_kv: int) -> jax.Array:
    return _cover(seen, -1, block_kv, False).astype(jnp.int8)


def _by_elements(problem: Problem, x: Operands, block_q: int, block_kv: int) -> Any:
    """Looks at every element, fused into the reductions over tiles."""
    tile = spec.tile_of(problem, x, (0, problem.T), (0, problem.S))
    batch, head = _alike(problem)
    tile = tile._replace(batch=tile.batch[:batch], head=tile.head[:, :head])
    allowed = spec.mask.allowed(problem, tile)
    allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], problem.T, problem.S))
    by_key = jnp.any(allowed, axis=2)

    def tiles(fill: bool) -> jax.Array:
        rows = _blocks(allowed, 2, block_q, fill)  # [B|1, N|1, q_blocks, block_q, S]
        return _blocks(rows, 4, block_kv, False)  # keys that do not exist are not visible

    return jnp.any(tiles(False), axis=(3, 5)), jnp.all(tiles(True), axis=(3, 5)), by_key


def _alike(problem: Problem) -> tuple[int, int]:
    """How many batch elements and heads a mask function can tell apart."""
    if problem.mask_mod is None:
        return 1, 1
    *_, b, h, _, _ = problem.mask_mod.program.jaxpr.invars
    used = {v for e in problem.mask_mod.program.jaxpr.eqns for v in e.invars if not _literal(v)}
    return problem.B if b in used else 1, problem.N if h in used else 1


def _literal(atom: Any) -> bool:
    return hasattr(atom, "val")


def _by_ranges(problem: Problem, x: Operands, block_q: int, block_kv: int) -> Any:
    """Looks at the least and the greatest segment of each tile.

    Segments between them count as there, for tiles: right for documents in ascending order. For
    keys they do not, unless a tile of queries has many, see `_runs`.
    """
    offset = problem.query_offset if x.query_offset is None else _outer(x.query_offset)
    rows = spec.extent(_outer(x.query_lengths), problem.T)
    keys = spec.extent(_outer(x.key_value_lengths), problem.S)
    band = problem.band.shift(offset)
    q0 = jnp.arange(0, problem.T, block_q, dtype=jnp.int32)[:, None]
    k0 = jnp.arange(0, problem.S, block_kv, dtype=jnp.int32)
    q1 = jnp.maximum(jnp.minimum(q0 + block_q, rows), q0 + 1)
    some, every = spec.coverage(band, (q0, q1), (k0, k0 + block_kv), keys)
    q_low, q_high = (y[:, None, :, None] for y in _extremes(x.query_segment_ids, block_q))
    k_low, k_high = (y[:, None, None, :] for y in _extremes(x.key_value_segment_ids, block_kv))
    some = some & (q0 < rows) & (q_low <= k_high) & (k_low <= q_high)
    every = some & every & (q_low == q_high) & (k_low == k_high)
    return some, every, _seen(band, x, rows, keys, block_q)


def _seen(band: spec.Band, x: Operands, rows: Any, keys: Any, block_q: int) -> jax.Array:
    """Keys that some row sees, [B, 1, S]: each is compared with all runs of rows."""
    first, stop, low, high = _runs(x.query_segment_ids, rows, block_q)
    start, end = band.any_keys(first, jnp.maximum(stop, first + 1), keys)
    runs = jnp.broadcast_arrays(start, jnp.where(first < stop, end, 0), low, high)
    # Apart from what made them, which would be done again for each key.
    start, end, low, high = lax.optimization_barrier(runs)
    ids = x.key_value_segment_ids[:, None, None, :]
    key = jnp.arange(ids.shape[-1], dtype=jnp.int32)
    return jnp.any((start <= key) & (key < end) & (low <= ids) & (ids <= high), axis=2)


def _runs(ids: jax.Array, rows: Any, block: int) -> tuple[jax.Array, ...]:
    """Rows of a segment that follow each other in a tile: first, stop, least, greatest segment.

    Each is [B, 1, runs, 1], the runs of all tiles; a tile's last one is all that is left, with
    segments between, too.
    """
    tiles, limits = _blocks(ids, 1, block, 0), jnp.iinfo(ids.dtype)
    row = jnp.arange(tiles.shape[1] * block, dtype=jnp.int32).reshape(1, -1, block)
    begins = (tiles != jnp.roll(tiles, 1, axis=-1)).at[..., 0].set(True)
    number = jnp.minimum(jnp.cumsum(begins, axis=-1, dtype=jnp.int32) - 1, _RUNS)
    count = rows if isinstance(rows, int) else rows.reshape(-1, 1, 1)

    def found(run: int) -> tuple[jax.Array, ...]:
        mine = (number == run) & (row < count)
        first, low = (
            jnp.min(jnp.where(mine, y, limit), axis=-1)
            for y, limit in ((row, row.size), (tiles, limits.max))
        )
        stop, high = (
            jnp.max(jnp.where(mine, y, limit), axis=-1)
            for y, limit in ((row + 1, 0), (tiles, limits.min))
        )
        return first, stop, low, high

    of_runs = zip(*map(found, range(_RUNS + 1)), strict=True)
    return tuple(jnp.concatenate(y, axis=1)[:, None, :, None] for y in of_runs)


def _extremes(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest segment of each tile, [B, blocks]."""
    limits = jnp.iinfo(ids.dtype)
    low = jnp.min(_blocks(ids, 1, block, limits.max), axis=-1)
    return low, jnp.max(_blocks(ids, 1, block, limits.min), axis=-1)


def _rank(which: jax.Array) -> jax.Array:
    """How many come before each, along the last axis."""
    return jnp.cumsum(which, axis=-1, dtype=jnp.int32) - 1


def _outer(x: Any) -> Any:
    return None if x is None else x[:, None, None, None]


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
