"""dQ is rounded by the kernel that adds it up, as soon as all has been added to it.

Sums in float32 are twice as large as what they are rounded to, and 16k tokens of them more than the
L2 cache holds: another kernel would read them from memory. Here the consumers do it, section by
section of the schedule, heads that are worked on together. With each tile of keys they round a
share of the section before, which is done by then: nobody waits long. The last one they round
together in the end.

They wait only for tiles that others took before. So that nobody waits for ever, however many blocks
run at the same time, none has a tile before it runs (`Kernel.takes_first`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.hopper.backward_kernel import CONSUMERS, Backward
from pallas_kernels.hopper.config import ROWS


class Section(NamedTuple):
    """Sizes of a section of the schedule."""

    number: int  # of sections
    tiles: int  # of keys
    row_tiles: int  # of 64 rows, of a head
    heads: int  # of queries

    @classmethod
    def of(cls, k: Backward) -> "Section":
        s = k.schedule
        tiles = s.heads_at_once * s.q_blocks  # of keys, which is what the schedule is of
        row_tiles = pl.cdiv(k.problem.T, k.config.block_q) * k.config.block_q // ROWS
        return cls(s.tiles // tiles, tiles, row_tiles, s.heads_at_once * k.members)

    @property
    def parts(self) -> int:
        """Of 64 rows of a head each."""
        return self.heads * self.row_tiles


class Rounding(NamedTuple):
    """What a consumer does of it."""

    k: Backward
    me: Any
    put_rows: Callable[[list[jax.Array], mosaic.Ref], None]  # see `Order`
    done: mosaic.Ref  # [sections]: how many consumers are done with tiles of keys

    @classmethod
    def of(
        cls, k: Backward, me: Any, put_rows: Callable[[list[jax.Array], mosaic.Ref], None]
    ) -> "Rounding":
        return cls(k, me, put_rows, mosaic.counters(Section.of(k).number))

    def begin(self, tile: Any) -> None:
        """Notes which tile of keys comes: in shared memory, for visits leave no register."""
        self.k.refs.tile_smem[self._note] = tile

    def go_on(self) -> None:
        """Tells that the tile is done; rounds its share of the section before its own."""
        s, tile = Section.of(self.k), mosaic.uniform(self.k.refs.tile_smem[self._note])
        section, number = lax.div(tile, s.tiles), lax.rem(tile, s.tiles)
        mosaic.count_up(self.done.at[section])

        @pl.when(section > 0)
        def _() -> None:
            first, stop = (lax.div((number + i) * s.parts, s.tiles) for i in (0, 1))
            self._round(section - 1, first + self.me, stop, CONSUMERS)

    def end(self) -> None:
        """Rounds this consumer's share of the last section."""
        s = Section.of(self.k)
        first = CONSUMERS * lax.axis_index("block") + self.me
        self._round(s.number - 1, first, s.parts, CONSUMERS * self.k.blocks)

    @property
    def _note(self) -> Any:
        return self.k.config.numbers + self.me

    def _round(self, section: Any, first: Any, stop: Any, step: int) -> None:
        """Rounds every ``step``-th part of a section from the first one on, once it is done."""
        k, s = self.k, Section.of(self.k)
        mosaic.wait_count(self.done.at[section], CONSUMERS * s.tiles)

        @pl.loop(0, lax.div(jnp.maximum(stop - first, 0) + step - 1, step))
        def _(i: Any) -> None:
            head, row_tile = (f(first + i * step, s.row_tiles) for f in (lax.div, lax.rem))
            batch, head = (f(section * s.heads + head, k.problem.N) for f in (lax.div, lax.rem))
            sums = k.refs.dq_gmem.at[0, batch, row_tile, head]
            strips = [
                mosaic.fetch(sums.at[strip], k.config.width) * k.problem.scale
                for strip in range(k.forms.q.strips)
            ]
            assert k.refs.rounded_gmem is not None
            rows = k.refs.rounded_gmem.at[batch, pl.ds(row_tile * ROWS, ROWS), head]
            self.put_rows([x.astype(k.problem.dtype) for x in strips], rows)
