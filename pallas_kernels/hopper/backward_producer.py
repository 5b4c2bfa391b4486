"""The producer of the backward: copies tiles into shared memory, and says which comes next."""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.hopper.backward_kernel import Backward, KeyWork
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.producer import Hidden, arrive, drain, each_tile, zero_hidden


def produce(k: Backward) -> None:
    """Copies K, V, and Q, dO and the statistics of each visit, for each tile of this block."""
    r = k.refs

    def load(round_: Any, step: Any, tile: Any) -> Any:
        work = k.work(tile)
        announce(k, round_, tile)
        produce_keys(k, work)

        def of_member(member: Any, count: Any) -> Any:
            return count + produce_rows(k, work, member, step + count)

        return lax.fori_loop(0, k.problem.G, of_member, jnp.int32(0))

    rounds, steps, tile = each_tile(k, r.tile_smem.at[pl.ds(1, 1)], load)
    announce(k, rounds, tile)  # that there is none left
    arrive(r.kv_full, k.config.key_groups * (k.forms.k.copies + k.forms.v.copies))
    mosaic.barrier_wait(r.kv_free)
    drain(steps, k.config.stages, r.free, *((r.do_free,) if k.config.by_columns else ()))


def announce(k: Backward, round_: Any, tile: Any) -> None:
    """Tells the consumers which tile comes next."""
    r = k.refs
    pl.when(round_ > 0)(lambda: mosaic.barrier_wait(r.kv_free))
    r.tile_smem[0] = tile
    mosaic.commit_smem()
    mosaic.barrier_arrive(r.kv_full)


def produce_keys(k: Backward, work: KeyWork) -> None:
    """Copies K and V, and zeroes the rows of keys that nobody sees."""
    c, r = k.config, k.refs
    hides = k.walk(work, 0).hides
    by_data = hides and functools.partial(hides, 0)
    hidden = Hidden.of(k, work, work.kv_block, by_data) if k.hides_keys else None

    def copy_to(barrier: mosaic.Ref) -> None:
        for i in range(c.key_groups):
            keys = pl.ds(work.kv_block * c.block_kv + i * ROWS, ROWS)
            k_gmem, v_gmem = (x.at[work.batch, keys, work.head] for x in (r.x.key, r.x.value))
            mosaic.copy_in(k_gmem, r.k_smem.at(i), barrier)
            mosaic.copy_in(v_gmem, r.v_smem.at(i), barrier)

    if hidden is None:
        copy_to(r.kv_full)
        return
    pl.when(~hidden.some)(lambda: copy_to(r.kv_full))

    @pl.when(hidden.some)
    def _() -> None:
        copy_to(r.kv_raw)
        mosaic.barrier_wait(r.kv_raw)
        for i in range(c.key_groups):
            for matrix in (r.k_smem.at(i), r.v_smem.at(i)):
                zero_hidden(matrix, 0, functools.partial(hidden.others, i * ROWS))
        mosaic.commit_smem()
        arrive(r.kv_full, k.config.key_groups * (k.forms.k.copies + k.forms.v.copies))


def produce_rows(k: Backward, work: KeyWork, member: Any, step: Any) -> Any:
    """Copies Q, dO and the statistics of each visit to a head; returns how many there are."""
    c, r = k.config, k.refs
    walk, head = k.walk(work, member), k.of_group(work, member).head

    def visit(j: Any, _: None) -> None:
        stage, q_block = lax.rem(step + j, c.stages), walk.tile(j)
        rows = pl.ds(q_block * c.block_q, c.block_q)
        q_gmem, do_gmem = (x.at[work.batch, rows, head] for x in (r.x.query, r.dout))
        stats_gmem = r.stats.at[work.batch, head, q_block]
        empty = None if r.empty is None else r.empty[work.batch, head, q_block] > 0
        again = step + j >= c.stages
        pl.when(again)(lambda: mosaic.barrier_wait(r.free.at[stage]))
        mosaic.copy_gmem_to_smem(stats_gmem, r.stats_smem.at[stage], r.q_full.at[stage])

        def copy(q_barrier: mosaic.Ref, do_barrier: mosaic.Ref) -> None:
            mosaic.copy_in(q_gmem, r.q_smem.at(stage), q_barrier)
            if c.by_columns:
                pl.when(again)(lambda: mosaic.barrier_wait(r.do_free.at[stage]))
            mosaic.copy_in(do_gmem, r.do_smem.at(stage), do_barrier)

        if empty is None:
            copy(r.q_full.at[stage], r.do_full.at[stage])
            return
        pl.when(~empty)(lambda: copy(r.q_full.at[stage], r.do_full.at[stage]))

        @pl.when(empty)
        def copy_and_zero() -> None:
            copy(r.q_raw, r.q_raw)
            mosaic.barrier_wait(r.q_raw)
            for row in range(0, c.block_q, ROWS):
                lse = mosaic.load_rows(stats_gmem.at[pl.ds(row, ROWS)])
                for matrix in (r.q_smem.at(stage), r.do_smem.at(stage)):
                    zero_hidden(matrix, row, functools.partial(_is_finite, lse))
            mosaic.commit_smem()
            arrive(r.q_full.at[stage], k.forms.q.copies)
            arrive(r.do_full.at[stage], k.forms.do.copies)

    lax.fori_loop(0, walk.count, visit, None)
    return walk.count


def _is_finite(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return mosaic.spread_rows(x, shape) < jnp.inf
