"""The producers where keys and values are in pages of 8 bits: they copy them, and widen them.

What TMA brings has a ring of its own in shared memory. A producer's warpgroup reads it, multiplies
it with its scales, and writes it where the consumers look for it, who know nothing of all this.
Widening takes longer than all that consumers do: a warpgroup has 64 rows of each tile of keys, or
of values, and goes its own way.

Page numbers and scales are in global memory. Each is loaded a visit before it is needed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.hidden import Hidden, zero_hidden
from pallas_kernels.hopper.kernel import Forward, drain, next_tile
from pallas_kernels.hopper.source import Source, pages_of


class Share(NamedTuple):
    """64 rows of each tile of keys, or of values: the task of a warpgroup."""

    gmem: Any
    scale: mosaic.Ref  # [pages, heads]
    narrow: mosaic.Matrix  # [narrow_stages, shares, 64, columns]
    arrived: mosaic.Ref  # [narrow_stages * shares]
    wide: mosaic.Matrix  # [stages, block_kv, columns]
    full: mosaic.Ref
    free: mosaic.Ref
    number: int  # of the shares of a tile
    is_value: bool


def shares(k: Forward) -> list[Share]:
    """All, those of keys first."""
    r, x, numbers = k.refs, k.refs.x, range(k.config.shares)
    of_key = x.key, x.key_scale, r.k_narrow_smem, r.k_narrow_full, r.k_smem, r.k_full, r.k_free
    of_value = (
        x.value,
        x.value_scale,
        r.v_narrow_smem,
        r.v_narrow_full,
        r.v_smem,
        r.v_full,
        r.v_free,
    )
    return [Share(*of_key, i, False) for i in numbers] + [
        Share(*of_value, i, True) for i in numbers
    ]


class Parts(NamedTuple):
    """What a share has of the tiles that a tile of queries visits."""

    k: Forward
    share: Share
    work: Work
    walk: Walk
    step: Any  # how many visits there were before

    @property
    def ahead(self) -> int:
        """How many visits before it is widened something is copied."""
        return self.k.forms.narrow_stages - 1

    def key0(self, j: Any) -> Any:
        """The first key of a visit."""
        return self.walk.tile(j) * self.k.config.block_kv + self.share.number * ROWS

    def pages(self, j: Any) -> tuple[Any, ...]:
        """The pages of a visit's keys; of some, if there is no such visit."""
        return pages_of(self.k, self.work, self.key0(j), ROWS)

    def scales(self, pages: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self.share.scale[page, self.k.kv_head(self.work)] for page in pages)

    def place(self, j: Any) -> tuple[mosaic.Matrix, mosaic.Ref]:
        """Where a visit's rows arrive, and the barrier that says so."""
        slot, x = lax.rem(self.step + j, self.k.forms.narrow_stages), self.share
        barrier = x.arrived.at[slot * self.k.config.shares + x.number]
        return x.narrow.at(slot, x.number), barrier

    def start(self, j: Any, pages: tuple[Any, ...]) -> None:
        """Starts to copy what a visit needs, if there is such a visit."""

        @pl.when(j < self.walk.count)
        def _() -> None:
            source = Source.of(self.k, self.work, self.key0(j), ROWS, pages)
            source.copy(self.share.gmem, *self.place(j))


def widen_alone(k: Forward, share: Share) -> None:
    """Brings a share of each tile of this block, as the first producer takes them."""
    c, r, zero = k.config, k.refs, jnp.int32(0)

    def taken(round_: Any) -> Any:
        tile, _ = next_tile(k, round_)
        mosaic.barrier_arrive(r.q_free.at[lax.rem(round_, c.q_stages)])
        return tile

    def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        round_, step, tile = carry
        count = widen_each(k, share, k.schedule.work(tile), step)
        return round_ + 1, step + count, taken(round_ + 1)

    state = (zero, zero, taken(zero))
    _, steps, _ = lax.while_loop(lambda carry: carry[2] < k.schedule.tiles, one, state)
    drain(steps, c.stages, share.free)


def widen_each(k: Forward, share: Share, work: Work, step: Any) -> Any:
    """Brings a share at each visit of a tile of queries; returns how many there are."""
    c, parts = k.config, Parts(k, share, work, k.walk(work), step)
    first = [parts.pages(j) for j in range(parts.ahead + 1)]
    for j in range(parts.ahead):
        parts.start(j, first[j])

    def visit(j: Any, carry: Any) -> Any:
        to_copy, following, scales = carry
        parts.start(j + parts.ahead, to_copy)
        upcoming = parts.pages(j + parts.ahead + 1), parts.pages(j + 2), parts.scales(following)
        stage = lax.rem(step + j, c.stages)
        narrow, arrived = parts.place(j)
        mosaic.barrier_wait(arrived)
        pl.when(step + j >= c.stages)(lambda: mosaic.barrier_wait(share.free.at[stage]))
        widen(k, narrow, share, stage, scales)
        if share.is_value:
            clean(k, share, stage, Hidden.of(k, work, parts.walk.tile(j), None))
        mosaic.commit_smem()  # after it, all threads have read what had arrived, too
        mosaic.barrier_arrive(share.full.at[stage])
        return upcoming

    lax.fori_loop(0, parts.walk.count, visit, (first[-1], parts.pages(1), parts.scales(first[0])))
    return parts.walk.count


def widen(
    k: Forward, narrow: mosaic.Matrix, share: Share, stage: Any, scales: tuple[Any, ...]
) -> None:
    """Writes the products of a share's numbers and the scales of its parts, in 16 bits."""
    factor, rows = by_row(scales, ROWS // len(scales)), pl.ds(share.number * ROWS, ROWS)
    target = share.wide.at(stage)
    for (source, _, _), (place, _, _) in zip(narrow.strips(), target.strips(), strict=True):
        x = mosaic.floating(mosaic.load_matrix(source.tiled))
        wide = x * mosaic.spread_rows(factor, x.shape)
        mosaic.store(place.tiled.at[rows], wide.astype(k.problem.dtype))


def clean(k: Forward, share: Share, stage: Any, hidden: Hidden) -> None:
    """Zeroes rows of values that nobody sees."""

    @pl.when(hidden.some)
    def _() -> None:
        mosaic.commit_smem()  # it is read again
        row = share.number * ROWS
        zero_hidden(share.wide.at(stage), row, functools.partial(hidden.others, row))


def by_row(parts: tuple[Any, ...], rows_each: int) -> jax.Array:
    """For each of 64 rows the number of the part that it is in."""
    *others, last = parts
    found = mosaic.full((ROWS,), last, jnp.float32)
    if others:
        row = mosaic.row_iota(ROWS)
        for i, number in reversed(list(enumerate(others))):
            found = jnp.where(row < (i + 1) * rows_each, number, found)
    return found
