"""The producers where keys and values are in pages of 8 bits: they copy them, and widen them.

What TMA brings has a ring of its own in shared memory. A producer's warpgroup reads each tile and
writes it in float16 where the consumers look for it. What limits decoding is how many instructions
that takes for each element: it is not even multiplied with its scale. Scales are passed on beside
the keys, that of keys for their products with queries, that of values for the probabilities. Keys
and values have a warpgroup each.

Page numbers and scales are in global memory. Numbers are loaded a visit before they are needed;
scales, which no other block has read, as many as there are registers for.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.hidden import Hidden, zero_hidden
from pallas_kernels.hopper.kernel import Forward, drain, next_tile
from pallas_kernels.hopper.source import Source, existing, pages_of
from pallas_kernels.spec.narrow import LEAST

_SCALES_AHEAD = 6  # of parts of tiles


class Lane(NamedTuple):
    """Keys or values: where they are, and on which barriers those wait who pass them on."""

    gmem: Any
    narrow: mosaic.Matrix  # [narrow_stages, block_kv, columns]
    arrived: mosaic.Ref
    wide: mosaic.Matrix  # [stages, block_kv, columns]
    full: mosaic.Ref
    free: mosaic.Ref
    passes_scales: bool


class Tiles(NamedTuple):
    """The tiles of a lane that a tile of queries visits."""

    k: Forward
    lane: Lane
    work: Work
    walk: Walk
    step: Any  # how many visits there were before

    @property
    def ahead(self) -> int:
        """How many visits before it is widened a tile is copied."""
        return self.k.forms.narrow_stages - 1

    def pages(self, j: Any) -> tuple[Any, ...]:
        """`pages_of` a visit's keys; of some, if there is no such visit."""
        return pages_of(self.k, self.work, self.walk.tile(j))

    @property
    def scales_ahead(self) -> int:
        """How many visits before they are passed on scales are loaded; 0 if they are not."""
        return max(1, _SCALES_AHEAD // self.k.forms.parts) if self.lane.passes_scales else 0

    def scales(self, pages: tuple[Any, ...]) -> tuple[tuple[Any, Any], ...]:
        """Of the keys and the values of the parts of a tile."""
        x, head, found = self.k.refs.x, self.k.kv_head(self.work), existing(self.k, pages)
        return tuple((x.key_scale[page, head], x.value_scale[page, head]) for page in found)

    def slot(self, j: Any) -> Any:
        return lax.rem(self.step + j, self.k.forms.narrow_stages)

    def start(self, j: Any, pages: tuple[Any, ...]) -> None:
        """Starts to copy what a visit needs, if there is such a visit."""
        x, slot = self.lane, self.slot(j)

        @pl.when(j < self.walk.count)
        def _() -> None:
            source = Source.of(self.k, self.work, self.walk.tile(j), pages)
            source.copy(x.gmem, x.narrow.at(slot), x.arrived.at[slot])


def widen_keys(k: Forward, work: Work, step: Any) -> Any:
    """Brings K of each visit of a tile of queries; returns how many there are."""
    x, r = k.refs.x, k.refs
    lane = Lane(x.key, r.k_narrow_smem, r.k_narrow_full, r.k_smem, r.k_full, r.k_free, True)
    return widen_each(k, lane, work, step, functools.partial(pass_scales, k))


def widen_values(k: Forward) -> None:
    """Brings V of each tile of this block, as the other producer takes them."""
    c, r, x, zero = k.config, k.refs, k.refs.x, jnp.int32(0)
    lane = Lane(x.value, r.v_narrow_smem, r.v_narrow_full, r.v_smem, r.v_full, r.v_free, False)

    def clean(hidden: Hidden, stage: Any) -> None:
        v_smem = lane.wide.at(stage)

        @pl.when(hidden.some)
        def _() -> None:
            mosaic.commit_smem()  # it is read again
            for row in range(0, c.block_kv, ROWS):
                zero_hidden(v_smem, row, functools.partial(hidden.others, row))

    def taken(round_: Any) -> Any:
        tile, _ = next_tile(k, round_)
        mosaic.barrier_arrive(r.q_free.at[lax.rem(round_, c.q_stages)])
        return tile

    def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        round_, step, tile = carry
        count = widen_each(k, lane, k.schedule.work(tile), step, clean)
        return round_ + 1, step + count, taken(round_ + 1)

    state = (zero, zero, taken(zero))
    _, steps, _ = lax.while_loop(lambda carry: carry[2] < k.schedule.tiles, one, state)
    drain(steps, c.stages, r.v_free)


def widen_each(k: Forward, lane: Lane, work: Work, step: Any, finish: Callable[..., None]) -> Any:
    """Brings a lane's tiles for a tile of queries; returns their number.

    ``finish`` is called for each with its hidden keys, its stage, and its scales where they are
    passed on.
    """
    c, tiles = k.config, Tiles(k, lane, work, k.walk(work), step)
    first = [tiles.pages(j) for j in range(tiles.ahead + 1)]
    for j in range(tiles.ahead):
        tiles.start(j, first[j])

    def visit(j: Any, carry: Any) -> Any:
        to_copy, following, scales = carry
        tiles.start(j + tiles.ahead, to_copy)
        to_copy = tiles.pages(j + tiles.ahead + 1)
        now, upcoming = scales[:1], scales[1:]
        if scales:
            upcoming = *upcoming, tiles.scales(following)
            following = tiles.pages(j + tiles.scales_ahead + 1)
        stage, slot = lax.rem(step + j, c.stages), tiles.slot(j)
        mosaic.barrier_wait(lane.arrived.at[slot])
        pl.when(step + j >= c.stages)(lambda: mosaic.barrier_wait(lane.free.at[stage]))
        widen(k, lane.narrow.at(slot), lane.wide.at(stage))
        finish(Hidden.of(k, work, tiles.walk.tile(j), None), stage, *now)
        mosaic.commit_smem()  # after it, all threads have read the slot, too
        mosaic.barrier_arrive(lane.full.at[stage])
        return to_copy, following, upcoming

    of_scales = [tiles.pages(j) for j in range(tiles.scales_ahead + 1)]
    scales = tuple(tiles.scales(pages) for pages in of_scales[:-1])
    lax.fori_loop(0, tiles.walk.count, visit, (first[-1], of_scales[-1], scales))
    return tiles.walk.count


def widen(k: Forward, narrow: mosaic.Matrix, target: mosaic.Matrix) -> None:
    """Writes a tile's numbers in float16."""
    ((source, *_),) = narrow.strips()
    for row in range(0, k.config.block_kv, ROWS):
        rows = pl.ds(row, ROWS)
        numbers = mosaic.half(mosaic.load_matrix(source.tiled.at[rows]))
        for place, start, width in target.strips():
            mosaic.store(place.tiled.at[rows], numbers[:, start : start + width])


def pass_scales(k: Forward, hidden: Hidden, stage: Any, scales: tuple[Any, ...]) -> None:
    """Tells the consumers the scales of a tile's parts; those of keys that nobody sees are 1."""
    keys = k.config.block_kv // len(scales)
    for part, numbers in enumerate(scales):
        key0 = hidden.key0 + part * keys
        seen = (key0 < hidden.stop) & (key0 + keys > hidden.start)
        of_key, of_value = (jnp.where(seen, jnp.maximum(x, LEAST), 1.0) for x in numbers)
        k.refs.kv_scale_smem[stage, part, 0] = of_key
        k.refs.kv_scale_smem[stage, part, 1] = jnp.log2(of_value)
