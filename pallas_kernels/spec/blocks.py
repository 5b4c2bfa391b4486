"""Which tiles of the logits matter, from what is known before the arrays are."""

from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.spec.band import Band


class Tiles(NamedTuple):
    """Block indices of a list of tiles, query blocks outermost."""

    q: np.ndarray  # [tiles] int32
    kv: np.ndarray  # [tiles] int32

    def select(self, which: np.ndarray) -> "Tiles":
        return Tiles(self.q[which], self.kv[which])


def coverage(band: Band, rows: tuple[Any, Any], keys: tuple[Any, Any], size: Any) -> Any:
    """Whether some row of ``[start, stop)`` sees some key of a tile, and whether all see all of it.

    The tile may reach past the last of ``size`` keys, and is then not seen by all. ``band`` is over
    rows. Broadcasts; all may be traced.
    """
    some, every = band.any_keys(*rows, size), band.all_keys(*rows, size)
    visible = (some[0] < some[1]) & (some[0] < keys[1]) & (keys[0] < some[1])
    return visible, visible & (every[0] <= keys[0]) & (keys[1] <= every[1])


def visible_tiles(
    band: Band, rows: int, keys: int, block_q: int, block_kv: int
) -> tuple[Tiles, Tiles]:
    """The tiles in which some row sees some key: those that need a mask, and those that do not.

    A tile needs a mask if a row of it misses a key of it, or if it reaches past the last row or
    key. ``band`` is over rows. Tiles that nobody sees are in neither list.
    """
    q0 = np.arange(0, rows, block_q, dtype=np.int64)[:, None]
    k0 = np.arange(0, keys, block_kv, dtype=np.int64)[None, :]
    q1 = q0 + block_q
    visible, full = coverage(band, (q0, np.minimum(q1, rows)), (k0, k0 + block_kv), keys)
    full = full & (q1 <= rows)
    return _listed(visible & ~full), _listed(full)


def _listed(which: np.ndarray) -> Tiles:
    q, kv = np.nonzero(which)
    return Tiles(q.astype(np.int32), kv.astype(np.int32))
