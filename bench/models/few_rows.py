"""Products of a few rows with large matrices, as decoding needs them: the time is that of reading.

The rows are columns of Y^T = W^T X^T, of which a product may have as few as eight, and a matrix is
the left operand, from shared memory. It is cut into units, each of some columns and a share of the
rows, so that every multiprocessor has about as much to read; XLA adds up the shares. One warpgroup
copies tiles of units one after the other, the other one multiplies.

What is read next is not far: a kernel asks for the first tiles of the product that follows, so that
they come to the L2 cache while that one waits for its input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from jaxflash import device
from pallas_kernels import mosaic
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper.kernel import divide, drain

MOST_ROWS = 8  # the fewest columns of a product
_TILE = 128  # rows and columns of a matrix
_STAGES = 6
_MOST_SHARES = 8
_COST_OF_UNIT = 1  # in tiles
_REGISTERS = 160, 40  # of the thread that multiplies, and of the one that copies


class Plan(NamedTuple):
    """How matrices of as many rows, which lie side by side, are cut."""

    columns: tuple[int, ...]  # of each, in tiles
    rows: int  # in tiles
    shares: int  # that the rows are divided into

    @classmethod
    def of(cls, matrices: Sequence[jax.Array], blocks: int) -> Plan:
        columns = tuple(x.shape[1] // _TILE for x in matrices)
        rows = matrices[0].shape[0] // _TILE

        def cost(shares: int) -> int:
            return pl.cdiv(sum(columns) * shares, blocks) * (pl.cdiv(rows, shares) + _COST_OF_UNIT)

        return cls(columns, rows, min(range(1, min(rows, _MOST_SHARES) + 1), key=cost))

    @property
    def units(self) -> int:
        return sum(self.columns) * self.shares

    def unit(self, number: Any) -> tuple[Any, Any, Any, Any]:
        """Its share, its column of tiles, and its first row of tiles and the one after its last.

        Those that are worked on at the same time lie side by side.
        """
        share, column = lax.div(number, sum(self.columns)), lax.rem(number, sum(self.columns))
        first, stop = (lax.div((share + i) * self.rows, self.shares) for i in (0, 1))
        return share, column, first, stop

    def each_matrix(self, column: Any, act: Any) -> None:
        """Calls ``act`` with the number of the matrix that a column is of, and its column there."""
        start = 0
        for number, count in enumerate(self.columns):
            is_here = (column >= start) & (column < start + count)
            pl.when(is_here)(functools.partial(act, number, column - start))
            start += count


class Refs(NamedTuple):
    """Global memory, shared memory, barriers."""

    x: mosaic.Ref  # [R, rows, 128]
    matrices: Sequence[mosaic.Ref]  # [128 rows, columns, 128]
    following: Sequence[mosaic.Ref]  # of the product that comes next
    out: mosaic.Ref  # [shares, R, 128 columns] float32
    x_smem: mosaic.Matrix  # [stages, 8, 128]
    tile_smem: mosaic.Matrix  # [stages, 128, 128]
    full: mosaic.Ref
    free: mosaic.Ref


def supports(rows: int, sizes: Sequence[int]) -> bool:
    """Whether there are so few rows, matrices with such sizes are whole tiles, and a GPU for it."""
    runs = gpu.is_hopper(device.target()) or mosaic.is_interpreting()
    return runs and rows <= MOST_ROWS and not any(size % _TILE for size in sizes)


def products(
    x: jax.Array,
    matrices: Sequence[jax.Array],
    following: Sequence[jax.Array] = (),
    *,
    blocks: int | None = None,
    ahead: int = 4,
) -> jax.Array:
    """``x @ matrix`` of all matrices, side by side, in shares that are to be added.

    Args:
      x: bfloat16 [R, K], of up to `MOST_ROWS` rows.
      matrices: bfloat16 [K, N] each; 128 divides K and every N.
      following: those of the product that comes next.
      blocks: size of the grid. Default: one for each multiprocessor.
      ahead: of how many tiles of it each block asks.

    Returns:
      float32 [shares, R, columns of all matrices].
    """
    blocks = blocks or gpu.multiprocessors(device.target())
    plan = Plan.of(matrices, blocks)
    of_x, of_tile = (mosaic.Form.of(rows, _TILE) for rows in (MOST_ROWS, _TILE))

    def in_tiles(matrix: jax.Array) -> jax.Array:
        return of_tile.array(matrix.reshape(len(matrix), -1, _TILE))

    def few_rows_kernel(x_gmem: Any, *refs: Any) -> None:
        own, rest = refs[: len(matrices)], refs[len(matrices) :]
        later, (out, x_smem, tile_smem, full, free) = rest[: len(following)], rest[len(following) :]
        x_ring, ring = mosaic.Matrix.of(x_smem), mosaic.Matrix.of(tile_smem)
        r = Refs(x_gmem, own, later, out, x_ring, ring, full, free)

        def produce() -> None:
            steps = _produce(r, plan, blocks)
            if following:
                _ask_for(r, Plan.of(following, blocks), ahead)
            drain(steps, _STAGES, r.free)

        divide(1, _REGISTERS, lambda: _consume(r, plan, blocks), produce)

    columns = _TILE * sum(plan.columns)
    call = mosaic.kernel(
        few_rows_kernel,
        out_type=jax.ShapeDtypeStruct((plan.shares, len(x), columns), jnp.float32),
        scratch_types=[
            of_x.smem(_STAGES, dtype=x.dtype),
            of_tile.smem(_STAGES, dtype=x.dtype),
            mosaic.Barrier(num_barriers=_STAGES, num_arrivals=of_tile.copies + of_x.copies),
            mosaic.Barrier(num_barriers=_STAGES),
        ],
        grid={"block": blocks},
        threads=("warpgroup", 2),
        params=mosaic.compiler_params(unsafe_no_auto_barriers=True),
    )
    return call(in_tiles(x), *map(in_tiles, matrices), *map(in_tiles, following))


def _produce(r: Refs, plan: Plan, blocks: int) -> Any:
    """Copies tiles of X and of a matrix into the ring, unit by unit; returns how many."""

    def copy(column: Any, row: Any, step: Any) -> None:
        stage = lax.rem(step, _STAGES)
        pl.when(step >= _STAGES)(lambda: mosaic.barrier_wait(r.free.at[stage]))
        # Opaque: there may be fewer rows.
        mosaic.copy_in(
            r.x.at[pl.ds(mosaic.opaque(0), MOST_ROWS), row], r.x_smem.at(stage), r.full.at[stage]
        )

        def copy_tile(number: int, at: Any) -> None:
            rows = pl.ds(row * _TILE, _TILE)
            tile = r.matrices[number].at[rows, at]
            mosaic.copy_in(tile, r.tile_smem.at(stage), r.full.at[stage])

        plan.each_matrix(column, copy_tile)

    def unit(round_: Any, step: Any) -> Any:
        number = lax.axis_index("block") + round_ * blocks
        _, column, first, stop = plan.unit(number)
        lax.fori_loop(first, stop, lambda row, _: copy(column, row, step + row - first), None)
        return step + stop - first

    return lax.fori_loop(0, _rounds(plan, blocks), unit, jnp.int32(0))


def _ask_for(r: Refs, plan: Plan, ahead: int) -> None:
    """The first tiles of the unit that this block begins with in the next product."""
    _, column, first, stop = plan.unit(lax.axis_index("block"))

    def ask(number: int, at: Any) -> None:
        @pl.loop(first, jnp.minimum(first + ahead, stop))
        def _(row: Any) -> None:
            mosaic.prefetch(r.following[number].at[pl.ds(row * _TILE, _TILE), at])

    pl.when(lax.axis_index("block") < plan.units)(lambda: plan.each_matrix(column, ask))


def _consume(r: Refs, plan: Plan, blocks: int) -> None:
    """Multiplies, and stores the sums of a unit."""
    rows = r.out.shape[1]

    def unit(round_: Any, step: Any) -> Any:
        share, column, first, stop = plan.unit(lax.axis_index("block") + round_ * blocks)

        def multiply(row: Any, total: jax.Array) -> jax.Array:
            stage = lax.rem(step + row - first, _STAGES)
            mosaic.barrier_wait(r.full.at[stage])
            (view,) = r.x_smem.at(stage).views
            (total,) = mosaic.start_turned(r.tile_smem.at(stage), view.tiled, (total,))
            total = mosaic.settle(total)
            mosaic.barrier_arrive(r.free.at[stage])
            return total

        zero = mosaic.full((_TILE, MOST_ROWS), 0, jnp.float32)
        total = lax.fori_loop(first, stop, multiply, zero)
        columns = pl.ds(column * _TILE, _TILE)
        index = mosaic.iota(total.shape, 1)
        for i in range(rows):
            of_row = jnp.sum(jnp.where(index == i, total, 0.0), axis=1)
            mosaic.store(r.out.at[share, i, columns], of_row, optimized=False)
        return step + stop - first

    lax.fori_loop(0, _rounds(plan, blocks), unit, jnp.int32(0))


def _rounds(plan: Plan, blocks: int) -> Any:
    """How many units this block has."""
    return lax.div(plan.units - lax.axis_index("block") + blocks - 1, blocks)
