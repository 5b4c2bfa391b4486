"""The forward: FlashAttention-3 (Shah et al. 2024, section 3) in Pallas for Mosaic GPU.

A block has one producer warpgroup, which copies tiles of K and V by TMA into a ring of stages, and
two or three consumer warpgroups, each with 64 rows of Q of its own. In each visit to a tile of keys
a consumer starts the product S = Q K^T, then O += P V of the visit before, and turns S into P while
the latter still runs. The grid is persistent: a block that is done with a tile of queries takes the
next one. The overlap does not stop there: the last product of a tile runs with the first of the
next.

Shared memory of a block:

    q_smem    [q_stages, consumers, 64, H]      filled by the producer
    k_smem    [stages, block_kv, H]             filled by the producer
    v_smem    [stages, block_kv, Hv]            filled by the producer
    out_smem  [consumers, 64, out_columns]      on its way out
    tile_smem [q_stages] int32                  which tile of queries comes next

Each stage has a barrier that says it is full, and one that says every consumer is done with it.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common.block_map import BlockMap, block_map, needs_map
from pallas_kernels.common.schedule import Schedule, Work, largest_divisor
from pallas_kernels.common.walk import Walk, of_band
from pallas_kernels.hopper import tile as tiles

ROWS = 64  # of a warpgroup's matrix product
_LOG2_E = math.log2(math.e)
# By the number of consumers: registers of a consumer's thread, and of a producer's.
_REGISTERS = {2: (240, 24), 3: (160, 32)}
# Keys and values of heads that are worked on together should stay in the L2 cache.
_L2_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of tiles and rings; measured ones are in the tuning tables."""

    consumers: int = 2  # warpgroups; a tile of queries has 64 rows of each
    block_kv: int = 128
    stages: int = 2
    q_stages: int = 2  # 1: the next tile's Q comes when this tile's scores are done
    late_wait: bool = False  # keep O += P V running during the exponentials
    fma_columns: int = 0  # of a tile of scores, whose exponential is a polynomial
    heads: int = 0

    def __post_init__(self) -> None:
        if self.consumers not in _REGISTERS:
            raise ValueError(f"consumers must be 2 or 3; got {self.consumers}")
        if self.stages < 2 or self.q_stages not in (1, 2):
            raise ValueError(f"needs stages >= 2 and 1 or 2 q_stages; got {self}")

    @property
    def block_q(self) -> int:
        return self.consumers * ROWS


class Refs(NamedTuple):
    """What the stage functions share."""

    x: spec.Operands  # in global memory
    map: BlockMap | None
    out_gmem: mosaic.Ref  # [B, T, N, Hv]
    lse_gmem: mosaic.Ref  # [B, N, T in whole tiles] float32
    q_smem: mosaic.Ref
    k_smem: mosaic.Ref
    v_smem: mosaic.Ref
    out_smem: mosaic.Ref
    tile_smem: mosaic.Ref
    ticket_smem: mosaic.Ref  # [1] int32: a number taken, the producer's own
    q_full: mosaic.Ref
    q_free: mosaic.Ref
    k_full: mosaic.Ref
    k_free: mosaic.Ref
    v_full: mosaic.Ref
    v_free: mosaic.Ref
    v_clean: mosaic.Ref


class Kernel(NamedTuple):
    """The problem at hand, and how it is cut."""

    problem: spec.Problem
    config: Config
    schedule: Schedule
    blocks: int
    refs: Refs

    def walk(self, work: Work) -> Walk:
        """The tiles of keys that a tile of queries visits."""
        c, p, x, found = self.config, self.problem, self.refs.x, self.refs.map
        if found is not None:
            at = (*_heads_of(found.count, work), work.q_block)
            count = found.count[at]
            masked = jnp.where(count > 0, found.masked[at], 1)
            return Walk(jnp.maximum(count, 1), masked, lambda visit: found.tiles[*at, visit])
        first = work.q_block * c.block_q
        rows = tiles.row_count(p, x, work.batch)
        keys = tiles.key_count(p, x, work.batch)
        if x.query_lengths is not None:
            keys = jnp.where(first < rows, keys, 0)
            rows = jnp.maximum(rows, first + 1)
        stop = jnp.minimum(first + c.block_q, rows)
        return of_band(tiles.band_of(p, x, work.batch), (first, stop), keys, c.block_kv)

    @property
    def masks(self) -> bool:
        """Whether some visit needs a mask."""
        p, x = self.problem, self.refs.x
        by_data = self.refs.map is not None or x.query_lengths is not None
        by_data = by_data or x.key_value_lengths is not None
        return by_data or not p.band.is_unbounded or p.S % self.config.block_kv != 0

    @property
    def modifies(self) -> bool:
        """Whether logits are more than ``scale * q.k``, or their order is not that of ``q.k``."""
        p, x = self.problem, self.refs.x
        arrays = x.bias is not None or x.alibi_slopes is not None
        return arrays or p.soft_cap is not None or p.score_mod is not None or p.scale <= 0

    @property
    def unit(self) -> float:
        """What turns the result of `logits` into logits to base 2."""
        return _LOG2_E if self.modifies else self.problem.scale * _LOG2_E

    @property
    def hides_keys(self) -> bool:
        """Whether there may be keys that nobody sees: their values may be NaN, and 0 NaN is NaN."""
        p, x = self.problem, self.refs.x
        if self.refs.map is not None or x.key_value_lengths is not None:
            return True
        if p.static_band is None or x.query_lengths is not None:
            return not p.band.is_unbounded
        return p.static_band.any_keys(0, p.T, p.S) != (0, p.S)


# ---------------------------------------------------------------------------- producer


def produce(k: Kernel) -> None:
    """Copies Q, K and V of each tile of this block, and says which tile it is."""
    c, r = k.config, k.refs
    block, counter = lax.axis_index("block"), mosaic.counter()

    def load(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        round_, step, tile = carry
        work = k.schedule.work(tile)
        q_stage = announce(k, round_, tile)
        for i in range(c.consumers):
            rows = pl.ds(work.q_block * c.block_q + i * ROWS, ROWS)
            q_gmem = r.x.query.at[work.batch, rows, work.head]
            mosaic.copy_gmem_to_smem(q_gmem, r.q_smem.at[q_stage, i], r.q_full.at[q_stage])
        count = produce_keys(k, work, step)
        mosaic.take_number(counter, r.ticket_smem, k.blocks)
        mosaic.commit_smem()
        return round_ + 1, step + count, k.blocks + r.ticket_smem[0]

    if mosaic.is_interpreting():
        r.ticket_smem[0] = block - k.blocks
    start = (jnp.int32(0), jnp.int32(0), block)
    rounds, steps, tile = lax.while_loop(lambda carry: carry[2] < k.schedule.tiles, load, start)
    q_stage = announce(k, rounds, tile)  # that there is none left
    for _ in range(c.consumers):
        mosaic.barrier_arrive(r.q_full.at[q_stage])
    drain(rounds + 1, c.q_stages, r.q_free)
    drain(steps, c.stages, r.k_free, r.v_free)


def announce(k: Kernel, round_: Any, tile: Any) -> Any:
    """Tells the consumers which tile comes next; returns the stage of its Q."""
    r, stage = k.refs, lax.rem(round_, k.config.q_stages)
    pl.when(round_ >= k.config.q_stages)(lambda: mosaic.barrier_wait(r.q_free.at[stage]))
    r.tile_smem[stage] = tile
    mosaic.commit_smem()
    mosaic.barrier_arrive(r.q_full.at[stage])
    return stage


def produce_keys(k: Kernel, work: Work, step: Any) -> Any:
    """Copies K and V of each visit of a tile of queries; returns how many there are."""
    c, r = k.config, k.refs
    walk, head = k.walk(work), lax.div(work.head, k.problem.G)

    def visit(j: Any, _: None) -> None:
        stage = lax.rem(step + j, c.stages)
        keys = pl.ds(walk.tile(j) * c.block_kv, c.block_kv)
        for gmem, smem, full, free in (
            (r.x.key, r.k_smem, r.k_full, r.k_free),
            (r.x.value, r.v_smem, r.v_full, r.v_free),
        ):
            used = free.at[stage]
            pl.when(step + j >= c.stages)(lambda used=used: mosaic.barrier_wait(used))
            mosaic.copy_gmem_to_smem(gmem.at[work.batch, keys, head], smem.at[stage], full.at[stage])

    lax.fori_loop(0, walk.count, visit, None)
    return walk.count


def drain(uses: Any, stages: int, *free: mosaic.Ref) -> None:
    """Waits until the stages of a ring that has had some uses are free."""

    @pl.loop(jnp.maximum(uses - stages, 0), uses)
    def _(use: Any) -> None:
        for barrier in free:
            mosaic.barrier_wait(barrier.at[lax.rem(use, stages)])


# ---------------------------------------------------------------------------- consumers


class Consumer(NamedTuple):
    """A warpgroup that computes."""

    k: Kernel
    me: Any  # which one
    acc: Any  # [64, Hv] float32 accumulator: O of the tile at hand, not normalised

    def row0(self, work: Work) -> Any:
        return work.q_block * self.k.config.block_q + self.me * ROWS

    def zero(self) -> None:
        mosaic.assign(self.acc, mosaic.full((ROWS, self.k.problem.Hv), 0, jnp.float32))


class Stats(NamedTuple):
    """Online softmax of the rows, to base 2."""

    m: jax.Array  # [64]
    l: jax.Array  # [64]

    @classmethod
    def start(cls) -> "Stats":
        return cls(*(mosaic.full((ROWS,), x, jnp.float32) for x in (-math.inf, 0)))


class Carry(NamedTuple):
    """What a visit leaves to the next."""

    stats: Stats
    p: jax.Array  # [64, block_kv], yet to be multiplied with its values
    kv_block: Any  # where those are, if there may be hidden ones


def consume(k: Kernel) -> None:
    """Computes 64 rows of each tile of this block."""

    def over_tiles(acc: Any) -> None:
        c = Consumer(k, lax.axis_index("warpgroup"), acc)

        def attend(state: Any) -> Any:
            round_, step, tile, carry = state
            work = k.schedule.work(tile)
            carry, step = visit_rest(c, work, round_, step, carry)
            tile, carry = turn(c, work, round_ + 1, step, carry)
            return round_ + 1, step, tile, carry

        zero = jnp.int32(0)
        tile = next_tile(k, zero)
        carry = begin(c, k.schedule.work(tile))
        more = lambda state: state[2] < k.schedule.tiles
        rounds, *_ = mosaic.while_loop(more, attend, (zero, zero, tile, carry), acc)
        mosaic.barrier_arrive(k.refs.q_free.at[lax.rem(rounds, k.config.q_stages)])

    mosaic.fresh_accumulators(over_tiles, (ROWS, k.problem.Hv))
    mosaic.wait_smem_to_gmem(0)


def next_tile(k: Kernel, round_: Any) -> Any:
    """Waits for the Q of a round; returns which tile it is, or one beyond the last."""
    stage = lax.rem(round_, k.config.q_stages)
    mosaic.barrier_wait(k.refs.q_full.at[stage])
    return k.refs.tile_smem[stage]


def begin(c: Consumer, work: Work) -> Carry:
    """The first visit of this block."""
    k, r = c.k, c.k.refs
    visit = Visit.of(c, work, 0, k.masks)
    mosaic.barrier_wait(r.k_full.at[0])
    s = mosaic.matmul(r.q_smem.at[0, c.me], r.k_smem.at[0], transpose_b=True)
    mosaic.barrier_arrive(r.k_free.at[0])
    c.zero()
    stats, _, p = visit.softmax(Stats.start(), s)
    wait_early(k, k.walk(work).count > 1, jnp.int32(1))
    return visit.carry(stats, p.astype(k.problem.dtype))


def visit_rest(c: Consumer, work: Work, round_: Any, step: Any, carry: Carry) -> tuple[Carry, Any]:
    """All visits of a tile of queries but the first; those that need a mask come first."""
    k, r = c.k, c.k.refs
    walk, q_stage = k.walk(work), lax.rem(round_, k.config.q_stages)

    def visits(masked: bool) -> Any:
        def one(j: Any, carry: Carry) -> Carry:
            stage, before = (lax.rem(step + i, k.config.stages) for i in (j, j - 1))
            visit = Visit.of(c, work, j, masked)
            if not k.config.late_wait:
                mosaic.barrier_wait(r.k_full.at[stage])
            wait_for_values(c, carry, work, before)
            s = start_products(c, q_stage, stage, carry, before)
            mosaic.barrier_arrive(r.k_free.at[stage])
            # The barrier keeps ptxas from taking P for the product that is still running.
            found = lax.optimization_barrier(visit.softmax(carry.stats, s))
            stats, decay, p = found
            wait_early(k, j + 1 < walk.count, step + j + 1)
            out = mosaic.peek(c.acc)
            mosaic.barrier_arrive(r.v_free.at[before])
            mosaic.assign(c.acc, out * mosaic.spread_rows(decay, out.shape))
            return visit.carry(stats, p.astype(k.problem.dtype))

        return one

    first: Any = 1
    if k.masks:
        first = jnp.maximum(walk.masked, 1)
        carry = mosaic.fori_loop(1, first, visits(masked=True), carry, c.acc)
    carry = mosaic.fori_loop(first, walk.count, visits(masked=False), carry, c.acc)
    mosaic.barrier_arrive(r.q_free.at[q_stage])
    return carry, step + walk.count


def turn(c: Consumer, work: Work, round_: Any, step: Any, carry: Carry) -> tuple[Any, Carry]:
    """The last O += P V of a tile, with the first visit of the next one.

    After the last tile S is computed of what lies in shared memory, and thrown away.
    """
    k, r = c.k, c.k.refs
    stage, before = (lax.rem(i, k.config.stages) for i in (step, step - 1))
    wait_for_values(c, carry, work, before)
    tile, s = start_turn(c, round_, stage, carry, before)
    more = tile < k.schedule.tiles
    pl.when(more)(lambda: mosaic.barrier_arrive(r.k_free.at[stage]))
    following = k.schedule.work(jnp.minimum(tile, k.schedule.tiles - 1))
    visit = Visit.of(c, following, 0, k.masks)
    stats, _, p = visit.softmax(Stats.start(), s)
    stats, p = lax.optimization_barrier((stats, p))
    wait_early(k, more & (k.walk(following).count > 1), step + 1)
    out = mosaic.peek(c.acc)
    p = lax.optimization_barrier(p.astype(k.problem.dtype))  # frees registers for `finish`
    mosaic.barrier_arrive(r.v_free.at[before])
    finish(c, work, carry.stats, out)
    c.zero()
    return tile, visit.carry(stats, p)


def start_turn(c: Consumer, round_: Any, stage: Any, carry: Carry, before: Any) -> tuple[Any, Any]:
    """`start_products` of a turn, where the next Q may be on its way."""
    k, r = c.k, c.k.refs
    q_stage = lax.rem(round_, k.config.q_stages)

    def wait_for_scores() -> Any:
        tile = next_tile(k, round_)
        more = tile < k.schedule.tiles
        pl.when(more)(lambda: mosaic.barrier_wait(r.k_full.at[stage]))
        return tile

    if k.config.q_stages > 1:
        tile = wait_for_scores()
        return tile, start_products(c, q_stage, stage, carry, before)

    def body(s_acc: Any) -> tuple[Any, Any]:
        mosaic.issue(c.acc, carry.p, r.v_smem.at[before])
        tile = wait_for_scores()
        mosaic.issue(s_acc, r.q_smem.at[q_stage, c.me], r.k_smem.at[stage], transpose_b=True)
        return tile, mosaic.peek(s_acc)

    return mosaic.fresh_accumulators(body, (ROWS, k.config.block_kv))


def start_products(c: Consumer, q_stage: Any, stage: Any, carry: Carry, before: Any) -> jax.Array:
    """Starts S = Q K^T and O += P V; returns S while the latter runs."""
    r = c.k.refs

    def body(s_acc: Any) -> jax.Array:
        mosaic.issue(s_acc, r.q_smem.at[q_stage, c.me], r.k_smem.at[stage], transpose_b=True)
        mosaic.issue(c.acc, carry.p, r.v_smem.at[before])
        return mosaic.peek(s_acc, in_flight=1)

    return mosaic.fresh_accumulators(body, (ROWS, c.k.config.block_kv))


def wait_early(k: Kernel, more: Any, step: Any) -> None:
    """Waits for the next K before the product that runs has ended.

    The jump in here stops ptxas from moving the wait for that product above the exponentials.
    """
    if k.config.late_wait:
        stage = lax.rem(step, k.config.stages)
        pl.when(more)(lambda: mosaic.barrier_wait(k.refs.k_full.at[stage]))


def wait_for_values(c: Consumer, carry: Carry, work: Work, stage: Any) -> None:
    """Waits for V; zeroes the rows of keys that nobody sees."""
    k, r = c.k, c.k.refs
    mosaic.barrier_wait(r.v_full.at[stage])
    if not k.hides_keys:
        return
    p, x = k.problem, r.x
    key0 = carry.kv_block * k.config.block_kv
    keys = tiles.key_count(p, x, work.batch)
    start, stop = tiles.band_of(p, x, work.batch).any_keys(
        0, tiles.row_count(p, x, work.batch), keys
    )
    stop = jnp.where(stop == p.S, key0 + k.config.block_kv, stop)  # TMA has zeroed what lies beyond
    hiding = (key0 < start) | (key0 + k.config.block_kv > stop)
    if r.map is not None:
        hiding |= r.map.hiding[*_heads_of(r.map.hiding, work), carry.kv_block] > 0

    def clean(i: int) -> None:
        rows = r.v_smem.at[stage, pl.ds(i * ROWS, ROWS)]
        first = key0 + i * ROWS
        for columns in _split(p.Hv):
            part = rows.at[:, columns]
            key = first + mosaic.iota((ROWS, columns.size), 0)
            seen = (start <= key) & (key < stop)
            if r.map is not None:
                at = _heads_of(r.map.seen, work)
                flags = mosaic.load_rows(r.map.seen.at[*at, pl.ds(first, ROWS)])
                seen &= mosaic.spread_rows(flags.astype(jnp.int32), key.shape) > 0
            value = mosaic.load_matrix(part)
            mosaic.store(part, jnp.where(seen, value, jnp.zeros((), value.dtype)))

    @pl.when(hiding)
    def _() -> None:
        for i in range(k.config.block_kv // ROWS):
            pl.when(c.me == i % k.config.consumers)(lambda i=i: clean(i))
        mosaic.commit_smem()
        mosaic.barrier_arrive(r.v_clean)
        mosaic.barrier_wait(r.v_clean)


def _split(columns: int) -> list[Any]:
    """Slices of a swizzle's width."""
    width = mosaic.swizzle_columns(columns)
    return [pl.ds(i, width) for i in range(0, columns, width)]


class Visit(NamedTuple):
    """A tile of scores, and what the operands say of it."""

    k: Kernel
    masked: bool
    tile: spec.Tile | None  # if something depends on it
    key0: Any
    kv_block: Any

    @classmethod
    def of(cls, c: Consumer, work: Work, number: Any, masked: bool) -> "Visit":
        k = c.k
        placed = masked or k.modifies or k.problem.dropout_rate > 0
        if not placed and not k.hides_keys:
            return cls(k, masked, None, None, None)
        kv_block = k.walk(work).tile(number)
        if not placed:
            return cls(k, masked, None, None, kv_block)
        # Opaque, so that what depends on it is not computed before the loop, to be held there.
        row0, key0 = lax.optimization_barrier((c.row0(work), kv_block * k.config.block_kv))
        shape = (ROWS, k.config.block_kv)
        tile = tiles.tile_of(k.problem, k.refs.x, work, row0, key0, shape, masked)
        return cls(k, masked, tile, key0, kv_block)

    def carry(self, stats: Stats, p: jax.Array) -> Carry:
        return Carry(stats, p, jnp.int32(self.kv_block) if self.k.hides_keys else None)

    def softmax(self, stats: Stats, s: jax.Array) -> tuple[Stats, jax.Array, jax.Array]:
        """Takes scores into the statistics; returns the decay of what came before, and P."""
        k, problem = self.k, self.k.problem
        s = self.logits(s)
        m = jnp.maximum(stats.m, jnp.max(s, axis=1) * k.unit)
        base = jnp.where(m == -math.inf, 0.0, m) if self.masked or k.modifies else m
        decay = jnp.exp2(stats.m - base)
        p = exp2(s * k.unit - mosaic.spread_rows(base, s.shape), k.config.fma_columns)
        stats = Stats(m, stats.l * decay + jnp.sum(p, axis=1))
        if problem.dropout_rate > 0:
            assert self.tile is not None
            seed = k.refs.x.dropout_seed
            p = spec.dropout.apply(problem, self.tile, (seed[0], seed[1]), p)
        return stats, decay, p

    def logits(self, s: jax.Array) -> jax.Array:
        """-inf where hidden, and otherwise logits when multiplied by ``k.unit``."""
        problem = self.k.problem
        if self.k.modifies:
            assert self.tile is not None
            s = spec.score.modify(problem, self.tile, s * problem.scale)
        if self.masked:
            assert self.tile is not None
            allowed = tiles.allowed(problem, self.tile, self.key0)
            s = s if allowed is None else jnp.where(allowed, s, -math.inf)
        return s


def exp2(x: jax.Array, fma_columns: int) -> jax.Array:
    """2^x, for some columns by arithmetic alone, which leaves the unit of exp2 to the others.

    FlashAttention-4's idea: 2^x = 2^n 2^f with n = round(x); 2^f by a polynomial of degree 3 whose
    relative error is 1e-4, far below that of rounding P to 16 bits.
    """
    if not fma_columns or mosaic.is_interpreting():
        return jnp.exp2(x)
    here, rest = x[:, :fma_columns], x[:, fma_columns:]
    here = jnp.maximum(here, -126.0)
    magic = jnp.float32(1.5 * 2**23)  # x + magic has round(x) in its last bits
    shifted = here + magic
    f = here - (shifted - magic)
    power = jnp.float32(0.05500893) * f + jnp.float32(0.24221096)
    power = (power * f + jnp.float32(0.69328293)) * f + jnp.float32(1)
    exponent = lax.bitcast_convert_type(shifted, jnp.int32) << 23
    bits = lax.bitcast_convert_type(power, jnp.int32) + exponent
    return jnp.concatenate([lax.bitcast_convert_type(bits, jnp.float32), jnp.exp2(rest)], axis=1)


def finish(c: Consumer, work: Work, stats: Stats, out: jax.Array) -> None:
    """Normalises and stores a tile's rows of O and of the lse."""
    k, r, x = c.k, c.k.refs, c.k.refs.x
    row0 = c.row0(work)
    m, total = stats
    seen = m != -math.inf
    if x.query_lengths is not None:
        count = tiles.row_count(k.problem, x, work.batch)
        seen &= mosaic.row_iota(ROWS) < count - row0
    factor = jnp.where(seen, 1.0, 0.0)
    m = jnp.where(seen, m, 0.0)
    if x.sinks is not None:
        sink = x.sinks[work.head].astype(jnp.float32) * _LOG2_E
        higher = jnp.maximum(m, sink)
        factor = factor * jnp.exp2(m - higher)
        total = total * factor + jnp.exp2(sink - higher)
        m = higher
    total = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, (m + jnp.log2(total)) / _LOG2_E, -math.inf)
    mosaic.store(r.lse_gmem.at[work.batch, work.head, pl.ds(row0, ROWS)], lse, optimized=False)
    width = r.out_smem.shape[-1]
    factor = mosaic.spread_rows(factor / total, (ROWS, width))
    for i in range(0, k.problem.Hv, width):
        part = (out if width == k.problem.Hv else out[:, i : i + width]) * factor
        if x.query_lengths is not None:  # rows beyond may hold NaN
            part = jnp.where(factor > 0, part, 0.0)
        mosaic.wait_smem_to_gmem(0, wait_read_only=True)
        mosaic.store(r.out_smem.at[c.me], part.astype(k.problem.dtype))
        mosaic.commit_smem()
        rows = r.out_gmem.at[work.batch, pl.ds(row0, ROWS), work.head, pl.ds(i, width)]
        mosaic.copy_smem_to_gmem(r.out_smem.at[c.me], rows)


def _heads_of(array: mosaic.Ref, work: Work) -> tuple[Any, Any]:
    """Where an array [B|1, N|1, ...] speaks of a tile."""
    batch = work.batch if array.shape[0] > 1 else 0
    return batch, work.head if array.shape[1] > 1 else 0


# ---------------------------------------------------------------------------- host


def forward(
    problem: spec.Problem,
    operands: spec.Operands,
    config: Config | None = None,
    blocks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in float32.

    Args:
      problem: What `supports` accepts.
      operands: Its arrays.
      config: Default: the one measured to be the fastest for problems like this.
      blocks: Size of the grid. Default: one for each multiprocessor.
    """
    c = config or Config()
    H, Hv = (-(-h // _HEAD_STEP) * _HEAD_STEP for h in (problem.H, problem.Hv))
    x = operands._replace(
        query=_widen(operands.query, H),
        key=_widen(operands.key, H),
        value=_widen(operands.value, Hv),
    )
    q_blocks, kv_blocks = pl.cdiv(problem.T, c.block_q), pl.cdiv(problem.S, c.block_kv)
    found = block_map(problem, operands, c.block_q, c.block_kv) if needs_map(problem) else None
    x = tiles.prepare(problem, x, q_blocks * c.block_q, kv_blocks * c.block_kv)
    p = dataclasses.replace(
        tiles.in_kernel(problem),
        operands=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x),
    )
    heads = 1
    if not p.band.is_unbounded:
        of_kv_head = p.S * (p.H + p.Hv) * p.dtype.itemsize
        heads = largest_divisor(p.B * p.N, max(1, _L2_BYTES // of_kv_head) * p.G)
    if c.heads:
        heads = largest_divisor(p.B * p.N, c.heads)
    schedule = Schedule(p.B, p.N, q_blocks, heads)
    blocks = min(blocks or 132, schedule.tiles)
    leaves, tree = jax.tree.flatten((x, found))

    def forward_kernel(*refs: mosaic.Ref) -> None:
        inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
        k = Kernel(p, c, schedule, blocks, Refs(*inputs, *refs[len(leaves) :]))
        of_consumer, of_producer = _REGISTERS[c.consumers]

        @pl.when(lax.axis_index("warpgroup") < c.consumers)
        def _() -> None:
            mosaic.set_max_registers(of_consumer, action="increase")
            consume(k)

        @pl.when(lax.axis_index("warpgroup") == c.consumers)
        def _() -> None:
            mosaic.set_max_registers(of_producer, action="decrease")
            produce(k)

    launch = mosaic.kernel(
        forward_kernel,
        out_type=[
            jax.ShapeDtypeStruct((p.B, p.T, p.N, p.Hv), p.dtype),
            jax.ShapeDtypeStruct((p.B, p.N, q_blocks * c.block_q), jnp.float32),
        ],
        scratch_types=_scratch(p, c),
        grid={"block": blocks},
        threads=("warpgroup", c.consumers + 1),
        # No reduction crosses warps: a row is within one.
        params=mosaic.compiler_params(reduction_scratch_bytes=0),
    )
    out, lse = launch(*leaves)
    return out[..., : problem.Hv], lse[:, :, : p.T].swapaxes(1, 2)


_HEAD_STEP = 16  # a matrix product takes so many columns at once


def _widen(x: jax.Array, columns: int) -> jax.Array:
    """Pads head dims that no swizzle fits."""
    if x.shape[-1] == columns:
        return x
    return jnp.pad(x, [(0, 0)] * 3 + [(0, columns - x.shape[-1])])


def _out_columns(p: spec.Problem) -> int:
    """All of a row of O, or half of it where shared memory is short."""
    return p.Hv if p.Hv <= 128 else p.Hv // 2


def _scratch(p: spec.Problem, c: Config) -> list[Any]:
    """In the order of `Refs`."""
    full, free = mosaic.Barrier, mosaic.Barrier
    return [
        mosaic.tiled_smem((c.q_stages, c.consumers, ROWS, p.H), p.dtype),
        mosaic.tiled_smem((c.stages, c.block_kv, p.H), p.dtype),
        mosaic.tiled_smem((c.stages, c.block_kv, p.Hv), p.dtype),
        mosaic.tiled_smem((c.consumers, ROWS, _out_columns(p)), p.dtype),
        mosaic.SMEM((c.q_stages,), jnp.int32),
        mosaic.SMEM((1,), jnp.int32),
        full(num_barriers=c.q_stages, num_arrivals=c.consumers + 1),
        free(num_barriers=c.q_stages, num_arrivals=c.consumers),
        full(num_barriers=c.stages),
        free(num_barriers=c.stages, num_arrivals=c.consumers),
        full(num_barriers=c.stages),
        free(num_barriers=c.stages, num_arrivals=c.consumers),
        mosaic.Barrier(num_arrivals=c.consumers),
    ]


def supports(problem: spec.Problem) -> str | None:
    """Why these kernels cannot run a problem, or None."""
    return None
