"""dQ is rounded by the kernel that adds it up, as soon as all has been added to it.

Sums in float32 are twice as large as what they are rounded to, and 16k tokens of them more than the
L2 cache holds: another kernel would read them from memory. Here the producer does it between its
copies, part by part, section by section of the schedule: heads that are worked on together. Which
tiles of keys are done the producers tell each other. Consumers only help to round what is left in
the end.

They wait only for tiles that others took before. So that nobody waits for ever, however many blocks
run at the same time, none has a tile before it runs (`Kernel.takes_first`).
"""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.hopper.backward_kernel import CONSUMERS, Backward, of_one
from pallas_kernels.hopper.config import ROWS


class Parts(NamedTuple):
    """How sums are cut into parts, in the order of the schedule."""

    sections: int
    tiles: int  # of keys, in a section
    heads: int  # of queries, in a section
    row_tiles: int  # of 64 rows, of a head
    strips: int  # of a row tile
    of_strip: int

    @classmethod
    def of(cls, k: Backward) -> "Parts":
        s = k.schedule
        tiles = s.heads_at_once * s.q_blocks  # of keys, which is what the schedule is of
        row_tiles = pl.cdiv(k.problem.T, k.config.block_q) * k.config.block_q // ROWS
        of_strip = k.config.width // mosaic.PART_WIDTH
        heads = s.heads_at_once * k.members
        return cls(s.tiles // tiles, tiles, heads, row_tiles, k.forms.q.strips, of_strip)

    @property
    def of_section(self) -> int:
        return self.heads * self.row_tiles * self.strips * self.of_strip

    @property
    def number(self) -> int:
        return self.sections * self.of_section


class Rounding(NamedTuple):
    """Which parts a block rounds: one, that which comes after as many as there are blocks, ..."""

    k: Backward
    done: mosaic.Ref  # [sections]: how many tiles of keys are done

    @classmethod
    def of(cls, k: Backward) -> "Rounding":
        return cls(k, mosaic.counters(Parts.of(k).sections))

    def added(self) -> None:
        """A consumer tells the producer that all is added of the tiles before, if any.

        It does so after the first visit of each tile, not to wait for what is on its way, and in
        the end.
        """
        mosaic.wait_smem_to_gmem(0)
        mosaic.barrier_arrive(self.k.refs.added)

    def tell(self, tile: Any, exists: Any) -> None:
        """The producer tells the other blocks of a tile of keys, if any, as consumers tell it."""
        mosaic.barrier_wait(self.k.refs.added)
        section = lax.div(tile, Parts.of(self.k).tiles)
        pl.when(exists)(lambda: mosaic.count_up(self.done, section))

    def leave(self, part: Any) -> None:
        """The producer leaves this part and those after it to all warpgroups."""
        self.k.refs.numbers[self.k.place_of_part] = part

    def end(self, me: Any) -> None:
        """All warpgroups of the block, numbered, round what is left."""
        parts, step = Parts.of(self.k), (CONSUMERS + 1) * self.k.blocks
        first = mosaic.uniform(self.k.refs.numbers[self.k.place_of_part]) + me * self.k.blocks

        @pl.loop(0, lax.div(jnp.maximum(parts.number - first, 0) + step - 1, step))
        def _(i: Any) -> None:
            self.round(first + i * step, step, is_first=i == 0)

    def round(self, part: Any, step: int, *, is_first: Any = False) -> None:
        """Rounds a part; before the first one of a section it waits until this is done."""
        k, parts = self.k, Parts.of(self.k)
        section, number = lax.div(part, parts.of_section), lax.rem(part, parts.of_section)
        pl.when(is_first | (number < step))(
            lambda: mosaic.wait_count(self.done, section, parts.tiles)
        )
        rest, of_strip = lax.div(part, parts.of_strip), lax.rem(part, parts.of_strip)
        rest, strip = lax.div(rest, parts.strips), lax.rem(rest, parts.strips)
        rest, row_tile = lax.div(rest, parts.row_tiles), lax.rem(rest, parts.row_tiles)
        head = k.schedule.head(rest, k.problem.B * k.problem.N)
        batch, head = lax.div(head, k.problem.N), lax.rem(head, k.problem.N)
        rounded = k.refs.rounded_gmem
        assert rounded is not None
        found = mosaic.load_part(
            k.refs.dq_gmem.at[0, batch, row_tile, head, strip],
            of_strip,
            is_staged=not k.config.by_columns,
        )
        factor: Any = k.problem.scale
        units = k.units(batch, head, row_tile * ROWS)
        if units is not None:
            factor = mosaic.spread_rows(of_one(units) * factor, found.shape)
        column = strip * k.config.width + of_strip * mosaic.PART_WIDTH
        place = row_tile * ROWS, column
        value = (found * factor).astype(rounded.dtype)
        mosaic.store_rows(rounded.at[batch, :, head], value, place)


class Beside(NamedTuple):
    """What the producer does of it while it copies for a tile of keys.

    With the visit for which it had to wait until the consumers were done with the first one, or
    with the last visit, it tells of the tile before. Then it rounds; to wait for others before it
    has told what these may wait for would be for ever.
    """

    rounding: Rounding
    last: Any  # the tile before
    exists: Any  # whether there is one
    due: Any  # the visit with which it tells
    limit: Any  # the first part that is not to be rounded with this tile

    @classmethod
    def of(cls, rounding: Rounding, round_: Any, last: Any, tile: Any, visits: Any) -> "Beside":
        """A section is likely to be done two tiles of each block after its last one."""
        k, parts = rounding.k, Parts.of(rounding.k)
        sections = lax.div(jnp.maximum(tile - 2 * k.blocks, 0), parts.tiles)
        limit = jnp.minimum(sections, parts.sections) * parts.of_section
        return cls(rounding, last, round_ > 0, jnp.minimum(visits - 1, k.config.stages), limit)

    def after_copies(self, visit: Any, part: Any) -> Any:
        """Of a visit; returns the next part."""
        pl.when(visit == self.due)(lambda: self.rounding.tell(self.last, self.exists))
        may, blocks = (visit >= self.due) & (part < self.limit), self.rounding.k.blocks
        pl.when(may)(lambda: self.rounding.round(part, blocks))
        return part + jnp.where(may, blocks, 0)
