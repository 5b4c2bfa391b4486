"""What the operands say of a tile of logits, loaded from global memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec
from pallas_kernels.common import evaluate, visits
from pallas_kernels.triton.memory import Ref, Run, load_rows, load_vector


class Place(NamedTuple):
    """Where a tile lies."""

    batch: Any
    head: Any  # of the queries
    rows: Run
    keys: Run


def prepare(x: spec.Operands) -> spec.Operands:
    """Operands as kernels read them: no booleans, nor 8-bit floating point; captures flat."""
    if x.has_narrow_pages:
        x = x._replace(key=spec.narrow.bits(x.key), value=spec.narrow.bits(x.value))
    return x._replace(
        mask=None if x.mask is None else x.mask.astype(jnp.int8),
        score_consts=evaluate.flat(x.score_consts),
        mask_consts=evaluate.flat(x.mask_consts),
    )


def tile_of(problem: spec.Problem, x: spec.Operands, place: Place, masked: bool) -> spec.Tile:
    """The tile; what only masks need is left out where there is none."""
    batch, head, rows, keys = place
    row, key = rows.indices[:, None], keys.indices[None, :]
    position = row
    if problem.rows_per_position > 1:
        position = lax.div(row, problem.rows_per_position)
    position = position + visits.offset_of(problem, x, batch)
    segments = masked and x.query_segment_ids is not None
    of_rows = load_vector(x.query_segment_ids, (batch,), rows) if segments else None
    of_keys = load_vector(x.key_value_segment_ids, (batch,), keys) if segments else None
    ends = keys.limit is not None or x.key_value_lengths is not None
    # Rows that do not exist see nothing, lest what they alone see count as seen.
    shortened = masked and (x.query_lengths is not None or rows.limit is not None)
    return spec.Tile(
        batch=batch,
        head=head,
        row=row,
        key=key,
        position=position,
        mask=_window(x.mask, place) != 0 if masked and x.mask is not None else None,
        query_length=visits.row_count(problem, x, batch) if shortened else None,
        key_value_length=visits.key_count(problem, x, batch) if masked and ends else None,
        query_segment=None if of_rows is None else of_rows[:, None],
        key_value_segment=None if of_keys is None else of_keys[None, :],
        mask_consts=x.mask_consts,
        parameters=spec.ScoreParameters(
            bias=None if x.bias is None else _window(x.bias, place),
            alibi_slope=None if x.alibi_slopes is None else _slopes(x.alibi_slopes, place),
            consts=x.score_consts,
        ),
    )


def visible(problem: spec.Problem, tile: spec.Tile, shape: tuple[int, int]) -> Any | None:
    """Visibility of a masked tile's elements; None if all are visible."""
    allowed = spec.mask.allowed(problem, tile)
    return None if allowed is None else jnp.broadcast_to(allowed, shape)


def some(allowed: jax.Array, axis: int) -> jax.Array:
    """Whether something is visible along an axis."""
    return jnp.max(allowed.astype(jnp.int32), axis=axis) > 0


def _slopes(slopes: Ref, place: Place) -> jax.Array:
    """Of a head, or of each of its rows."""
    if len(slopes.shape) == 1:
        return slopes[place.head]
    return load_vector(slopes, (place.head,), place.rows._replace(limit=slopes.shape[1]))[:, None]


def _window(ref: Ref, place: Place) -> Any:
    """The part of a bias or a mask [B|1, N|1, T|1, S|1] that a tile sees."""
    batch, head, rows, keys = place
    at = visits.heads_of(ref, batch, head)
    if ref.shape[2] > 1 and ref.shape[3] > 1:
        return load_rows(ref, lambda row: (*at, row), rows, keys)
    if ref.shape[2] > 1:
        return load_rows(ref, lambda row: (*at, row), rows, Run(0, 1, None))
    if ref.shape[3] > 1:
        return load_vector(ref, (*at, 0), keys)[None, :]
    return ref[*at, 0, 0]
