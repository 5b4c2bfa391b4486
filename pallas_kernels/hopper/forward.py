"""The forward: FlashAttention-3 (Shah et al. 2024, section 3) in Pallas for Mosaic GPU.

A block has one producer warpgroup, which copies tiles of K and V by TMA into a ring of stages, and
two to four consumer warpgroups, each with 64 rows of Q of its own. In each visit to a tile of keys
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
# By the number of consumers: registers of a consumer's thread, and of a producer's, which needs
# more where it has values to clean. All must fit into what the block is launched with.
_REGISTERS = {2: ((240, 24), (232, 40)), 3: ((160, 32), (152, 56)), 4: ((112, 32), (104, 64))}
_SMEM_BYTES = 227 * 1024
_SMEM_REST = 2304  # numbers and barriers; each buffer starts at a multiple of 1024
# Rows and columns of the smallest tiles that TMA copies in the form that matrix products take.
_STEPS = (8, 16)
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

    def __post_init__(self) -> None:
        if self.consumers not in _REGISTERS:
            raise ValueError(f"consumers must be one of {list(_REGISTERS)}; got {self.consumers}")
        if self.stages < 2 or self.q_stages not in (1, 2):
            raise ValueError(f"needs stages >= 2 and 1 or 2 q_stages; got {self}")

    @property
    def block_q(self) -> int:
        return self.consumers * ROWS

    @classmethod
    def default(cls, problem: spec.Problem) -> "Config":
        """The fastest of those measured (bench/LOG.md), by head dim, mask and length."""
        wide, band = max(problem.H, problem.Hv), problem.band
        plain = not (modifies(problem) or problem.masks_by_data or problem.dropout_rate)
        if wide > 128:
            return cls(q_stages=1) if problem.Hv <= 128 else cls(block_kv=64, q_stages=1)
        if wide <= 64 and plain and band.is_unbounded:
            short = problem.S < 2048
            return cls(consumers=4, block_kv=64, stages=4) if short else cls(consumers=3)
        if wide <= 64 and plain and band.lo is None and problem.S >= 4096:
            return cls(consumers=3)
        return cls(stages=4 if wide <= 64 else 2, late_wait=modifies(problem))

    def value_columns(self, Hv: int) -> int:
        """Width of the tiles of V; a product takes as many columns of P at a time."""
        return mosaic.swizzle_columns(math.gcd(Hv, self.block_kv))

    def smem_bytes(self, H: int, Hv: int, out_columns: int) -> int:
        """Of rings and staging, for 16-bit elements."""
        rows = self.q_stages * self.block_q * H + self.block_q * out_columns
        return 2 * (rows + self.stages * self.block_kv * (H + Hv))

    def out_columns(self, H: int, Hv: int) -> int | None:
        """How much of a row of O is stored at once: all, or what shared memory has room for."""
        for columns in (Hv, Hv // 2, 64):
            fits = self.smem_bytes(H, Hv, columns) + _SMEM_REST <= _SMEM_BYTES
            if fits and Hv % columns == 0 and columns % _STEPS[1] == 0:
                return columns
        return None


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
    v_raw: mosaic.Ref  # V has arrived, with rows in it that are to be zeroed


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
        return modifies(self.problem)

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


def modifies(problem: spec.Problem) -> bool:
    """Whether logits are more than ``scale * q.k``, or their order is not that of ``q.k``."""
    x = problem.operands
    options = (x.bias, x.alibi_slopes, problem.soft_cap, problem.score_mod)
    return any(option is not None for option in options) or problem.scale <= 0


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
        return round_ + 1, step + count, k.blocks + mosaic.uniform(r.ticket_smem[0])

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
        stage, kv_block = lax.rem(step + j, c.stages), walk.tile(j)
        keys = pl.ds(kv_block * c.block_kv, c.block_kv)
        again = step + j >= c.stages
        pl.when(again)(lambda: mosaic.barrier_wait(r.k_free.at[stage]))
        k_gmem, v_gmem = (x.at[work.batch, keys, head] for x in (r.x.key, r.x.value))
        mosaic.copy_gmem_to_smem(k_gmem, r.k_smem.at[stage], r.k_full.at[stage])
        pl.when(again)(lambda: mosaic.barrier_wait(r.v_free.at[stage]))
        produce_values(k, work, kv_block, v_gmem, stage)

    lax.fori_loop(0, walk.count, visit, None)
    return walk.count


def produce_values(k: Kernel, work: Work, kv_block: Any, v_gmem: mosaic.Ref, stage: Any) -> None:
    """Copies a tile of V, and zeroes the rows of keys that nobody sees."""
    r, v_smem = k.refs, k.refs.v_smem.at[stage]
    if not k.hides_keys:
        mosaic.copy_gmem_to_smem(v_gmem, v_smem, r.v_full.at[stage])
        return
    hidden = Hidden.of(k, work, kv_block)

    @pl.when(~hidden.some)
    def _() -> None:
        mosaic.copy_gmem_to_smem(v_gmem, v_smem, r.v_full.at[stage])

    @pl.when(hidden.some)
    def _() -> None:
        mosaic.copy_gmem_to_smem(v_gmem, v_smem, r.v_raw)
        mosaic.barrier_wait(r.v_raw)
        width = k.config.value_columns(k.problem.Hv)
        for row in range(0, k.config.block_kv, ROWS):
            for column in range(0, k.problem.Hv, width):
                part = v_smem.at[pl.ds(row, ROWS), pl.ds(column, width)]
                values = mosaic.load_matrix(part)
                seen = hidden.others(row, values.shape)
                mosaic.store(part, jnp.where(seen, values, jnp.zeros((), values.dtype)))
        mosaic.commit_smem()
        mosaic.barrier_arrive(r.v_full.at[stage])


class Hidden(NamedTuple):
    """Which keys of a tile nobody sees."""

    some: Any  # whether there are any
    key0: Any
    start: Any  # keys before are hidden
    stop: Any  # this and those after are hidden
    flags: Any  # [keys] int8, zero where hidden; or None

    @classmethod
    def of(cls, k: Kernel, work: Work, kv_block: Any) -> "Hidden":
        p, x, found = k.problem, k.refs.x, k.refs.map
        key0, block_kv = kv_block * k.config.block_kv, k.config.block_kv
        rows = tiles.row_count(p, x, work.batch)
        keys = tiles.key_count(p, x, work.batch)
        start, stop = tiles.band_of(p, x, work.batch).any_keys(0, rows, keys)
        beyond = jnp.where(stop == p.S, p.S + block_kv, stop)  # TMA has zeroed what lies beyond S
        some = (key0 < start) | (key0 + block_kv > beyond)
        if found is None:
            return cls(some, key0, start, stop, None)
        some |= found.hiding[*_heads_of(found.hiding, work), kv_block] > 0
        return cls(some, key0, start, stop, found.seen.at[*_heads_of(found.seen, work)])

    def others(self, row: int, shape: tuple[int, ...]) -> jax.Array:
        """Which elements of a part of V belong to keys that somebody sees."""
        first = self.key0 + row
        key = first + mosaic.iota(shape, 0)
        seen = (self.start <= key) & (key < self.stop)
        if self.flags is not None:
            flags = mosaic.load_rows(self.flags.at[pl.ds(first, shape[0])])
            seen &= mosaic.spread_rows(flags.astype(jnp.int32), shape) > 0
        return seen


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


def consume(k: Kernel) -> None:
    """Computes 64 rows of each tile of this block."""

    def over_tiles(acc: Any) -> None:
        c = Consumer(k, lax.axis_index("warpgroup"), acc)

        def attend(state: Any) -> Any:
            round_, step, tile, carry = state
            work = k.schedule.work(tile)
            carry, step = visit_rest(c, work, round_, step, carry)
            work = k.schedule.work(mosaic.opaque(tile))  # computed again rather than held
            tile, carry = turn(c, work, round_ + 1, step, carry)
            return round_ + 1, step, tile, carry

        zero = jnp.int32(0)
        tile, work = next_tile(k, zero)
        carry = begin(c, work, zero, zero)
        state = (zero, zero, tile, carry)
        rounds, *_ = mosaic.while_loop(
            lambda state: state[2] < k.schedule.tiles, attend, state, acc
        )
        mosaic.barrier_arrive(k.refs.q_free.at[lax.rem(rounds, k.config.q_stages)])

    mosaic.fresh_accumulators(over_tiles, (ROWS, k.problem.Hv))
    mosaic.wait_smem_to_gmem(0)


def next_tile(k: Kernel, round_: Any) -> tuple[Any, Work]:
    """Waits for the Q of a round; returns which tile it is, beyond the last if there is none."""
    stage = lax.rem(round_, k.config.q_stages)
    mosaic.barrier_wait(k.refs.q_full.at[stage])
    tile = mosaic.uniform(k.refs.tile_smem[stage])
    return tile, k.schedule.work(jnp.minimum(tile, k.schedule.tiles - 1))


def begin(c: Consumer, work: Work, round_: Any, step: Any, exists: Any = True) -> Carry:
    """The first visit of a tile of queries, alone.

    If there is no such tile, S is computed of what lies in shared memory, to be thrown away.
    """
    k, r = c.k, c.k.refs
    q_stage, stage = lax.rem(round_, k.config.q_stages), lax.rem(step, k.config.stages)
    visit = Visit.of(c, work, 0, k.masks)
    pl.when(exists)(lambda: mosaic.barrier_wait(r.k_full.at[stage]))
    s = mosaic.matmul(r.q_smem.at[q_stage, c.me], r.k_smem.at[stage], transpose_b=True)
    pl.when(exists)(lambda: mosaic.barrier_arrive(r.k_free.at[stage]))
    c.zero()
    stats, _, p = visit.softmax(Stats.start(), s)
    wait_early(k, exists & (k.walk(work).count > 1), step + 1)
    return Carry(stats, p.astype(k.problem.dtype))


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
            mosaic.barrier_wait(r.v_full.at[before])
            s = start_products(c, q_stage, stage, carry, before)
            mosaic.barrier_arrive(r.k_free.at[stage])
            # The barrier keeps ptxas from taking P for the product that is still running.
            found = lax.optimization_barrier(visit.softmax(carry.stats, s))
            stats, decay, p = found
            wait_early(k, j + 1 < walk.count, step + j + 1)
            out = mosaic.peek(c.acc)
            mosaic.barrier_arrive(r.v_free.at[before])
            mosaic.assign(c.acc, out * mosaic.spread_rows(decay, out.shape))
            return Carry(stats, p.astype(k.problem.dtype))

        return one

    first: Any = 1
    if k.masks:
        first = jnp.maximum(walk.masked, 1)
        carry = mosaic.fori_loop(1, first, visits(masked=True), carry, c.acc)
    carry = mosaic.fori_loop(first, walk.count, visits(masked=False), carry, c.acc)
    mosaic.barrier_arrive(r.q_free.at[q_stage])
    # Opaque: were the stage known, its descriptors would be held in registers all the time.
    return carry, step + mosaic.opaque(walk.count)


def turn(c: Consumer, work: Work, round_: Any, step: Any, carry: Carry) -> tuple[Any, Carry]:
    """The last O += P V of a tile, with the first visit of the next one, of round ``round_``."""
    k, r = c.k, c.k.refs
    stage, before = (lax.rem(i, k.config.stages) for i in (step, step - 1))
    q_stage = lax.rem(round_, k.config.q_stages)
    if k.config.q_stages == 1:
        return turn_apart(c, work, round_, step, carry)
    factor = finish(c, work, carry.stats)
    tile, following = next_tile(k, round_)
    exists = tile < k.schedule.tiles
    pl.when(exists)(lambda: mosaic.barrier_wait(r.k_full.at[stage]))
    mosaic.barrier_wait(r.v_full.at[before])
    s = start_products(c, q_stage, stage, carry, before)
    pl.when(exists)(lambda: mosaic.barrier_arrive(r.k_free.at[stage]))
    stats, _, p = Visit.of(c, following, 0, k.masks).softmax(Stats.start(), s)
    stats, p = lax.optimization_barrier((stats, p))
    wait_early(k, exists & (k.walk(following).count > 1), step + 1)
    out = mosaic.peek(c.acc)
    p = lax.optimization_barrier(p.astype(k.problem.dtype))  # frees registers
    mosaic.barrier_arrive(r.v_free.at[before])
    store(c, work, out, factor)
    c.zero()
    return tile, Carry(stats, p)


def turn_apart(c: Consumer, work: Work, round_: Any, step: Any, carry: Carry) -> tuple[Any, Carry]:
    """`turn` where the next Q comes into the place of this one, one product after the other."""
    k, r = c.k, c.k.refs
    before = lax.rem(step - 1, k.config.stages)
    mosaic.barrier_wait(r.v_full.at[before])
    mosaic.issue(c.acc, carry.p, r.v_smem.at[before])
    factor = finish(c, work, carry.stats)
    out = mosaic.peek(c.acc)
    mosaic.barrier_arrive(r.v_free.at[before])
    store(c, work, out, factor)
    tile, following = next_tile(k, round_)
    return tile, begin(c, following, round_, step, tile < k.schedule.tiles)


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


class Visit(NamedTuple):
    """A tile of scores, and what the operands say of it."""

    k: Kernel
    masked: bool
    tile: spec.Tile | None  # if something depends on it
    key0: Any

    @classmethod
    def of(cls, c: Consumer, work: Work, number: Any, masked: bool) -> "Visit":
        k = c.k
        if not (masked or k.modifies or k.problem.dropout_rate > 0):
            return cls(k, masked, None, None)
        key0 = k.walk(work).tile(number) * k.config.block_kv
        # Opaque, so that what depends on it is not computed before the loop, to be held there.
        row0, key0 = mosaic.opaque(c.row0(work)), mosaic.opaque(key0)
        shape = (ROWS, k.config.block_kv)
        tile = tiles.tile_of(k.problem, k.refs.x, work, row0, key0, shape, masked)
        return cls(k, masked, tile, key0)

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
            s = tiles.modified(problem, self.tile, self.key0, s * problem.scale)
        if self.masked:
            assert self.tile is not None
            key0 = self.key0
            if self.k.modifies:  # one after the other, or registers run out
                s, key0 = lax.optimization_barrier(s), mosaic.opaque(key0)
            allowed = tiles.allowed(problem, self.tile, key0)
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


def finish(c: Consumer, work: Work, stats: Stats) -> jax.Array:
    """Stores a tile's rows of the lse; returns what to multiply its rows of O by, [64]."""
    k, x, row0 = c.k, c.k.refs.x, c.row0(work)
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
    rows = k.refs.lse_gmem.at[work.batch, work.head, pl.ds(row0, ROWS)]
    mosaic.store(rows, lse, optimized=False)
    return factor / total


def store(c: Consumer, work: Work, out: jax.Array, factor: jax.Array) -> None:
    """Stores a tile's rows of O, normalised."""
    k, r = c.k, c.k.refs
    width = r.out_smem.shape[-1]
    factor = mosaic.spread_rows(factor, (ROWS, width))
    for i in range(0, k.problem.Hv, width):
        part = (out if width == k.problem.Hv else out[:, i : i + width]) * factor
        if r.x.query_lengths is not None:  # rows beyond may hold NaN
            part = jnp.where(factor > 0, part, 0.0)
        mosaic.wait_smem_to_gmem(0, wait_read_only=True)
        mosaic.store(r.out_smem.at[c.me], part.astype(k.problem.dtype))
        mosaic.commit_smem()
        rows = pl.ds(c.row0(work), ROWS)
        out_gmem = r.out_gmem.at[work.batch, rows, work.head, pl.ds(i, width)]
        mosaic.copy_smem_to_gmem(r.out_smem.at[c.me], out_gmem)


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
    c = config or Config.default(problem)
    x = operands._replace(
        query=_fit(operands.query), key=_fit(operands.key), value=_fit(operands.value)
    )
    H, Hv = x.query.shape[-1], x.value.shape[-1]
    q_blocks, kv_blocks = pl.cdiv(problem.T, c.block_q), pl.cdiv(problem.S, c.block_kv)
    found = block_map(problem, operands, c.block_q, c.block_kv) if needs_map(problem) else None
    x = tiles.prepare(problem, x, q_blocks * c.block_q, kv_blocks * c.block_kv)
    p = tiles.in_kernel(problem, H, Hv)
    heads = 1
    if not p.band.is_unbounded:
        of_kv_head = p.S * (p.H + p.Hv) * p.dtype.itemsize
        heads = largest_divisor(p.B * p.N, max(1, _L2_BYTES // of_kv_head) * p.G)
    schedule = Schedule(p.B, p.N, q_blocks, heads)
    blocks = min(blocks or _multiprocessors(problem.device), schedule.tiles)
    leaves, tree = jax.tree.flatten((x, found))

    def forward_kernel(*refs: mosaic.Ref) -> None:
        inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
        k = Kernel(p, c, schedule, blocks, Refs(*inputs, *refs[len(leaves) :]))
        of_consumer, of_producer = _REGISTERS[c.consumers][k.hides_keys]

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
            jax.ShapeDtypeStruct((p.B, x.query.shape[1], p.N, p.Hv), p.dtype),
            jax.ShapeDtypeStruct((p.B, p.N, q_blocks * c.block_q), jnp.float32),
        ],
        scratch_types=_scratch(p, c),
        grid={"block": blocks},
        threads=("warpgroup", c.consumers + 1),
        # No reduction crosses warps: a row is within one.
        params=mosaic.compiler_params(reduction_scratch_bytes=0),
    )
    out, lse = launch(*leaves)
    return out[:, : problem.T, :, : problem.Hv], lse[:, :, : problem.T].swapaxes(1, 2)


def _fit(x: jax.Array) -> jax.Array:
    """Pads rows and head dims to whole smallest tiles."""
    rows, columns = (-x.shape[axis] % step for axis, step in zip((1, 3), _STEPS, strict=True))
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


def _scratch(p: spec.Problem, c: Config) -> list[Any]:
    """In the order of `Refs`."""
    full, free = mosaic.Barrier, mosaic.Barrier
    out_columns = c.out_columns(p.H, p.Hv)
    assert out_columns is not None, f"{c} needs too much shared memory for {p.H=}, {p.Hv=}"
    return [
        mosaic.tiled_smem((c.q_stages, c.consumers, ROWS, p.H), p.dtype),
        mosaic.tiled_smem((c.stages, c.block_kv, p.H), p.dtype),
        mosaic.tiled_smem((c.stages, c.block_kv, p.Hv), p.dtype, 2 * c.value_columns(p.Hv)),
        mosaic.tiled_smem((c.consumers, ROWS, out_columns), p.dtype),
        mosaic.SMEM((c.q_stages,), jnp.int32),
        mosaic.SMEM((1,), jnp.int32),
        full(num_barriers=c.q_stages, num_arrivals=c.consumers + 1),
        free(num_barriers=c.q_stages, num_arrivals=c.consumers),
        full(num_barriers=c.stages),
        free(num_barriers=c.stages, num_arrivals=c.consumers),
        full(num_barriers=c.stages),
        free(num_barriers=c.stages, num_arrivals=c.consumers),
        mosaic.Barrier(),
    ]


def _multiprocessors(device: spec.Device) -> int:
    """Of a Hopper GPU; one too many would cost time, and nothing else."""
    for name, count in (("H100 PCIe", 114), ("H20-", 78), ("H20 ", 78)):
        if name in f"{device.kind} ":
            return count
    return 132


_MAX_HEAD_DIM = 256


def supports(problem: spec.Problem) -> str | None:
    """Why these kernels cannot run a problem, or None."""
    p = problem
    if not (_is_hopper(p.device) or mosaic.is_interpreting()):
        return f"needs a Hopper GPU (H100, H200); this device is {p.device.kind}"
    if p.dtype not in (jnp.bfloat16, jnp.float16):
        return f"multiplies bfloat16 and float16; got {p.dtype}"
    if max(p.H, p.Hv) > _MAX_HEAD_DIM:
        return f"takes head dims up to {_MAX_HEAD_DIM}; got {p.H=}, {p.Hv=}"
    if 0 in (p.B, p.T, p.S, p.N):
        return f"has no empty form; got {p.B=}, {p.T=}, {p.S=}, {p.N=}"
    return _refused_function(p)


def _refused_function(problem: spec.Problem) -> str | None:
    functions = {"score_mod": problem.score_mod, "mask_mod": problem.mask_mod}
    for name, function in functions.items():
        reason = None if function is None else mosaic.refusal(function.program)
        if reason is not None:
            return f"cannot run this {name}: {reason}"
    x = problem.operands
    wide = [c.dtype for c in (*x.score_consts, *x.mask_consts) if c.dtype.itemsize > 4]
    return f"takes captured arrays of at most 32 bits; got {wide[0]}" if wide else None


def _is_hopper(device: spec.Device) -> bool:
    names = ("H100", "H200", "H800", "H20", "GH200")
    return device.platform == "gpu" and any(name in device.kind for name in names)
