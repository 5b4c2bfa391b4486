"""Which keys a query position sees, as one inequality.

Causal attention, sliding windows and their combinations are all bands: key ``k`` is visible to
position ``q`` iff ``lo <= k - q <= hi``. Masks, loop bounds, tile lists and FLOP counts of every
backend ask this class; nothing else compares a key index with a query position.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

# A static index (int, numpy) or a traced one.
Index = Any
_STATIC = int | np.integer


@dataclasses.dataclass(frozen=True)
class Band:
    """Key ``k`` is visible to position ``q`` iff ``lo <= k - q <= hi``; ``None`` is unbounded.

    The bounds may be traced integers; every method then returns traced results.
    """

    lo: Index | None = None
    hi: Index | None = None

    def __post_init__(self) -> None:
        lo, hi = self.lo, self.hi
        if isinstance(lo, _STATIC) and isinstance(hi, _STATIC) and lo > hi:
            raise ValueError(f"a band needs lo <= hi; got {lo=}, {hi=}")

    @classmethod
    def of(cls, is_causal: bool, window: tuple[int | None, int | None] | None) -> "Band":
        """The band of ``is_causal`` and a ``(left, right)`` window, inclusive on both sides."""
        left, hi = window or (None, None)
        lo = None if left is None else -left
        if is_causal:
            hi = 0 if hi is None else min(hi, 0)
        return cls(lo, hi)

    @property
    def is_unbounded(self) -> bool:
        return self.lo is None and self.hi is None

    def allowed(self, q: Index, k: Index) -> Any:
        """Elementwise visibility, broadcasting ``q`` against ``k``."""
        seen = (k >= q) | (k <= q)  # all true, in the broadcast shape
        if self.lo is not None:
            seen &= k >= q + self.lo
        if self.hi is not None:
            seen &= k <= q + self.hi
        return seen

    def any_keys(self, q0: Index, q1: Index, size: int) -> tuple[Index, Index]:
        """Keys in ``[0, size)`` that some position of ``[q0, q1)`` sees, as ``[start, stop)``.

        Every key of the range is seen by some position. ``q0 < q1``.
        """
        start = 0 if self.lo is None else q0 + self.lo
        stop = size if self.hi is None else q1 + self.hi
        return _clip(start, stop, size)

    def all_keys(self, q0: Index, q1: Index, size: int) -> tuple[Index, Index]:
        """Keys in ``[0, size)`` that every position of ``[q0, q1)`` sees, as ``[start, stop)``.

        A tile inside this range needs no mask. ``q0 < q1``.
        """
        start = 0 if self.lo is None else q1 - 1 + self.lo
        stop = size if self.hi is None else q0 + self.hi + 1
        return _clip(start, stop, size)

    def transpose(self) -> "Band":
        """The band with the roles of queries and keys exchanged."""
        return Band(None if self.hi is None else -self.hi, None if self.lo is None else -self.lo)

    def shift(self, offset: Index) -> "Band":
        """The same band over rows, where row ``r`` stands at position ``r + offset``."""
        return Band(
            None if self.lo is None else self.lo + offset,
            None if self.hi is None else self.hi + offset,
        )

    def most_keys(self, keys: int) -> int:
        """How many of ``[0, keys)`` a row sees at the most; the bounds are static."""
        if self.lo is None or self.hi is None:
            return keys
        return min(keys, self.hi - self.lo + 1)

    def causal_keys(self, keys: int) -> int:
        """Of how many keys, up to so many, causal rows see as many on average as rows see here."""
        return min(keys, 2 * self.most_keys(keys))

    def area(self, rows: int, keys: int) -> int:
        """How many (row, key) pairs of ``[0, rows) x [0, keys)`` are visible."""
        return int(self.counts(rows, keys).sum())

    def counts(self, rows: int, keys: int) -> np.ndarray:
        """How many of ``[0, keys)`` each row of ``[0, rows)`` sees."""
        row = np.arange(rows, dtype=np.int64)
        start, stop = self.any_keys(row, row + 1, keys)
        return np.broadcast_to(stop - start, rows)


def _clip(start: Index, stop: Index, size: int) -> tuple[Index, Index]:
    """``[start, stop)`` within ``[0, size)``, never of negative length."""
    static = all(isinstance(x, _STATIC | np.ndarray) for x in (start, stop, size))
    xp: Any = np if static else jnp
    start = xp.clip(start, 0, size)
    return start, xp.maximum(start, xp.clip(stop, 0, size))
