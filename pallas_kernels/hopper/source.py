"""Where tiles of keys and values are in global memory, in pages perhaps, and their copies."""

from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.common.schedule import Work
from pallas_kernels.hopper.kernel import Forward


def pages_of(k: Forward, work: Work, kv_block: Any) -> tuple[Any, ...]:
    """The page of each part of a tile of keys.

    What is not in the table, or in no page, is hidden by its length, or not visited: it gets some.
    """
    block_kv, table = k.config.block_kv, k.refs.x.page_table
    page_size = k.refs.x.key.shape[1]
    found = []
    for start in range(0, block_kv, min(page_size, block_kv)):
        key = kv_block * block_kv + start
        number = jnp.clip(lax.div(key, page_size), 0, table.shape[1] - 1)
        found.append(jnp.clip(table[work.batch, number], 0, k.refs.x.key.shape[0] - 1))
    return tuple(found)


class Source(NamedTuple):
    """Where a tile of keys is in global memory: parts of it, each in one piece."""

    places: tuple[Any, ...]  # of parts: indices of the array's axes
    rows: int  # of each

    @classmethod
    def of(cls, k: Forward, work: Work, kv_block: Any) -> "Source":
        """A tile."""
        block_kv, head = k.config.block_kv, k.kv_head(work)
        key0 = kv_block * block_kv
        if k.refs.x.page_table is None:
            return cls(((work.batch, pl.ds(key0, block_kv), head),), block_kv)
        pages = pages_of(k, work, kv_block)
        page_size = k.refs.x.key.shape[1]
        rows = block_kv // len(pages)
        starts = (lax.rem(key0 + i * rows, page_size) for i in range(len(pages)))
        return cls(
            tuple((p, pl.ds(start, rows), head) for p, start in zip(pages, starts, strict=True)),
            rows,
        )

    def of_values(self, k: Forward) -> "Source":
        """Where the values are: those of 8 bits are turned."""
        if k.refs.scales is None:
            return self
        ((batch, keys, head),) = self.places
        return Source(((batch, slice(None), head, keys),), self.rows)

    def copy(self, gmem: mosaic.Ref, target: mosaic.Matrix, barrier: mosaic.Ref) -> None:
        """Starts the copies of K or V."""
        if len(self.places) == 1:
            mosaic.copy_in(gmem.at[self.places[0]], target, barrier)
            return
        for i, place in enumerate(self.places):
            rows = pl.ds(i * self.rows, self.rows)
            mosaic.copy_rows_in(gmem.at[place], target, rows, barrier)
