"""Which tiles a tile visits, by the operands of a problem; arrays of theirs may be references."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk, of_band, where


def of_rows(
    problem: spec.Problem, x: spec.Operands, work: Work, block_q: int, block_kv: int
) -> Walk:
    """The tiles of keys that a tile of queries visits, as far as the band and lengths tell."""
    first = work.q_block * block_q
    rows, keys = row_count(problem, x, work.batch), key_count(problem, x, work.batch)
    if x.query_lengths is not None:
        keys = where(first < rows, keys, 0)
        rows = jnp.maximum(rows, first + 1)
    stop = jnp.minimum(first + block_q, rows)
    if problem.rows_per_position > 1:
        first = lax.div(first, problem.rows_per_position)
        stop = lax.div(stop - 1, problem.rows_per_position) + 1
    return of_band(band_of(problem, x, work.batch), (first, stop), keys, block_kv)


def of_keys(
    problem: spec.Problem, x: spec.Operands, batch: Any, kv_block: Any, block_q: int, block_kv: int
) -> Walk:
    """The tiles of queries that a tile of keys visits, likewise.

    Rows beyond the last need no mask: they are zero and have an infinite lse, hence P = 0.
    """
    first = kv_block * block_kv
    stop = first + block_kv
    rows: Any = problem.T + -problem.T % block_q
    if x.query_lengths is not None:
        rows = row_count(problem, x, batch)
    band = band_of(problem, x, batch).transpose()
    if not ends_within_tiles(problem, block_kv):
        return of_band(band, (first, stop), rows, block_q)
    keys = key_count(problem, x, batch)
    if x.key_value_lengths is not None:
        rows = where(first < keys, rows, 0)
    there = jnp.minimum(stop, jnp.maximum(keys, first + 1))
    walk = of_band(band, (first, there), rows, block_q)
    # Where keys end within the tile, each visit needs a mask.
    return walk._replace(masked=where(stop > keys, walk.count, walk.masked))


def needs_masks(problem: spec.Problem, block_kv: int) -> bool:
    """Whether some visit needs a mask."""
    p = problem
    return p.masks_by_data or not p.band.is_unbounded or p.S % block_kv != 0


def empties_rows(problem: spec.Problem, modifies: bool) -> bool:
    """Whether a row may see no key; ``modifies``: logits may be made infinite."""
    p = problem
    if p.masks_by_data or p.static_band is None or modifies:
        return True
    return p.static_band.transpose().any_keys(0, p.S, p.T) != (0, p.T)


def band_hides_keys(problem: spec.Problem) -> bool:
    """Whether some key is seen by no row, as far as the band tells; it must be static."""
    p = problem
    assert p.static_band is not None
    return p.static_band.any_keys(0, p.T, p.S) != (0, p.S)


def ends_within_tiles(problem: spec.Problem, block_kv: int) -> bool:
    """Whether keys that do not exist, or that lengths exclude, are in tiles that are visited.

    Not where the band hides them from all rows.
    """
    p = problem
    if p.operands.key_value_lengths is not None:
        return True
    band, beyond = p.static_band or spec.Band(), p.S + -p.S % block_kv
    return band.any_keys(0, p.T, beyond)[1] > p.S


def key_count(problem: spec.Problem, x: spec.Operands, batch: Any) -> Any:
    """How many keys a batch element has."""
    lengths = x.key_value_lengths
    return spec.extent(None if lengths is None else lengths[batch], problem.S)


def row_count(problem: spec.Problem, x: spec.Operands, batch: Any) -> Any:
    """How many rows it has."""
    lengths = x.query_lengths
    return spec.extent(None if lengths is None else lengths[batch], problem.T)


def band_of(problem: spec.Problem, x: spec.Operands, batch: Any) -> spec.Band:
    """The band over rows and keys."""
    return problem.band.shift(offset_of(problem, x, batch))


def offset_of(problem: spec.Problem, x: spec.Operands, batch: Any) -> Any:
    """The position of row 0."""
    if problem.from_last_key:
        return key_count(problem, x, batch) + problem.query_offset
    return problem.query_offset if x.query_offset is None else x.query_offset[batch]


def heads_of(array: Any, batch: Any, head: Any) -> tuple[Any, Any]:
    """Where an array [B|1, N|1, ...] speaks of a head."""
    return batch if array.shape[0] > 1 else 0, head if array.shape[1] > 1 else 0
