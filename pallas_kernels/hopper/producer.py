"""The producer of the forward: copies tiles into shared memory, and says which tile comes next."""

import functools
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.common.schedule import Work
from pallas_kernels.hopper.hidden import Hidden
from pallas_kernels.hopper.kernel import Forward, Kernel, drain, scale_at, shift_of
from pallas_kernels.hopper.source import Source


def produce(k: Forward) -> None:
    """Copies Q, K and V of each tile of this block."""
    c, r = k.config, k.refs
    q_smem = r.q_given_smem if k.forms.converts else r.q_smem

    def load(round_: Any, step: Any, tile: Any) -> Any:
        work = k.schedule.work(tile)
        stage = announce(k, round_, tile, work)
        for i in range(c.consumers):
            rows = pl.ds(work.q_block * c.block_q + i * c.rows, c.rows)
            mosaic.copy_in(k.query(work, rows), q_smem.at(stage, i), r.q_full.at[stage])
        return step + produce_keys(k, work, step)

    rounds, steps, tile = each_tile(k, r.ticket_smem, load, jnp.int32(0))
    stage = announce(k, rounds, tile, None)  # that there is none left
    arrive(r.q_full.at[stage], c.consumers * k.forms.q_given.copies)
    drain(rounds + 1, c.q_stages, r.q_free)
    drain(steps, c.stages, r.k_free, r.v_free)


def each_tile(
    k: Kernel, ticket: mosaic.Ref, load: Callable[[Any, Any, Any], Any], state: Any
) -> Any:
    """Calls ``load`` for each tile of this block, as it takes them.

    It is given how many tiles there have been, what it returned last, at first ``state``, and the
    tile. Returns the first two, and a tile beyond the last.
    """
    block, zero, blocks = lax.axis_index("block"), jnp.int32(0), k.blocks
    if k.one_tile_each:  # no numbers to take, nor a counter to zero beforehand
        return jnp.int32(1), load(zero, state, block), block + k.schedule.tiles
    counter = mosaic.counter()

    def take() -> Any:
        mosaic.take_number(counter, ticket, blocks)
        mosaic.commit_smem()
        return mosaic.uniform(ticket[0])

    def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        round_, state, tile = carry
        state = load(round_, state, tile)
        return round_ + 1, state, (0 if k.takes_first else blocks) + take()

    if mosaic.is_interpreting():
        ticket[0] = block - blocks
    start = (zero, state, take() if k.takes_first else block)
    return lax.while_loop(lambda carry: carry[2] < k.schedule.tiles, one, start)


def announce(k: Forward, round_: Any, tile: Any, work: Work | None) -> Any:
    """Tells the consumers which tile comes next, if any; returns the stage of its Q."""
    r, stage = k.refs, lax.rem(round_, k.config.q_stages)
    pl.when(round_ >= k.config.q_stages)(lambda: mosaic.barrier_wait(r.q_free.at[stage]))
    r.tile_smem[stage] = tile
    if work is not None and r.scales is not None and not k.rounds:
        for i in range(k.config.consumers):
            row = work.q_block * k.config.block_q + i * k.config.rows
            r.q_scale_smem[stage, i] = scale_at(r.scales.query, work.batch, row, work.head)
    mosaic.commit_smem()
    mosaic.barrier_arrive(r.q_full.at[stage])
    return stage


def produce_keys(k: Forward, work: Work, step: Any) -> Any:
    """Copies K and V of each visit of a tile of queries; returns how many there are."""
    c, r = k.config, k.refs
    walk = k.walk(work)
    largest = r.scales and r.scales.largest[work.batch, k.kv_head(work)]

    def visit(j: Any, _: None) -> None:
        stage, kv_block = lax.rem(step + j, c.stages), walk.tile(j)
        source = Source.of(k, work, kv_block)
        # Before the waits: what it loads comes while they last.
        by_data = walk.hides and functools.partial(walk.hides, j)
        hidden = Hidden.of(k, work, kv_block, by_data) if k.hides_keys else None
        scales = key_scales(k, work, kv_block)
        again = step + j >= c.stages
        pl.when(again)(lambda: mosaic.barrier_wait(r.k_free.at[stage]))
        if k.widens:
            pl.when(j > 0)(lambda: pass_page_scales(k, step + j - 1))
        source.copy(r.x.key, r.k_smem.at(stage), r.k_full.at[stage])
        if k.widens:
            start_page_scales(k, source, hidden, stage)
        if scales:
            for part, (of_keys, of_values) in enumerate(scales):
                r.kv_scale_smem[stage, part, 0] = of_keys
                r.kv_scale_smem[stage, part, 1] = shift_of(of_values, largest)
            mosaic.commit_smem()
            mosaic.barrier_arrive(r.k_full.at[stage])
        pl.when(again)(lambda: mosaic.barrier_wait(r.v_free.at[stage]))
        produce_values(k, hidden, source.of_values(k), stage)

    lax.fori_loop(0, walk.count, visit, None)
    if k.widens:
        pass_page_scales(k, step + walk.count - 1)
    return walk.count


def key_scales(k: Forward, work: Work, kv_block: Any) -> tuple[tuple[Any, Any], ...]:
    """Of each part of a tile of 8-bit keys and values."""
    scales = k.refs.scales
    if scales is None:
        return ()
    head, parts = k.kv_head(work), k.scaled_parts
    key0 = kv_block * k.config.block_kv
    first_keys = (key0 + i * (k.config.block_kv // parts) for i in range(parts))
    return tuple(
        (scale_at(scales.key, work.batch, key, head), scale_at(scales.value, work.batch, key, head))
        for key in first_keys
    )


def start_page_scales(k: Forward, source: Source, hidden: Hidden | None, stage: Any) -> None:
    """Starts to copy the scales of each part in pages of 8 bits; zero of keys that nobody sees.

    A wait for them in each visit would take longer than its keys and values, where those are few:
    `pass_page_scales` waits in the next one.
    """
    assert hidden is not None, "keys in pages have lengths"
    for part, (page, _, head) in enumerate(source.places):
        key0 = hidden.key0 + part * source.rows
        seen = (key0 < hidden.stop) & (key0 + source.rows > hidden.start)
        for i, scales in enumerate((k.refs.x.key_scale, k.refs.x.value_scale)):
            place = k.refs.kv_scale_smem.at[stage, part, i]
            mosaic.copy_number_in(scales.at[page, head], place, seen)


def pass_page_scales(k: Forward, step: Any) -> None:
    """Tells the consumers that the scales of a visit are there, once they are."""
    mosaic.wait_numbers()
    mosaic.commit_smem()
    mosaic.barrier_arrive(k.refs.k_full.at[lax.rem(step, k.config.stages)])


def produce_values(k: Forward, hidden: "Hidden | None", source: Source, stage: Any) -> None:
    """Copies a tile of V, and zeroes the rows of keys that nobody sees."""
    r, v_smem = k.refs, k.refs.v_smem.at(stage)
    if hidden is None:
        source.copy(r.x.value, v_smem, r.v_full.at[stage])
        return

    @pl.when(~hidden.some)
    def _() -> None:
        source.copy(r.x.value, v_smem, r.v_full.at[stage])

    @pl.when(hidden.some)
    def _() -> None:
        source.copy(r.x.value, v_smem, r.v_raw)
        mosaic.barrier_wait(r.v_raw)
        hidden.zero(v_smem, k.config.block_kv)
        mosaic.commit_smem()
        arrive(r.v_full.at[stage], k.forms.v.copies_in(k.forms.parts))


def arrive(barrier: mosaic.Ref, times: int) -> None:
    """In place of so many copies."""
    for _ in range(times):
        mosaic.barrier_arrive(barrier)
