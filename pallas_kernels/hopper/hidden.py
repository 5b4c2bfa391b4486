"""Keys that nobody sees: what their values are must not matter, be it NaN."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.common import visits
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.kernel import Kernel


def zero_hidden(matrix: mosaic.Matrix, row: int, seen: Callable[[Any], jax.Array]) -> None:
    """Zeroes 64 rows of a matrix but for those that ``seen``, given a shape, says are seen."""
    for strip, _, _ in matrix.strips():
        part = strip.tiled.at[pl.ds(row, ROWS)]
        values = mosaic.load_matrix(part)
        mosaic.store(part, mosaic.kept_rows(values, seen(values.shape)))


class Hidden(NamedTuple):
    """Which keys of a tile nobody sees."""

    some: Any  # whether there are any
    key0: Any
    start: Any  # keys before are hidden
    stop: Any  # this and those after are hidden
    flags: Any  # [keys] int8, zero where hidden; or None

    @classmethod
    def of(cls, k: Kernel, work: Any, kv_block: Any, by_data: Callable[[], Any] | None) -> "Hidden":
        """The hidden keys of a tile; ``by_data`` is what a map of tiles says of ``some``."""
        p, x, seen = k.problem, k.refs.x, k.refs.map and k.refs.map.seen
        rows = visits.row_count(p, x, work.batch)
        keys = visits.key_count(p, x, work.batch)
        if x.query_lengths is not None:
            keys = jnp.where(rows > 0, keys, 0)
        key0 = kv_block * k.config.block_kv
        start, stop = visits.band_of(p, x, work.batch).any_keys(0, rows, keys)
        end = key0 + k.config.block_kv
        beyond = stop
        if x.page_table is None:  # what is beyond the array's end TMA has zeroed
            beyond = jnp.where(stop == p.S, p.S + k.config.block_kv, stop)
        some = (key0 < start) | (end > beyond)
        if by_data is None:
            return cls(some, key0, start, stop, None)
        heads = visits.heads_of(seen, work.batch, work.head)
        return cls(some | by_data(), key0, start, stop, seen.at[*heads])

    def zero(self, matrix: mosaic.Matrix, rows: int) -> None:
        """Zeroes those of a tile's rows that belong to hidden keys."""
        # Parts may overlap: what is zeroed twice is zero.
        for row in (*range(0, rows - ROWS, ROWS), rows - ROWS):
            zero_hidden(matrix, row, functools.partial(self.others, row))

    def others(self, row: int, shape: tuple[int, ...]) -> jax.Array:
        """Which elements of a part of V belong to keys that somebody sees."""
        first = self.key0 + row
        key = first + mosaic.iota(shape, 0)
        seen = (self.start <= key) & (key < self.stop)
        if self.flags is not None:
            flags = mosaic.load_rows(self.flags.at[pl.ds(first, shape[0])])
            seen &= mosaic.spread_rows(flags.astype(jnp.int32), shape) > 0
        return seen
