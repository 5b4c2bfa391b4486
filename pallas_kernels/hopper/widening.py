"""The producers where keys and values are in pages of 8 bits: they copy them, and widen them.

What TMA brings has rings of its own in shared memory,

    k_narrow_smem [narrow_stages, block_kv, H]
    v_narrow_smem [narrow_stages, block_kv, Hv]

A producer's warpgroup reads each tile and writes it in float16 where the consumers look for it. How
many instructions that takes for each element limits decoding: it is not even multiplied with its
scale. Scales are passed on beside the keys, that of keys for their products with queries, that of
values for the probabilities. Keys and values have a warpgroup each.

Page numbers and scales are in global memory. Numbers are loaded a visit before they are needed;
scales, which no other block has read, as many as there are registers for.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.hidden import Hidden
from pallas_kernels.hopper.kernel import Forward, drain, next_tile
from pallas_kernels.hopper.source import Source, existing, pages_of
from pallas_kernels.spec.narrow import LEAST

_SCALES_AHEAD = 6  # of parts of tiles


class Lane(NamedTuple):
    """Keys or values: where they are, and the barriers of those who widen them."""

    gmem: Any
    narrow: mosaic.Matrix  # [narrow_stages, block_kv, columns]
    arrived: mosaic.Ref
    wide: mosaic.Matrix  # [stages, block_kv, columns]
    full: mosaic.Ref
    free: mosaic.Ref
    is_value: bool

    @classmethod
    def of(cls, k: Forward, is_value: bool) -> "Lane":
        r = k.refs
        of_key = r.x.key, r.k_narrow_smem, r.k_narrow_full, r.k_smem, r.k_full, r.k_free
        of_value = r.x.value, r.v_narrow_smem, r.v_narrow_full, r.v_smem, r.v_full, r.v_free
        return cls(*(of_value if is_value else of_key), is_value)


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

    @property
    def scales_ahead(self) -> int:
        """How many visits before they are passed on scales are loaded."""
        return max(1, _SCALES_AHEAD // self.k.forms.parts)

    def pages(self, j: Any) -> tuple[Any, ...]:
        """`pages_of` a visit's keys; of some, if there is no such visit."""
        return pages_of(self.k, self.work, self.walk.tile(j))

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


def widen_alone(k: Forward, lane: Lane) -> None:
    """Brings a lane's part of each tile of this block, as the other producer takes them."""
    c, r, zero = k.config, k.refs, jnp.int32(0)

    def taken(round_: Any) -> Any:
        tile, _ = next_tile(k, round_)
        mosaic.barrier_arrive(r.q_free.at[lax.rem(round_, c.q_stages)])
        return tile

    def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        round_, step, tile = carry
        count = widen_each(k, lane, k.schedule.work(tile), step)
        return round_ + 1, step + count, taken(round_ + 1)

    state = (zero, zero, taken(zero))
    _, steps, _ = lax.while_loop(lambda carry: carry[2] < k.schedule.tiles, one, state)
    drain(steps, c.stages, lane.free)


def widen_each(k: Forward, lane: Lane, work: Work, step: Any) -> Any:
    """Brings what a lane has for a tile of queries, with keys their scales; returns the visits."""
    c, tiles = k.config, Tiles(k, lane, work, k.walk(work), step)
    ahead, of_scales = tiles.ahead, tiles.ahead if lane.is_value else tiles.scales_ahead
    near, far = sorted((ahead, of_scales))
    first = [tiles.pages(j) for j in range(far + 1)]
    for j in range(ahead):
        tiles.start(j, first[j])

    def visit(j: Any, carry: Any) -> Any:
        pages, scales = carry  # of visits from j + near to j + far; from j on
        tiles.start(j + ahead, pages[ahead - near])
        now = scales[:1]
        if not lane.is_value:
            scales = *scales[1:], tiles.scales(pages[of_scales - near])
        pages = *pages[1:], tiles.pages(j + far + 1)
        hidden = Hidden.of(k, work, tiles.walk.tile(j), None)
        stage, slot = lax.rem(step + j, c.stages), tiles.slot(j)
        mosaic.barrier_wait(lane.arrived.at[slot])
        pl.when(step + j >= c.stages)(lambda: mosaic.barrier_wait(lane.free.at[stage]))
        widen(k, lane.narrow.at(slot), lane.wide.at(stage))
        if lane.is_value:
            clean(hidden, lane.wide.at(stage), c.block_kv)
        else:
            pass_scales(k, hidden, stage, *now)
        mosaic.commit_smem()  # after it, all threads have read the slot, too
        mosaic.barrier_arrive(lane.full.at[stage])
        return pages, scales

    scales = () if lane.is_value else tuple(map(tiles.scales, first[:of_scales]))
    lax.fori_loop(0, tiles.walk.count, visit, (tuple(first[near:]), scales))
    return tiles.walk.count


def clean(hidden: Hidden, v_smem: mosaic.Matrix, rows: int) -> None:
    """Zeroes the rows of values that nobody sees."""

    @pl.when(hidden.some)
    def _() -> None:
        mosaic.commit_smem()  # it is read again
        hidden.zero(v_smem, rows)


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
