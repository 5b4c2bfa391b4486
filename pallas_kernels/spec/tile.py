"""A tile of the logits: where its elements stand, and what the operands say of each of them.

The functions of ``mask``, ``score`` and ``dropout`` read tiles. Every field broadcasts against
the tile's logits, so the same functions serve a whole matrix, a block, and, in a kernel, one
head's block with scalars for batch and head.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.spec.problem import Operands, Problem


class ScoreParameters(NamedTuple):
    """What the logits are differentiated by, besides the products themselves."""

    bias: Any = None
    alibi_slope: Any = None
    consts: tuple[Any, ...] = ()


class Tile(NamedTuple):
    """Shapes are those of ``tile_of``, for logits [B, N, block_q, block_kv]."""

    batch: Any  # [B, 1, 1, 1]
    head: Any  # [1, N, 1, 1]
    row: Any  # [1, 1, block_q, 1]
    key: Any  # [1, 1, 1, block_kv]
    position: Any  # [B|1, 1, block_q, 1], row + query_offset
    mask: Any = None
    query_length: Any = None  # [B, 1, 1, 1]
    key_value_length: Any = None  # [B, 1, 1, 1]
    query_segment: Any = None  # [B, 1, block_q, 1]
    key_value_segment: Any = None  # [B, 1, 1, block_kv]
    mask_consts: tuple[Any, ...] = ()
    parameters: ScoreParameters = ScoreParameters()


def tile_of(
    problem: Problem, operands: Operands, rows: tuple[Any, int], keys: tuple[Any, int]
) -> Tile:
    """The tile of all batches and heads over ``rows`` and ``keys``, each ``(start, size)``.

    The starts may be traced. Arrays that have a row or key axis must cover the tile.
    """
    x = operands
    row = (rows[0] + jnp.arange(rows[1], dtype=jnp.int32)).reshape(1, 1, -1, 1)
    key = (keys[0] + jnp.arange(keys[1], dtype=jnp.int32)).reshape(1, 1, 1, -1)
    offset = problem.query_offset if x.query_offset is None else _outer(x.query_offset, 0)
    segments = x.query_segment_ids is not None
    return Tile(
        batch=_outer(jnp.arange(problem.B, dtype=jnp.int32), 0),
        head=_outer(jnp.arange(problem.N, dtype=jnp.int32), 1),
        row=row,
        key=key,
        position=row + offset,
        mask=window_of(x.mask, rows, keys),
        query_length=_outer(x.query_lengths, 0),
        key_value_length=_outer(x.key_value_lengths, 0),
        query_segment=_slice(x.query_segment_ids, rows, 1)[:, None, :, None] if segments else None,
        key_value_segment=(
            _slice(x.key_value_segment_ids, keys, 1)[:, None, None, :] if segments else None
        ),
        mask_consts=x.mask_consts,
        parameters=ScoreParameters(
            bias=window_of(x.bias, rows, keys),
            alibi_slope=_outer(x.alibi_slopes, 1),
            consts=x.score_consts,
        ),
    )


def coordinates(problem: Problem, tile: Tile) -> tuple[Any, Any, Any, Any]:
    """Batch, head, position and key of each element, as ``score_mod`` and ``mask_mod`` see them.

    Beyond the last row or key they are those of the last: a function that is sound where there are
    elements is not asked elsewhere.
    """
    beyond = jnp.maximum(tile.row - (problem.T - 1), 0)
    key = jnp.minimum(tile.key, problem.S - 1)
    return tile.batch, tile.head, tile.position - beyond, key


def window_of(x: Any, rows: tuple[Any, int], keys: tuple[Any, int]) -> Any:
    """The part of ``x`` [B|1, N|1, T|1, S|1] that a tile sees; broadcast axes stay of size 1."""
    if x is None:
        return None
    return _slice(_slice(x, rows, 2), keys, 3)


def _slice(x: Any, window: tuple[Any, int], axis: int) -> Any:
    start, size = window
    if x.shape[axis] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def _outer(x: Any, axis: int) -> Any:
    """A vector laid along one axis of the four of a tile."""
    if x is None:
        return None
    return x.reshape(tuple(-1 if i == axis else 1 for i in range(4)))
