"""The producer of the backward: copies tiles into shared memory, and says which comes next."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.hopper.backward_kernel import Backward, KeyWork, tells_rows
from pallas_kernels.hopper.backward_rounding import Beside, Rounding
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.hidden import Hidden, zero_hidden
from pallas_kernels.hopper.kernel import drain
from pallas_kernels.hopper.producer import arrive, each_tile


class Progress(NamedTuple):
    """Of a producer, from one tile of keys to the next."""

    step: Any  # how many visits there have been
    # If it rounds dQ; else they would cost registers.
    tile: Any = None  # the last one, at first any
    part: Any = None  # see `Rounding`


def produce(k: Backward, rounding: Rounding | None) -> None:
    """Copies K, V, and Q, dO and the statistics of each visit, for each tile of this block."""
    r, stages = k.refs, k.config.key_stages
    of_k, of_v = k.forms.of_tile(k.config)

    def load(round_: Any, progress: Progress, tile: Any) -> Progress:
        work = k.work(tile)
        keys = Keys.of(k, work)

        def produce_keys() -> None:
            place = announce(k, round_, tile)
            keys.produce(r.x.key, r.k_smem.at(place), r.k_raw, r.k_full.at[place], of_k)

        def after_rows() -> None:
            if stages == 1:
                produce_keys()
            pl.when(round_ > 0)(lambda: mosaic.barrier_wait(r.v_free))
            keys.produce(r.x.value, r.v_smem, r.v_raw, r.v_full, of_v)

        if stages > 1:
            produce_keys()

        beside = None
        if rounding is not None:  # all heads of a group have as many visits
            visits = k.members * k.walk(work, 0).count
            beside = Beside.of(rounding, round_, progress.tile, tile, visits)

        def of_member(member: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            count, part = state
            visits, part = produce_rows(
                k, work, member, progress.step, count, after_rows, beside, part
            )
            return count + visits, part

        count, part = lax.fori_loop(0, k.members, of_member, (jnp.int32(0), progress.part))
        return Progress(progress.step + count, None if beside is None else jnp.int32(tile), part)

    zero, block = jnp.int32(0), lax.axis_index("block")
    start = Progress(zero) if rounding is None else Progress(zero, block, block)
    rounds, last, tile = each_tile(k, r.numbers.at[pl.ds(stages, 1)], load, start)
    if rounding is not None:
        rounding.leave(last.part)
    place = announce(k, rounds, tile)  # that there is none left
    arrive(r.k_full.at[place], of_k)
    if rounding is not None:
        rounding.tell(last.tile, rounds > 0)
        rounding.end(0)
    drain(rounds + 1, stages, r.k_free)
    pl.when(rounds > 0)(lambda: mosaic.barrier_wait(r.v_free))
    drain(last.step, k.config.stages, r.free, *((r.do_free,) if k.config.by_columns else ()))


def announce(k: Backward, round_: Any, tile: Any) -> Any:
    """Tells the consumers which tile comes next; returns the place of its K."""
    r, place = k.refs, lax.rem(round_, k.config.key_stages)
    pl.when(round_ >= k.config.key_stages)(lambda: mosaic.barrier_wait(r.k_free.at[place]))
    r.numbers[place] = tile
    mosaic.commit_smem()
    mosaic.barrier_arrive(r.k_full.at[place])
    return place


class Keys(NamedTuple):
    """A tile of keys whose K and V are to be copied, with rows zeroed that nobody sees."""

    k: Backward
    work: KeyWork
    hidden: Hidden | None

    @classmethod
    def of(cls, k: Backward, work: KeyWork) -> "Keys":
        hides = k.walk(work, 0).hides
        by_data = hides and functools.partial(hides, 0)
        return cls(k, work, Hidden.of(k, work, work.kv_block, by_data) if k.hides_keys else None)

    def produce(
        self,
        gmem: mosaic.Ref,  # [B, S, K, columns]
        smem: mosaic.Matrix,  # [key_groups, 64, columns]
        raw: mosaic.Ref,
        full: mosaic.Ref,
        copies: int,
    ) -> None:
        """Copies K, or V, and tells `full`."""
        c, work, hidden = self.k.config, self.work, self.hidden

        def copy_to(barrier: mosaic.Ref) -> None:
            for i in range(c.key_groups):
                keys = pl.ds(work.kv_block * c.block_kv + i * ROWS, ROWS)
                mosaic.copy_in(gmem.at[work.batch, keys, work.head], smem.at(i), barrier)

        if hidden is None:
            copy_to(full)
            return
        pl.when(~hidden.some)(lambda: copy_to(full))

        @pl.when(hidden.some)
        def _() -> None:
            copy_to(raw)
            mosaic.barrier_wait(raw)
            for i in range(c.key_groups):
                zero_hidden(smem.at(i), 0, functools.partial(hidden.others, i * ROWS))
            mosaic.commit_smem()
            arrive(full, copies)


def produce_rows(
    k: Backward,
    work: KeyWork,
    member: Any,
    step: Any,  # of the first visit of this tile of keys
    before: Any,  # how many visits it has had
    after_rows: Callable[[], None],  # of the first visit of this tile of keys
    beside: Beside | None,
    part: Any,  # the next one to be rounded
) -> tuple[Any, Any]:
    """Copies Q, dO and the statistics of each visit to a head; returns how many, and the next part.

    V, and K if it has one place, come after the first of them: they have to wait until the tile
    before is done.
    """
    c, r = k.config, k.refs
    step += before
    walk, head = k.walk(work, member), k.of_group(work, member).head

    def visit(j: Any, part: Any) -> Any:
        stage, q_block = lax.rem(step + j, c.stages), walk.tile(j)
        rows = pl.ds(q_block * c.block_q, c.block_q)
        q_gmem, do_gmem = (x.at[work.batch, rows, head] for x in (r.x.query, r.dout))
        stats_gmem = r.stats.at[work.batch, head, q_block, pl.ds(0, 2 * c.block_q)]
        empty = None if r.empty is None else r.empty[work.batch, head, q_block] > 0
        again = step + j >= c.stages
        pl.when(again)(lambda: mosaic.barrier_wait(r.free.at[stage]))
        if tells_rows(k.problem):
            r.numbers[k.place_of_row(step + j)] = q_block * c.block_q
            mosaic.commit_smem()
            mosaic.barrier_arrive(r.q_full.at[stage])
        mosaic.copy_gmem_to_smem(stats_gmem, r.stats_smem.at[stage], r.q_full.at[stage])

        def copy(q_barrier: mosaic.Ref, do_barrier: mosaic.Ref) -> None:
            mosaic.copy_in(q_gmem, r.q_smem.at(stage), q_barrier)
            if c.by_columns:
                pl.when(again)(lambda: mosaic.barrier_wait(r.do_free.at[stage]))
            mosaic.copy_in(do_gmem, r.do_smem.at(stage), do_barrier)
            pl.when(before + j == 0)(after_rows)

        if empty is None:
            copy(r.q_full.at[stage], r.do_full.at[stage])
            return part if beside is None else beside.after_copies(before + j, part)
        pl.when(~empty)(lambda: copy(r.q_full.at[stage], r.do_full.at[stage]))

        @pl.when(empty)
        def copy_and_zero() -> None:
            copy(r.q_raw, r.q_raw)
            mosaic.barrier_wait(r.q_raw)
            for row in range(0, c.block_q, ROWS):
                bits = mosaic.load_rows(stats_gmem.at[pl.ds(row, ROWS)])
                lse = lax.bitcast_convert_type(bits, jnp.float32)
                for matrix in (r.q_smem.at(stage), r.do_smem.at(stage)):
                    zero_hidden(matrix, row, functools.partial(_is_finite, lse))
            mosaic.commit_smem()
            arrive(r.q_full.at[stage], k.forms.q.copies)
            arrive(r.do_full.at[stage], k.forms.do.copies)

        return part if beside is None else beside.after_copies(before + j, part)

    return walk.count, lax.fori_loop(0, walk.count, visit, part)


def _is_finite(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return mosaic.spread_rows(x, shape) < jnp.inf
