"""Who sees whom: the one definition of visibility, as a function of a tile."""

import functools
import operator
from typing import Any

from pallas_kernels.spec.problem import Problem
from pallas_kernels.spec.tile import Tile, coordinates


def allowed(problem: Problem, tile: Tile) -> Any:
    """Visibility of the tile's elements, broadcastable to its logits; None if all are visible.

    The band, the lengths, the segments, the dense mask and ``mask_mod`` are ANDed.
    """
    terms = []
    if not problem.band.is_unbounded:
        terms.append(problem.band.allowed(tile.position, tile.key))
    if tile.query_length is not None:
        terms.append(tile.row < tile.query_length)
    if tile.key_value_length is not None:
        terms.append(tile.key < tile.key_value_length)
    if tile.query_segment is not None:
        terms.append(tile.query_segment == tile.key_value_segment)
    if tile.mask is not None:
        terms.append(tile.mask)
    if problem.mask_mod is not None:
        terms.append(problem.mask_mod(tile.mask_consts, *coordinates(problem, tile)))
    return functools.reduce(operator.and_, terms) if terms else None


def inside(problem: Problem, tile: Tile) -> Any:
    """Which elements exist, for tiles that reach past the last row or key."""
    return (tile.row < problem.T) & (tile.key < problem.S)
