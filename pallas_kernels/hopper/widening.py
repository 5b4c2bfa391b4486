"""The producer where keys and values are in pages of 8 bits: it copies them, and widens them.

What TMA brings has a ring of its own in shared memory, of small tiles, many copies ahead. The
producer's warpgroup reads each, multiplies it with its scales, and writes it where the consumers
look for it, who know nothing of all this.

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
from pallas_kernels.hopper.kernel import Forward
from pallas_kernels.hopper.source import Source, pages_of


class Tiles(NamedTuple):
    """The tiles of keys that a tile of queries visits."""

    k: Forward
    work: Work
    walk: Walk
    step: Any  # how many visits there were before

    @property
    def ahead(self) -> int:
        """How many visits before it is widened a tile is copied."""
        return self.k.forms.narrow_stages - 1

    def pages(self, j: Any) -> tuple[Any, ...]:
        """The pages of a visit's keys; of some, if there is no such visit."""
        return pages_of(self.k, self.work, self.walk.tile(j))

    def slot(self, j: Any) -> Any:
        return lax.rem(self.step + j, self.k.forms.narrow_stages)

    def start(self, j: Any, pages: tuple[Any, ...]) -> None:
        """Starts to copy what a visit needs, if there is such a visit."""
        k, r, slot = self.k, self.k.refs, self.slot(j)

        @pl.when(j < self.walk.count)
        def _() -> None:
            source = Source.of(k, self.work, self.walk.tile(j), pages)
            source.copy(r.x.key, r.k_narrow_smem.at(slot), r.narrow_full.at[slot])
            source.copy(r.x.value, r.v_narrow_smem.at(slot), r.narrow_full.at[slot])


class PartScales(NamedTuple):
    """Of the parts of a tile of keys and values."""

    key: tuple[Any, ...]
    value: tuple[Any, ...]

    @classmethod
    def of(cls, k: Forward, work: Work, pages: tuple[Any, ...]) -> "PartScales":
        x, head = k.refs.x, k.kv_head(work)
        return cls(*(tuple(y[page, head] for page in pages) for y in (x.key_scale, x.value_scale)))


def produce_widened(k: Forward, work: Work, step: Any) -> Any:
    """Brings K and V of each visit of a tile of queries; returns how many there are."""
    c, r = k.config, k.refs
    tiles = Tiles(k, work, k.walk(work), step)
    first = [tiles.pages(j) for j in range(tiles.ahead + 1)]
    for j in range(tiles.ahead):
        tiles.start(j, first[j])

    def visit(j: Any, carry: tuple[Any, Any, PartScales]) -> tuple[Any, Any, PartScales]:
        to_copy, following, scales = carry
        tiles.start(j + tiles.ahead, to_copy)
        upcoming = tiles.pages(j + tiles.ahead + 1), tiles.pages(j + 2)
        upcoming_scales = PartScales.of(k, work, following)
        hidden = Hidden.of(k, work, tiles.walk.tile(j), None)
        stage, slot = lax.rem(step + j, c.stages), tiles.slot(j)
        again = step + j >= c.stages
        mosaic.barrier_wait(r.narrow_full.at[slot])

        pl.when(again)(lambda: mosaic.barrier_wait(r.k_free.at[stage]))
        widen(k, r.k_narrow_smem.at(slot), r.k_smem.at(stage), scales.key)
        mosaic.commit_smem()
        mosaic.barrier_arrive(r.k_full.at[stage])

        pl.when(again)(lambda: mosaic.barrier_wait(r.v_free.at[stage]))
        v_smem = r.v_smem.at(stage)
        widen(k, r.v_narrow_smem.at(slot), v_smem, scales.value)

        @pl.when(hidden.some)
        def _() -> None:
            mosaic.commit_smem()  # it is read again
            for row in range(0, c.block_kv, ROWS):
                zero_hidden(v_smem, row, functools.partial(hidden.others, row))

        mosaic.commit_smem()  # after it, all threads have read the slot, too
        mosaic.barrier_arrive(r.v_full.at[stage])
        return *upcoming, upcoming_scales

    scales = PartScales.of(k, work, first[0])
    lax.fori_loop(0, tiles.walk.count, visit, (first[-1], tiles.pages(1), scales))
    return tiles.walk.count


def widen(
    k: Forward, narrow: mosaic.Matrix, target: mosaic.Matrix, scales: tuple[Any, ...]
) -> None:
    """Writes the products of a tile's numbers and the scales of its parts, in 16 bits."""
    of_part = k.config.block_kv // len(scales)
    for row in range(0, k.config.block_kv, ROWS):
        rows = pl.ds(row, ROWS)
        parts = scales[row // of_part : -(-(row + ROWS) // of_part)]
        factor = by_row(parts, of_part)
        for (source, _, _), (place, _, _) in zip(narrow.strips(), target.strips(), strict=True):
            x = mosaic.floating(mosaic.load_matrix(source.tiled.at[rows]))
            wide = x * mosaic.spread_rows(factor, x.shape)
            mosaic.store(place.tiled.at[rows], wide.astype(k.problem.dtype))


def by_row(parts: tuple[Any, ...], rows_each: int) -> jax.Array:
    """For each of 64 rows the number of the part that it is in."""
    *others, last = parts
    found = mosaic.full((ROWS,), last, jnp.float32)
    if others:
        row = mosaic.row_iota(ROWS)
        for i, number in reversed(list(enumerate(others))):
            found = jnp.where(row < (i + 1) * rows_each, number, found)
    return found
