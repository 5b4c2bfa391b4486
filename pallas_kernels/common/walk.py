"""Which tiles of keys a tile of queries visits, in which order, and which of them need a mask."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.spec import Band


class Walk(NamedTuple):
    """The visits of one tile of queries: first those to tiles that need a mask.

    There is at least one, since a kernel's pipeline cannot be empty: where nothing is visible, the
    mask of that one visit hides it all.
    """

    count: Any
    masked: Any
    tile: Callable[[Any], Any]  # from a visit's number to the index of a tile of keys
    # Whether that tile has keys that no row of any tile sees, where the band does not tell.
    hides: Callable[[Any], Any] | None = None


def part(walk: Walk, number: Any, parts: int) -> Walk:
    """One of so many parts, of equal length, that a walk is divided into.

    A part beyond the walk's end has one visit, to a tile that others visit too: see `part_exists`.
    """
    size = _size_of_part(walk, parts)
    first = jnp.minimum(number * size, walk.count - 1)
    count = jnp.clip(walk.count - first, 1, size)
    masked = jnp.clip(walk.masked - first, 0, count)
    return Walk(count, masked, lambda visit: walk.tile(first + visit))


def part_exists(walk: Walk, number: Any, parts: int) -> Any:
    """Whether a part has visits of its own."""
    return number * _size_of_part(walk, parts) < walk.count


def _size_of_part(walk: Walk, parts: int) -> Any:
    return lax.div(walk.count + (parts - 1), parts)


def of_band(band: Band, rows: tuple[Any, Any], keys: Any, block_kv: int) -> Walk:
    """The walk of the rows ``[rows[0], rows[1])`` over the keys ``[0, keys)``.

    From the last tile to the first; the tiles that the band's two edges cross come before those
    between them. ``band`` is over rows. All may be traced; without rows, pass no keys.
    """
    some, every = band.any_keys(*rows, keys), band.all_keys(*rows, keys)
    first, last = _div(some[0], block_kv), _div(some[1] + block_kv - 1, block_kv)
    start = _div(every[0] + block_kv - 1, block_kv)
    full = _maximum(_div(every[1], block_kv) - start, 0)
    start = where(full > 0, start, first)
    count = _maximum(last - first, 1)
    masked = count - full
    upper = masked - (start - first)  # tiles beyond those that all see

    def tile(visit: Any) -> Any:
        lower = start - 1 - (visit - upper)
        beyond = _maximum(last, 1) - 1 - visit
        between = start + full - 1 - (visit - masked)
        return where(visit < upper, beyond, where(visit < masked, lower, between))

    return Walk(count, masked, tile)


def _is_static(*values: Any) -> bool:
    return all(isinstance(x, int | np.integer | np.bool_) for x in values)


def _div(x: Any, y: int) -> Any:
    """Of a number that is not negative."""
    return int(x) // y if _is_static(x) else lax.div(x, y)


def _maximum(x: Any, y: Any) -> Any:
    return max(x, y) if _is_static(x, y) else jnp.maximum(x, y)


def where(condition: Any, x: Any, y: Any) -> Any:
    """One of two int32, at once where the condition is known."""
    if _is_static(condition):
        return x if condition else y
    # Of two numbers without a dtype Pallas-Triton makes two booleans.
    return jnp.where(condition, jnp.int32(x), jnp.int32(y))
