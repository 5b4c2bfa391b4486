"""What the operands say of a tile of logits, loaded from global memory into registers.

TMA copies what there is of a tile, loads into registers do not look where an array ends. So
`prepare` pads what is loaded, arrays that say something of rows or keys, and leaves alone what is
copied: queries, keys and values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common import evaluate, visits
from pallas_kernels.common.schedule import Work

# A thread holds pairs of columns: all its columns are these bits of the first one plus a constant.
_COLUMN_BITS = 6


def in_kernel(problem: spec.Problem) -> spec.Problem:
    """The problem with functions that a kernel can call."""
    return evaluate.in_kernel(problem, mosaic.gather)


def prepare(
    problem: spec.Problem, x: spec.Operands, rows: int, keys: int, *, turned: bool = False
) -> spec.Operands:
    """The operands as `tile_of` reads them, with ``rows`` and ``keys`` of whole tiles.

    For a turned tile, bias and mask have keys before rows: a thread reads pairs of columns.
    """

    def cover(y: Any, axis: int, size: int, *, broadcasts: bool = True) -> Any:
        if y is None or y.shape[axis] == size or (broadcasts and y.shape[axis] == 1):
            return y
        widths = [(0, size - n if i == axis else 0) for i, n in enumerate(y.shape)]
        return jnp.pad(y, widths)

    def matrix(y: Any) -> Any:
        y = cover(cover(y, 2, rows), 3, keys)
        return y.mT if turned and y is not None else y

    mask = None if x.mask is None else x.mask.astype(jnp.int8)
    return x._replace(
        bias=matrix(x.bias),
        mask=matrix(mask),
        query_segment_ids=cover(x.query_segment_ids, 1, rows, broadcasts=False),
        key_value_segment_ids=cover(x.key_value_segment_ids, 1, keys, broadcasts=False),
        score_consts=evaluate.flat(x.score_consts),
        mask_consts=evaluate.flat(x.mask_consts),
    )


class Span(NamedTuple):
    """Where a tile of logits lies."""

    row0: Any
    key0: Any
    shape: tuple[int, int]  # of the matrix
    turned: bool = False  # the matrix is S^T: its rows are keys

    @property
    def rows(self) -> tuple[Any, int]:
        return self.row0, self.shape[1 if self.turned else 0]

    @property
    def keys(self) -> tuple[Any, int]:
        return self.key0, self.shape[0 if self.turned else 1]

    def load(self, ref: mosaic.Ref, *, by_row: bool) -> jax.Array:
        """A vector with an entry for each row of the logits, or for each key, as a matrix."""
        load = mosaic.load_rows if by_row != self.turned else mosaic.load_columns
        return self.spread(load(ref), by_row=by_row)

    def spread(self, x: jax.Array, *, by_row: bool) -> jax.Array:
        """Such a vector as a matrix."""
        spread = mosaic.spread_rows if by_row != self.turned else mosaic.spread_columns
        return spread(x, self.shape)


def tile_of(
    problem: spec.Problem,
    x: spec.Operands,  # references
    work: Work,
    span: Span,
    masked: bool,
    keys_end: bool,
) -> spec.Tile:
    """The tile of one head over a span; ``keys_end`` tells whether some keys of it may not exist.

    Query lengths are left out: rows beyond them are set right when the tile is done.
    """
    batch, head = work.batch, work.head
    row = span.row0 + mosaic.iota(span.shape, 1 if span.turned else 0)
    offset = visits.offset_of(problem, x, batch)
    position = row + offset
    if problem.rows_per_position > 1:
        rows = span.row0 + mosaic.vector_iota(span.rows[1], by_row=not span.turned)
        position = span.spread(lax.div(rows, problem.rows_per_position) + offset, by_row=True)
    segments = masked and x.query_segment_ids is not None
    slopes = x.alibi_slopes
    row_ids = x.query_segment_ids.at[batch, pl.ds(*span.rows)] if segments else None
    key_ids = x.key_value_segment_ids.at[batch, pl.ds(*span.keys)] if segments else None
    return spec.Tile(
        batch=batch,
        head=head,
        row=row,
        key=span.key0 + mosaic.iota(span.shape, 0 if span.turned else 1),
        position=position,
        mask=_window(x.mask, work, span) != 0 if masked and x.mask is not None else None,
        key_value_length=visits.key_count(problem, x, batch) if masked and keys_end else None,
        query_segment=span.load(row_ids, by_row=True) if segments else None,
        key_value_segment=span.load(key_ids, by_row=False) if segments else None,
        mask_consts=x.mask_consts,
        parameters=spec.ScoreParameters(
            bias=None if x.bias is None else _window(x.bias, work, span),
            alibi_slope=None if slopes is None else _slopes(slopes, head, span),
            consts=x.score_consts,
        ),
    )


def _slopes(slopes: mosaic.Ref, head: Any, span: Span) -> Any:
    """Of a head, or of each of its rows."""
    if len(slopes.shape) == 1:
        return slopes[head]
    return span.load(slopes.at[head, pl.ds(*span.rows)], by_row=True)


def modified(
    problem: spec.Problem,
    tile: spec.Tile,
    span: Span,
    s: jax.Array,
    unit: float,
    modify: Callable[..., Any] = spec.score.modify,  # or `modify_with_slope`
) -> Any:
    """``modify`` of logits that are given, and returned, in multiples of ``unit``.

    Those that a bias is added to, or that a function modifies, are given in multiples of 1.

    Keys are counted as `counted_from` does, in floating point: distances are then a subtraction of
    a constant; from integers they would be converted one by one, on the unit that computes
    exponentials.
    """
    slope = tile.parameters.alibi_slope
    if problem.soft_cap is not None:
        problem = dataclasses.replace(problem, soft_cap=problem.soft_cap / unit)
    if problem.score_mod is None and slope is not None:
        tile = _floating(counted_from(tile, span))
        tile = tile._replace(parameters=tile.parameters._replace(alibi_slope=slope / unit))
    return modify(problem, tile, s)


def distance(tile: spec.Tile, span: Span) -> jax.Array:
    """`spec.score.distance`, counting keys as `counted_from` does."""
    tile = counted_from(tile, span)
    return spec.score.distance(_floating(tile))


def _floating(tile: spec.Tile) -> spec.Tile:
    position, key = (x.astype(jnp.float32) for x in (tile.position, tile.key))
    return tile._replace(position=position, key=key)


def allowed(problem: spec.Problem, tile: spec.Tile, span: Span) -> Any:
    """`spec.mask.allowed`, counting keys as `counted_from` does."""
    if problem.mask_mod is None:
        tile = counted_from(tile, span)
    return spec.mask.allowed(problem, tile)


def counted_from(tile: spec.Tile, span: Span) -> spec.Tile:
    """The tile with positions and keys counted so that a thread's columns are constants.

    A comparison of a column with what is the same in a whole row is then one instruction and holds
    no register. What depends on differences alone may be counted from anywhere.
    """
    column = mosaic.iota(span.shape, 1)
    first = column & _COLUMN_BITS
    if span.turned:
        origin = tile.position - column + first
        position, key = column - first, tile.key - origin
    else:
        origin = span.key0 + first
        position, key = tile.position - origin, column - first
    length = tile.key_value_length
    length = None if length is None else length - origin
    return tile._replace(key=key, position=position, key_value_length=length)


def _window(ref: mosaic.Ref, work: Work, span: Span) -> Any:
    """The part of a bias or a mask, as `prepare` leaves them, that a tile sees, or a scalar."""
    batch, head = visits.heads_of(ref, work.batch, work.head)
    at = (span.keys, span.rows) if span.turned else (span.rows, span.keys)
    down, across = (pl.ds(*window) for window in at)
    if ref.shape[2] > 1 and ref.shape[3] > 1:
        return mosaic.load_matrix(ref.at[batch, head, down, across])
    if ref.shape[2] > 1:
        return mosaic.spread_rows(mosaic.load_rows(ref.at[batch, head, down, 0]), span.shape)
    if ref.shape[3] > 1:
        columns = mosaic.load_columns(ref.at[batch, head, 0, across])
        return mosaic.spread_columns(columns, span.shape)
    return ref[batch, head, 0, 0]
