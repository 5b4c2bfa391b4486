"""A few new tokens against a long cache: split-KV decoding (flash-decoding, Dao et al. 2023).

The time is that of reading keys and values once. So that one read serves all query heads of a group
and all new tokens, their rows are worked on as one tile of a single consumer; so that there is work
for every multiprocessor, the tiles of keys that it visits are divided among blocks, whose partial
outputs XLA merges. All else is the forward's: this kernel is the forward of rows that are packed
otherwise, and are columns of products where they are few (`orientation`), and of walks that are
parts.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels import mosaic, spec
from pallas_kernels.common import accepts, packing
from pallas_kernels.common.schedule import Schedule, Work
from pallas_kernels.common.walk import Walk, part, part_exists
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper.config import ROWS, Config, Sizes
from pallas_kernels.hopper.kernel import Forward
from pallas_kernels.hopper.launch import launch, supports

# The most stages, and the bytes of keys and values that are on their way to a block, unless two
# stages have more: with more all come more slowly, with less a block waits. Those of 8 bits wait
# for their consumer, too (bench/LOG.md, decoding).
_RING, _RING_TO_WIDEN = (6, 64 * 1024), (4, 96 * 1024)
# In bytes of keys and values that are read in the same time: what a part of a walk costs beside
# them, and what it costs that there are parts to merge. And what share of a part the last block is
# late by where sequences differ. The first two measured (bench/LOG.md, decoding), the third a
# compromise.
_COST_OF_PART, _COST_OF_MERGE, _LATE = 45_000, 40_000, 1 / 12
_MAX_PARTS = 32
# Of queries, with which products are turned; those of 8-bit numbers are, whatever the rows.
_FEW_ROWS, _FEW_ROWS_TO_WIDEN = (8, 16), (8, 16, 32)


class Decode(Forward):
    """The kernel; a tile's rows are new tokens, and within each the heads of a group."""

    def walk(self, work: Work) -> Walk:
        """The tiles of keys that a part of a tile of queries visits."""
        whole = self.whole_walk(work)
        parts = self.schedule.splits
        return whole if parts == 1 else part(whole, work.split, parts)

    def row_count(self, work: Work) -> Any:
        parts = self.schedule.splits
        if parts == 1:
            return None
        whole = self.whole_walk(work)
        return jnp.where(part_exists(whole, work.split, parts), self.problem.T, 0)

    def query(self, work: Work, rows: Any) -> mosaic.Ref:
        return self.refs.x.query.at[work.batch, work.head, rows]

    def out(self, work: Work, rows: Any) -> mosaic.Ref:
        return self.refs.out_gmem.at[work.batch, work.head, work.split, rows]

    def lse(self, work: Work, rows: Any) -> mosaic.Ref:
        return self.refs.lse_gmem.at[work.batch, work.head, work.split, rows]


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def decode(
    problem: spec.Problem,
    operands: spec.Operands,
    config: Config | None = None,
    splits: int | None = None,
    blocks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in float32.

    Args:
      problem: What `supports_decode` accepts.
      operands: Its arrays.
      config: Default: see `decode_config`.
      splits: How many parts the walk of a tile is divided into. Default: see `choose_splits`.
      blocks: Size of the grid. Default: one for each multiprocessor.
    """
    c = config or decode_config(problem)
    packed, x = packing.pack(problem, operands, c.block_q)
    q_blocks = pl.cdiv(packed.T, c.block_q)
    splits = splits or choose_splits(problem, c)
    schedule = Schedule(packed.B, packed.N, q_blocks, 1, splits)
    of_parts = (packed.B, packed.N, splits)
    out, lse = launch(
        Decode,
        packed,
        c,
        schedule,
        blocks,
        x,
        None,
        (*of_parts, packed.T, mosaic.copied_columns(packed.Hv)),
        (*of_parts, q_blocks * c.block_q),
    )
    out, lse = out[..., : packed.Hv], lse[..., : packed.T]
    if splits == 1 and operands.sinks is None:
        out, lse = out[:, :, 0], lse[:, :, 0]
    else:
        sinks = packing.by_row(problem, operands.sinks)
        out, lse = packing.merge(out, lse, sinks)
    out = packing.unpack(problem, out, problem.Hv).astype(problem.dtype)
    return out, packing.unpack(problem, lse, 1)[..., 0]


def decode_config(problem: spec.Problem) -> Config:
    """Small tiles, and as many stages as may be on their way.

    A consumer of 8-bit numbers has more to do for each tile, and had better have fewer.
    """
    p, rows = problem, _rows(problem)
    widens = p.operands.has_narrow_pages
    is_large = max(p.H, p.Hv) > 128 or rows > max(_FEW_ROWS)
    block_kv = 2 * ROWS if widens and not is_large else ROWS
    of_stage = block_kv * (p.H + p.Hv) * p.operands.key.dtype.itemsize
    most, in_flight = _RING_TO_WIDEN if widens else _RING
    for stages in range(min(max(in_flight // of_stage, 2), most), 1, -1):
        c = Config(
            consumers=1,
            block_kv=block_kv,
            stages=stages,
            q_stages=1,
            rows=rows,
            turned=widens or rows < ROWS,
        )
        if c.staging(p.H, p.Hv, Sizes.of(p.operands)) is not None:
            return c
    raise AssertionError("two stages always fit")


def _rows(problem: spec.Problem) -> int:
    """Of a tile of queries: as few as can be, if a product can have so few columns."""
    needed, widens = problem.T * problem.G, problem.operands.has_narrow_pages
    few = _FEW_ROWS_TO_WIDEN if widens else _FEW_ROWS
    fits = [rows for rows in few if rows >= needed]
    return fits[0] if fits and problem.Hv % ROWS == 0 else ROWS


def _tiles(problem: spec.Problem) -> int:
    """Of queries."""
    p = problem
    return p.B * p.K * pl.cdiv(p.T * p.G, ROWS)


def _keys(problem: spec.Problem) -> int:
    """How many a tile of queries may see."""
    p = problem
    return p.S if p.band.lo is None else min(p.S, p.T - p.band.lo)


def choose_splits(problem: spec.Problem, c: Config) -> int:
    """The number of parts with which the last block is done first, lengths being as they may be."""
    p, tiles = problem, _tiles(problem)
    keys = _keys(p)
    if keys < p.S:  # they may begin within a tile
        keys += c.block_kv
    visits = pl.cdiv(keys, c.block_kv)
    blocks = gpu.multiprocessors(p.device)
    of_visit = c.block_kv * (p.H + p.Hv) * p.operands.key.dtype.itemsize
    stored = 2 * min(p.T * p.G, c.block_q) * p.Hv * p.dtype.itemsize  # and read again

    def cost(splits: int) -> float:
        size = pl.cdiv(visits, splits) * of_visit
        rounds = pl.cdiv(tiles * splits, blocks)
        late = size * _LATE if p.B > 1 else 0.0
        merge = _COST_OF_MERGE if splits > 1 else 0.0
        return rounds * (size + stored + _COST_OF_PART) + late + merge

    return min(range(1, min(visits, _MAX_PARTS) + 1), key=cost)


def supports_decode(problem: spec.Problem) -> str | None:
    """Why this kernel cannot run a problem, or None."""
    p = problem
    if p.operands.has_narrow_pages and not {p.H, p.Hv} <= set(mosaic.WIDENED_COLUMNS):
        return f"widens heads of {mosaic.WIDENED_COLUMNS} columns; got {p.H=}, {p.Hv=}"
    return accepts.refused_tokens(p) or supports(p)
