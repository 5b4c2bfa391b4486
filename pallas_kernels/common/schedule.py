"""In which order a persistent grid works on the tiles of queries."""

import dataclasses
from typing import Any, NamedTuple

from jax import lax


class Work(NamedTuple):
    """One tile of queries."""

    batch: Any
    head: Any
    q_block: Any
    split: Any = 0  # which part of the keys


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An order of tiles, of which each block takes the next one when it is done with its last.

    Tiles that run at the same time read the same keys and values: all of ``heads_at_once`` heads,
    then the next heads. Within them the last queries come first, which under a causal mask are the
    ones with most to do: the short tiles at the end even out when blocks finish. Where keys are
    split, the first parts of all tiles come first: what runs at the same time reads the same
    tokens' heads, which are neighbours in memory.
    """

    batch: int
    heads: int
    q_blocks: int
    heads_at_once: int  # divides batch * heads
    splits: int = 1  # of the keys that each tile of queries sees
    last_head_first: bool = False  # its operands were written last, and are in the L2 cache

    def __post_init__(self) -> None:
        if self.batch * self.heads % self.heads_at_once:
            raise ValueError(
                f"heads_at_once must divide {self.batch * self.heads}; got {self.heads_at_once}"
            )

    @property
    def tiles(self) -> int:
        return self.batch * self.heads * self.q_blocks * self.splits

    def head(self, place: Any, number: int) -> Any:
        """Which of all batch elements' heads, of so many, comes at a place of their order."""
        return number - 1 - place if self.last_head_first else place

    def work(self, tile: Any) -> Work:
        """The tile that comes at a place of the order."""
        split: Any = 0
        if self.splits > 1:
            of_split = self.tiles // self.splits
            split, tile = lax.div(tile, of_split), lax.rem(tile, of_split)
        of_section = self.heads_at_once * self.q_blocks
        section, tile = lax.div(tile, of_section), lax.rem(tile, of_section)
        place = section * self.heads_at_once + lax.rem(tile, self.heads_at_once)
        head = self.head(place, self.batch * self.heads)
        q_block = self.q_blocks - 1 - lax.div(tile, self.heads_at_once)
        return Work(lax.div(head, self.heads), lax.rem(head, self.heads), q_block, split)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is at most ``max(limit, 1)``."""
    return max(d for d in range(1, max(1, min(number, limit)) + 1) if number % d == 0)
