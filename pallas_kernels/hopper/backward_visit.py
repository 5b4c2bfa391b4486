"""What a consumer of the backward does in a visit, however the consumers divide a tile of logits.

Logits are computed turned, S^T: rows of the matrix are keys, columns are queries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.common import visits
from pallas_kernels.common.schedule import Work
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.backward_kernel import (
    CONSUMERS,
    Backward,
    KeyWork,
    key_sums,
    stores_bias,
    tells_rows,
)
from pallas_kernels.hopper.backward_rounding import Rounding
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.kernel import LOG2_E
from pallas_kernels.hopper.softmax import Visit


class Consumer(NamedTuple):
    """A warpgroup that computes."""

    k: Backward
    me: Any  # which one
    place: Any = 0  # of K

    def here(self, work: KeyWork, at: "At", masked: bool) -> "Here":
        """A visit, once Q and the statistics are there."""
        c, of_rows, stage = self.k.config, self.k.of_group(work, at.member), self.stage(at.step)
        mosaic.barrier_wait(self.k.refs.q_full.at[stage])
        told = tells_rows(self.k.problem)
        row = at.step if told else self.k.walk(work, at.member).tile(at.number) * c.block_q
        row0 = self.row0(row)
        first = self.me * c.rows if c.by_columns else 0
        span = tiles.Span(row0 + first, self.key0(work), (ROWS, c.rows), turned=True)
        visit = Visit.of(self.k, of_rows, lambda: span, masked)
        return Here(visit, of_rows, span, row, row0, first, at.step, stage, self.slot(at.step))

    def row0(self, row: Any) -> Any:
        """The first row of Q, from what `Here.row` is."""
        if not tells_rows(self.k.problem):
            return row
        return mosaic.uniform(self.k.refs.numbers[self.k.place_of_row(row)])

    def stage(self, step: Any) -> Any:
        """Where Q and dO of a visit are."""
        return lax.rem(step, self.k.config.stages)

    def slot(self, step: Any) -> Any:
        """Where dS of a visit goes."""
        return lax.rem(step, 2)

    @property
    def group(self) -> Any:
        """Of the tile's groups of 64 keys, the one whose logits it has.

        Also where it is always the same, it is one that the compiler does not know: it would hold
        all that follows from it in registers.
        """
        return lax.div(self.me, CONSUMERS // self.k.config.key_groups)

    def keys(self, group: Any) -> mosaic.Matrix:
        """K of 64 keys of the tile."""
        return self.k.refs.k_smem.at(self.place, group)

    def key0(self, work: KeyWork) -> Any:
        """The first of those keys."""
        return work.kv_block * self.k.config.block_kv + self.group * ROWS

    def fresh(self) -> "Consumer":
        """The same, of which the compiler computes nothing beforehand, to hold it in registers."""
        place = self.place if self.k.config.key_stages == 1 else mosaic.uniform(self.place)
        return self._replace(me=mosaic.uniform(self.me), place=place)


class At(NamedTuple):
    """Which visit it is."""

    member: Any  # of the group
    number: Any  # in the walk
    step: Any  # how many visits came before, to this and to other tiles of keys


class Here(NamedTuple):
    """A visit, and where it is."""

    visit: Visit
    of_rows: Work
    span: tiles.Span  # of this consumer's logits
    row: Any  # `row0`, or the step by which the producer has told of it
    row0: Any  # of the tile of queries
    first: Any  # row of it that is this consumer's
    step: Any
    stage: Any
    slot: Any


class Weights(NamedTuple):
    """What of P^T the products need."""

    kept: jax.Array  # [64, rows], after dropout, in the dtype of the operands
    p: jax.Array  # [64, rows] float32, before it, times the slope of what modifies logits


class Carry(NamedTuple):
    """What a visit leaves to the next: sums, and a product that is yet to be started."""

    dk: jax.Array  # [64, columns] float32
    dv: jax.Array  # [64, columns] float32
    sums: tuple[jax.Array, ...]  # for each of `key_sums`: [64] float32, of a head
    last: Any  # where that product goes, if the next visit does not tell


class Order(NamedTuple):
    """In which order a consumer does what there is to do for a tile of keys."""

    begin: Callable[[Consumer, KeyWork, Any], Carry]
    visit: Callable[[Consumer, KeyWork, At, bool, Carry], Carry]
    finish: Callable[[Consumer, KeyWork, Any, Carry], None]


def consume(k: Backward, order: Order, rounding: Rounding | None) -> None:
    """Computes this consumer's part of dK and dV of each tile of this block, and of dQ."""
    r, me = k.refs, lax.axis_index("warpgroup")

    def next_tile(place: Any) -> tuple[Any, Any]:
        mosaic.barrier_wait(r.k_full.at[place])
        return place, mosaic.uniform(r.numbers[place])

    def of_tile(state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        place, tile, step = state
        # What is uniform needs no register in every thread.
        work = jax.tree.map(mosaic.uniform, k.work(tile))
        step = attend(Consumer(k, me, place), order, work, step, rounding)
        return *next_tile(lax.rem(place + 1, k.config.key_stages)), step

    zero = jnp.int32(0)
    state = (*next_tile(zero), zero)
    place, *_ = lax.while_loop(lambda state: state[1] < k.schedule.tiles, of_tile, state)
    mosaic.barrier_arrive(r.k_free.at[place])
    if rounding is not None:
        rounding.added()
        rounding.end(1 + me)
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)


def attend(c: Consumer, order: Order, work: KeyWork, step: Any, rounding: Rounding | None) -> Any:
    """All visits of a tile of keys; returns the number of the next visit."""
    k = c.k

    def of_member(member: Any, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
        step, carry = state
        walk = k.walk(work, member)
        # The very first visit has been begun with.
        first: Any = 1 if k.members == 1 else jnp.where(member > 0, 0, 1)

        def visits(masked: bool) -> Any:
            def one(number: Any, carry: Carry) -> Carry:
                fresh = c.fresh()
                carry = carry._replace(last=jax.tree.map(mosaic.uniform, carry.last))
                return order.visit(fresh, work, At(member, number, step + number), masked, carry)

            return one

        carry = k.over_visits(walk, first, visits, carry)
        return step + mosaic.opaque(walk.count), finish_head(c.fresh(), work, member, carry)

    state = (step, order.begin(c.fresh(), work, step))
    if rounding is not None:
        rounding.added()
    if k.members == 1:
        state = of_member(0, state)
    else:  # a number that is known, if small, would have the compiler write the loop out
        state = lax.fori_loop(0, mosaic.opaque(k.members), of_member, state)
    step, carry = state
    order.finish(c.fresh(), work, step - 1, carry)
    return step


def probabilities(c: Consumer, here: Here, s: jax.Array) -> Weights:
    """P^T from S^T and the lse of the forward."""
    k = c.k
    lse = statistic(c, here, 0)
    s, slope = here.visit.logits_and_slope(s)
    p = jnp.exp2(s * (k.unit * LOG2_E) - mosaic.spread_columns(lse, s.shape))
    kept = here.visit.kept(here.visit.signed(p)).astype(k.problem.dtype)
    if slope is None:
        return Weights(kept, p)
    return Weights(kept, jnp.where(p > 0, p * slope, 0.0))  # of what is hidden it may be NaN


def gradient(c: Consumer, here: Here, weights: Weights, dp: jax.Array) -> jax.Array:
    """dS^T = P^T (dP^T - delta), where dP^T has gone through dropout, times the slope."""
    rate = c.k.problem.dropout_rate
    delta = mosaic.spread_columns(statistic(c, here, c.k.config.block_q), dp.shape)
    if rate > 0:
        dp = jnp.where(weights.kept > 0, dp * (1 / (1 - rate)), 0.0)
    return weights.p * (dp - delta)


def statistic(c: Consumer, here: Here, place: int) -> jax.Array:
    """Of this consumer's rows: the lse from place 0, or delta from block_q."""
    rows = pl.ds(place + here.first, c.k.config.rows)
    bits = mosaic.load_columns(c.k.refs.stats_smem.at[here.stage, rows])
    return lax.bitcast_convert_type(bits, jnp.float32)


def sum_up(
    c: Consumer, here: Here, ds: jax.Array, sums: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Adds dS^T to the gradient of a bias, and to sums over rows, which it returns."""
    if c.k.refs.dbias_gmem is not None:
        add_bias(c, here, ds)

    def added(name: str, total: jax.Array) -> jax.Array:
        if name == "bias":
            return total + jnp.sum(ds, axis=1)
        tile, span = here.visit.tile, here.visit.span
        assert tile is not None
        assert span is not None
        return total - jnp.sum(ds * tiles.distance(tile, span), axis=1)

    return tuple(added(n, x) for n, x in zip(key_sums(c.k.problem), sums, strict=True))


def add_bias(c: Consumer, here: Here, ds: jax.Array) -> None:
    """Adds dS^T to the gradient of a bias that has rows and keys, or stores it there."""
    found = c.k.refs.dbias_gmem
    assert found is not None
    key_tile, width = lax.div(here.span.key0, ROWS), c.k.config.bias_width
    for start in range(0, c.k.config.rows, width):
        part = ds[:, start : start + width]
        row_tile = lax.div(here.span.row0 + start, width)
        if stores_bias(c.k.problem):
            at = (here.of_rows.batch, here.of_rows.head, key_tile, row_tile)
            mosaic.put(found.at[at], part.astype(found.dtype))
        else:
            number = here.of_rows.batch * c.k.problem.N + here.of_rows.head
            slab = number if mosaic.is_interpreting() else 0
            heads = visits.heads_of(found.at[0], here.of_rows.batch, here.of_rows.head)
            mosaic.add(found.at[slab, *heads, key_tile, row_tile], part)


def nothing_summed(k: Backward) -> tuple[jax.Array, ...]:
    return tuple(mosaic.full((ROWS,), 0, jnp.float32) for _ in key_sums(k.problem))


def finish_head(c: Consumer, work: KeyWork, member: Any, carry: Carry) -> Carry:
    """Stores what has been summed over the rows of a head."""
    if not carry.sums:
        return carry
    k, of_rows = c.k, c.k.of_group(work, member)
    assert k.refs.sums_gmem is not None
    part = c.me if k.config.by_columns else 0
    for i, found in enumerate(carry.sums):
        keys = pl.ds(c.key0(work), ROWS)
        place = k.refs.sums_gmem.at[i, part, of_rows.batch, of_rows.head, keys]
        mosaic.store(place, found, optimized=False)
    return carry._replace(sums=nothing_summed(k))


def add_dq(
    c: Consumer, work: KeyWork, head: Any, row0: Any, strip: Any, units: Any, dq: jax.Array
) -> None:
    """Adds 64 rows and a strip of dQ to global memory."""
    place = place_of_dq(c, work, head, row0, strip)
    mosaic.add(place, in_units(dq, units), is_staged=not c.k.config.by_columns)


def stage_dq(
    c: Consumer, work: KeyWork, head: Any, row0: Any, strip: Any, units: Any, dq: jax.Array
) -> Callable[[], None]:
    """Prepares to add them by a copy, from shared memory that dK and dV leave by.

    What is returned starts it, once what this warpgroup has written is committed.
    """
    if mosaic.is_interpreting():
        return lambda: add_dq(c, work, head, row0, strip, units, dq)
    (view,) = c.k.refs.out_smem.at(c.me).views
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)  # until what it had has been copied
    mosaic.stage(in_units(dq, units), view.tiled, c.k.refs.dq_gmem.dtype)
    return lambda: mosaic.add_staged(place_of_dq(c, work, head, row0, strip), view.tiled)


def place_of_dq(c: Consumer, work: KeyWork, head: Any, row0: Any, strip: Any) -> mosaic.Ref:
    slab, row_tile = work.kv_block if mosaic.is_interpreting() else 0, lax.div(row0, ROWS)
    return c.k.refs.dq_gmem.at[slab, work.batch, row_tile, head, strip]


def in_units(dq: jax.Array, units: Any) -> jax.Array:
    return dq if units is None else dq * mosaic.spread_rows(units, dq.shape)


def add_keys(c: Consumer, work: KeyWork, first: Any, x: jax.Array, gmem: mosaic.Ref) -> None:
    """Adds 64 rows of dK or dV, strips from ``first`` on, to what others of the group add."""
    width, groups = c.k.config.width, c.k.problem.G
    slab = lax.rem(work.q_head, groups) if mosaic.is_interpreting() else 0
    head = lax.div(mosaic.opaque(work.q_head), groups)  # not held in a register until here
    place = gmem.at[slab, work.batch, lax.div(c.key0(work), ROWS), head]
    for i in range(x.shape[1] // width):
        mosaic.add(place.at[first + i], x[:, i * width : (i + 1) * width])


def show(c: Consumer, slot: Any, *shown: tuple[mosaic.View, jax.Array]) -> None:
    """Stores into strips of shared memory, and shows them to all consumers."""
    # By columns, what is shown is no operand from registers, and strips are half as wide.
    store = mosaic.store if c.k.config.by_columns else mosaic.store_operand
    for strip, x in shown:
        store(strip.tiled, x)
    mosaic.commit_smem()
    mosaic.barrier_arrive(c.k.refs.ds_full.at[slot])
