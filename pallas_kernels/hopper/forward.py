"""The forward: FlashAttention-3 (Shah et al. 2024, section 3) in Pallas for Mosaic GPU.

A block has one producer warpgroup, which copies tiles of K and V by TMA into a ring of stages, and
one to four consumer warpgroups, each with rows of Q of its own: 64, or fewer of few new tokens. In
each visit to a tile of keys a consumer starts the product S = Q K^T, then O += P V of the visit
before, and turns S into P while the latter still runs. The grid is persistent: a block that is done
with a tile of queries takes the next one. The overlap does not stop there: the last product of a
tile runs with the first of the next. Where products are short, as of 8 bits, the registers that
this takes are better spent on a third consumer: each then has one product after the other, and
starts O += P V of a part of the keys while P of the next part is computed.

P and O are relative to a row's largest score, or to an older one that it does not exceed by much:
most visits then find that no row has grown, and change neither O nor sums, see `mosaic.growth`.

Shared memory of a block:

    q_smem    [q_stages, consumers, rows, H]    filled by the producer
    k_smem    [stages, block_kv, H]             filled by the producer
    v_smem    [stages, block_kv, Hv]            filled by the producer; of 8 bits: turned
    out_smem  [consumers, rows, staging.columns] on its way out
    tile_smem [q_stages] int32                  which tile of queries comes next

Elements of 8 bits have scales (section 3.3), which the producer passes on with each tile. Queries
of 16 bits are rounded to 8 by the consumer, where they are:

    q_scale_smem  [q_stages, consumers]
    kv_scale_smem [stages, scaled_parts, 2]     of keys; log2 of those of values
    q_numbers_smem [consumers, 5]               in place of the first: largest entries, the scale

So have pages of 8 bits. With them, and where rows are few, tiles are turned, see `orientation`:

    p_smem [2, rows, block_kv]                  of visits by turns

Each stage has a barrier that says it is full, and one that says every consumer is done with it.
The producer's side is in `producer`, a visit's softmax in `softmax`; `launch` calls the kernel.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.common.schedule import Work
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.kernel import Forward, next_tile
from pallas_kernels.hopper.softmax import Raised, Stats, Visit
from pallas_kernels.spec.narrow import LEAST


class Consumer(NamedTuple):
    """A warpgroup that computes."""

    k: Forward
    me: Any  # which one

    def row0(self, work: Work) -> Any:
        c = self.k.config
        return work.q_block * c.block_q + self.me * c.rows

    def visit(self, work: Work, number: Any, masked: bool) -> Visit:
        def find() -> tiles.Span:
            c = self.k.config
            key0 = self.k.walk(work).tile(number) * c.block_kv
            shape = self.k.orientation.matrix(c.rows, c.block_kv)
            return tiles.Span(self.row0(work), key0, shape, c.turned)

        return Visit.of(self.k, work, find, masked)

    def raised(self, q_stage: Any, stage: Any) -> Raised | None:
        """What the scales of a tile of Q and those of one of keys come to."""
        r, parts = self.k.refs, range(self.k.scaled_parts)
        if not parts:
            return None
        of_keys, of_values = ([r.kv_scale_smem[stage, i, j] for i in parts] for j in range(2))
        if self.k.widens:
            scales, of_values = ([jnp.maximum(x, LEAST) for x in y] for y in (of_keys, of_values))
            return Raised(tuple(scales), tuple(map(jnp.log2, of_values)))
        if self.k.rounds:
            of_queries = r.q_numbers_smem[self.me, mosaic.NARROWED_NUMBERS - 1]
        else:
            of_queries = r.q_scale_smem[q_stage, self.me]
        return Raised(tuple(of_queries * x for x in of_keys), tuple(of_values))


class Carry(NamedTuple):
    """What a visit leaves to the next."""

    stats: Stats
    p: Any  # [rows, block_kv], yet to be multiplied with its values; see `Orientation.given`
    o: tuple[jax.Array, ...]  # pieces of [rows, Hv] float32, not normalised; or turned


def consume(k: Forward) -> None:
    """Computes a warpgroup's rows of each tile of this block."""
    c = Consumer(k, lax.axis_index("warpgroup"))
    pl.when(c.me == k.config.consumers - 1)(lambda: pass_turn(c))
    rounds = (consume_overlapped if k.config.overlaps else consume_apart)(c)
    mosaic.barrier_arrive(k.refs.q_free.at[lax.rem(rounds, k.config.q_stages)])
    pl.when(c.me == 0)(lambda: wait_turn(c))
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)


def consume_overlapped(c: Consumer) -> Any:
    """All tiles, with a product of each visit during the softmax of the next; returns how many."""
    k = c.k

    def attend(state: Any) -> Any:
        round_, step, tile, carry = state
        work = k.schedule.work(tile)
        carry, step = visit_rest(c, work, round_, step, carry)
        work = k.schedule.work(mosaic.opaque(tile))  # computed again rather than held
        turn = turn_apart if k.config.q_stages == 1 else turn_overlapped
        tile, carry = turn(c, work, round_ + 1, step, carry)
        return round_ + 1, step, tile, carry

    zero, one = jnp.int32(0), jnp.int32(1)
    tile, work = next_tile(k, zero)
    carry = begin(c, work, zero, zero)
    if k.one_tile_each:
        carry, step = visit_rest(c, work, zero, zero, carry)
        end(c, k.schedule.work(mosaic.opaque(tile)), step, carry)
        next_tile(k, one)
        return one
    state = (zero, zero, tile, carry)
    rounds, *_ = lax.while_loop(lambda state: state[2] < k.schedule.tiles, attend, state)
    return rounds


def consume_apart(c: Consumer) -> Any:
    """All tiles, with one product after the other; returns how many."""
    k = c.k

    def attend(state: Any) -> Any:
        round_, step, tile = state

        def of_rows() -> Any:
            stats, o, following = visits_apart(c, k.schedule.work(tile), round_, step)
            work = k.schedule.work(mosaic.opaque(tile))  # computed again rather than held
            store(c, work, o, finish(c, work, stats))
            return following

        if k.has_tiles_without_rows:
            work = k.schedule.work(tile)
            has_rows = c.row0(work) < k.problem.T
            step = lax.cond(has_rows, of_rows, lambda: pass_visits(c, work, round_, step))
        else:
            step = of_rows()
        return round_ + 1, step, next_tile(k, round_ + 1)[0]

    zero = jnp.int32(0)
    state = (zero, zero, next_tile(k, zero)[0])
    rounds, *_ = lax.while_loop(lambda state: state[2] < k.schedule.tiles, attend, state)
    return rounds


def visits_apart(c: Consumer, work: Work, round_: Any, step: Any) -> tuple[Stats, Any, Any]:
    """All visits of a tile of queries, those that need a mask first; the statistics, O, the step.

    In turns, a consumer computes its scores and their maxima before the next one begins: they are
    ready one by one, and so are the exponentials. O += P V of a part of the keys runs while that of
    the next part is computed.
    """
    k, r = c.k, c.k.refs
    walk, q_stage = k.walk(work), lax.rem(round_, k.config.q_stages)
    convert_queries(c, work, q_stage)

    def visits(masked: bool) -> Any:
        def one(j: Any, carry: tuple[Stats, Any]) -> tuple[Stats, Any]:
            stats, o = carry
            stage = lax.rem(step + j, k.config.stages)
            visit = c.visit(work, j, masked)
            mosaic.barrier_wait(r.k_full.at[stage])
            raised = c.raised(q_stage, stage)
            wait_turn(c)
            s = mosaic.settle(start_scores(c, q_stage, step + j))
            mosaic.barrier_arrive(r.k_free.at[stage])
            scores, o = visit.scores(stats, s, raised, o)
            sums = scores.sums
            pass_turn(c)
            mosaic.barrier_wait(r.v_full.at[stage])
            for part in range(k.config.parts):
                p, sums = scores.probabilities(sums, part)
                p = k.orientation.given(p, step + j)
                v = k.orientation.values(r.v_smem.at(stage), part)
                o = k.orientation.start_outputs(p, step + j, v, o)
            o = settled(o)
            mosaic.barrier_arrive(r.v_free.at[stage])
            return Stats(scores.m, sums), o

        return one

    stats, o = k.over_visits(walk, 0, visits, (Stats.start(k), k.orientation.no_outputs()))
    mosaic.barrier_arrive(r.q_free.at[q_stage])
    return stats, o, step + mosaic.opaque(walk.count)


def pass_visits(c: Consumer, work: Work, round_: Any, step: Any) -> Any:
    """In place of `visits_apart` and of what follows, where a consumer has no rows; the step."""
    k, r = c.k, c.k.refs
    count = k.walk(work).count

    def one(j: Any, _: None) -> None:
        stage = lax.rem(step + j, k.config.stages)
        mosaic.barrier_wait(r.k_full.at[stage])
        wait_turn(c)
        pass_turn(c)
        mosaic.barrier_arrive(r.k_free.at[stage])
        mosaic.barrier_wait(r.v_full.at[stage])
        mosaic.barrier_arrive(r.v_free.at[stage])

    lax.fori_loop(0, count, one, None)
    mosaic.barrier_arrive(r.q_free.at[lax.rem(round_, k.config.q_stages)])
    return step + count


def begin(c: Consumer, work: Work, round_: Any, step: Any) -> Carry:
    """The first visit of a tile of queries, alone."""
    k, r = c.k, c.k.refs
    stage = lax.rem(step, k.config.stages)
    visit = c.visit(work, 0, k.masks)
    q_stage = lax.rem(round_, k.config.q_stages)
    convert_queries(c, work, q_stage)
    mosaic.barrier_wait(r.k_full.at[stage])
    raised = c.raised(q_stage, stage)
    s = mosaic.settle(start_scores(c, q_stage, step))
    mosaic.barrier_arrive(r.k_free.at[stage])
    stats, _, p = visit.softmax(Stats.start(k), s, raised)
    wait_early(k, k.walk(work).count > 1, step + 1)
    return Carry(stats, k.orientation.given(p, step), k.orientation.no_outputs())


def visit_rest(c: Consumer, work: Work, round_: Any, step: Any, carry: Carry) -> tuple[Carry, Any]:
    """All visits of a tile of queries but the first; those that need a mask come first."""
    k, r = c.k, c.k.refs
    walk, q_stage = k.walk(work), lax.rem(round_, k.config.q_stages)

    def visits(masked: bool) -> Any:
        def one(j: Any, carry: Carry) -> Carry:
            stage, before = (lax.rem(step + i, k.config.stages) for i in (j, j - 1))
            # What it loads comes while products run, if there are registers to hold it.
            visit = c.visit(work, j, masked) if k.config.q_stages > 1 else None
            if not k.config.late_wait:
                mosaic.barrier_wait(r.k_full.at[stage])
            mosaic.barrier_wait(r.v_full.at[before])
            raised = c.raised(q_stage, stage)
            s, o = start_products(c, q_stage, step + j, carry)
            mosaic.barrier_arrive(r.k_free.at[stage])
            visit = visit or c.visit(work, j, masked)
            # The barrier keeps ptxas from taking P for the product that is still running.
            stats, decay, p = lax.optimization_barrier(visit.softmax(carry.stats, s, raised))
            wait_early(k, j + 1 < walk.count, step + j + 1)
            o = settled(o)
            mosaic.barrier_arrive(r.v_free.at[before])
            return Carry(stats, k.orientation.given(p, step + j), k.decayed(o, decay, masked))

        return one

    carry = k.over_visits(walk, 1, visits, carry)
    mosaic.barrier_arrive(r.q_free.at[q_stage])
    # Opaque: were the stage known, its descriptors would be held in registers all the time.
    return carry, step + mosaic.opaque(walk.count)


def turn_overlapped(
    c: Consumer, work: Work, round_: Any, step: Any, carry: Carry
) -> tuple[Any, Carry]:
    """From a tile to the next one, if there is one, of round ``round_``."""
    factor = finish(c, work, carry.stats)
    tile, following = next_tile(c.k, round_)
    carry = lax.cond(
        tile < c.k.schedule.tiles,
        lambda: end_and_begin(c, work, factor, following, round_, step, carry),
        lambda: end(c, work, step, carry, factor),
    )
    return tile, carry


def turn_apart(c: Consumer, work: Work, round_: Any, step: Any, carry: Carry) -> tuple[Any, Carry]:
    """The same where the next Q comes into the place of this one: one product after the other."""
    carry = end(c, work, step, carry)
    tile, following = next_tile(c.k, round_)
    carry = lax.cond(
        tile < c.k.schedule.tiles, lambda: begin(c, following, round_, step), lambda: carry
    )
    return tile, carry


def end_and_begin(
    c: Consumer,
    work: Work,
    factor: jax.Array,  # of `finish`
    following: Work,
    round_: Any,
    step: Any,
    carry: Carry,
) -> Carry:
    """The last O += P V of a tile, with the first visit of the following one."""
    k, r = c.k, c.k.refs
    stage, before = (lax.rem(i, k.config.stages) for i in (step, step - 1))
    q_stage = lax.rem(round_, k.config.q_stages)
    convert_queries(c, following, q_stage)
    mosaic.barrier_wait(r.k_full.at[stage])
    mosaic.barrier_wait(r.v_full.at[before])
    raised = c.raised(q_stage, stage)
    s, o = start_products(c, q_stage, step, carry)
    mosaic.barrier_arrive(r.k_free.at[stage])
    stats, _, p = c.visit(following, 0, k.masks).softmax(Stats.start(k), s, raised)
    stats, p = lax.optimization_barrier((stats, p))
    wait_early(k, k.walk(following).count > 1, step + 1)
    o = settled(o)
    p = lax.optimization_barrier(k.orientation.given(p, step))  # frees registers
    mosaic.barrier_arrive(r.v_free.at[before])
    store(c, work, o, factor)
    return Carry(stats, p, k.orientation.no_outputs())


def end(c: Consumer, work: Work, step: Any, carry: Carry, factor: jax.Array | None = None) -> Carry:
    """The last O += P V of a tile, alone; returns what O is then. ``factor``: of `finish`."""
    r, before = c.k.refs, lax.rem(step - 1, c.k.config.stages)
    mosaic.barrier_wait(r.v_full.at[before])
    o = start_outputs(c, step - 1, carry)
    if factor is None:
        factor = finish(c, work, carry.stats)
    o = settled(o)
    mosaic.barrier_arrive(r.v_free.at[before])
    store(c, work, o, factor)
    return carry._replace(o=o)


def convert_queries(c: Consumer, work: Work, q_stage: Any) -> None:
    """A tile's rows of Q as products take them, if they are given otherwise."""
    k, r = c.k, c.k.refs
    if not k.forms.converts:
        return
    given, q_smem = (x.at(q_stage, c.me) for x in (r.q_given_smem, r.q_smem))
    if k.widens:
        mosaic.store_for_widened_rows(given, q_smem)
    else:
        count = k.row_count(work)
        rows = None if count is None else count - c.row0(work)
        mosaic.narrow_rows(given, q_smem, r.q_numbers_smem.at[c.me], rows)
    mosaic.commit_smem()


def start_products(
    c: Consumer, q_stage: Any, step: Any, carry: Carry
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Starts S = Q K^T, and O += P V of the visit before; returns S, and O, which still runs."""
    wait_turn(c)
    s = start_scores(c, q_stage, step)
    o = start_outputs(c, step - 1, carry)
    pass_turn(c)
    return mosaic.settle(s, in_flight=len(o)), o


def start_scores(c: Consumer, q_stage: Any, step: Any) -> jax.Array:
    """Starts S = Q K^T of a visit."""
    r, stage = c.k.refs, lax.rem(step, c.k.config.stages)
    return c.k.orientation.start_scores(r.q_smem.at(q_stage, c.me), r.k_smem.at(stage))


def start_outputs(c: Consumer, step: Any, carry: Carry) -> tuple[jax.Array, ...]:
    """Starts O += P V of a visit."""
    v = c.k.refs.v_smem.at(lax.rem(step, c.k.config.stages))
    return c.k.orientation.start_outputs(carry.p, step, v, carry.o)


def wait_turn(c: Consumer) -> None:
    """Until the consumers before have passed their turns."""
    if c.k.config.ping_pong:
        mosaic.barrier_wait(c.k.refs.turn.at[c.me])


def pass_turn(c: Consumer) -> None:
    """To the next consumer, round and round."""
    if c.k.config.ping_pong:
        following = lax.rem(c.me + 1, c.k.config.consumers)
        mosaic.barrier_arrive(c.k.refs.turn.at[following])


def settled(products: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """O, once the products that `start_outputs` started are done."""
    return tuple(mosaic.settle(x) for x in products)


def wait_early(k: Forward, more: Any, step: Any) -> None:
    """Waits for the next K before the product that runs has ended.

    The jump in here stops ptxas from moving the wait for that product above the exponentials.
    """
    if k.config.late_wait:
        stage = lax.rem(step, k.config.stages)
        pl.when(more)(lambda: mosaic.barrier_wait(k.refs.k_full.at[stage]))


def finish(c: Consumer, work: Work, stats: Stats) -> jax.Array:
    """Stores a tile's rows of the lse; returns what to multiply its rows of O by, a vector."""
    row0 = c.row0(work)
    factor, lse = stats.finish(c.k, work, row0)
    mosaic.store(c.k.lse(work, pl.ds(row0, c.k.config.rows)), lse, optimized=False)
    scales = c.k.refs.scales
    if scales is None:
        return factor
    return factor * scales.out(work.batch, c.k.kv_head(work))


def store(c: Consumer, work: Work, o: tuple[jax.Array, ...], factor: jax.Array) -> None:
    """Stores a tile's rows of O, normalised."""
    k = c.k
    out_gmem = k.out(work, pl.ds(c.row0(work), k.config.rows))
    strips = list(k.refs.out_smem.at(c.me).strips())

    def normalised(start: int, width: int) -> jax.Array:
        part = columns(k, o, start, width)
        spread = k.orientation.spread(factor, part.shape)
        part = part * spread
        if k.empties_rows:  # 0 NaN is NaN
            part = jnp.where(spread > 0, part, 0.0)
        return part.astype(k.problem.dtype)

    column = 0
    for group in k.forms.out.groups():
        mosaic.wait_smem_to_gmem(0, wait_read_only=True)
        widths = [strips[place][2] for place in group]
        starts = list(itertools.accumulate(widths, initial=column))
        column = starts.pop()
        parts = (normalised(*at) for at in zip(starts, widths, strict=True))
        k.orientation.store([strips[place][0].tiled for place in group], parts)
        mosaic.commit_smem()
        for place, start in zip(group, starts, strict=True):
            mosaic.copy_out(strips[place][0], out_gmem, start)


def columns(k: Forward, pieces: tuple[jax.Array, ...], start: int, width: int) -> jax.Array:
    """Some columns of O, in pieces, all within one."""
    for piece, count in zip(pieces, k.output_columns(), strict=True):
        if start < count:
            return k.orientation.output_part(piece, start, width)
        start -= count
    raise AssertionError("there are no such columns")
