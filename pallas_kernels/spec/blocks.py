"""Which tiles of the logits matter, from what is known before the arrays are."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.spec.band import Band


class Tiles(NamedTuple):
    """Block indices of a list of tiles, query blocks outermost."""

    q: np.ndarray  # [tiles] int32
    kv: np.ndarray  # [tiles] int32

    def select(self, which: np.ndarray) -> "Tiles":
        return Tiles(self.q[which], self.kv[which])


def visible_tiles(
    band: Band, rows: int, keys: int, block_q: int, block_kv: int
) -> tuple[Tiles, Tiles]:
    """The tiles in which some row sees some key: those that need a mask, and those that do not.

    A tile needs a mask if a row of it misses a key of it, or if it reaches past the last row or
    key. ``band`` is over rows. Tiles that nobody sees are in neither list.
    """
    q0 = np.arange(0, rows, block_q, dtype=np.int64)[:, None]
    k0 = np.arange(0, keys, block_kv, dtype=np.int64)[None, :]
    q1, k1 = q0 + block_q, k0 + block_kv
    some = band.any_keys(q0, np.minimum(q1, rows), keys)
    every = band.all_keys(q0, q1, keys)
    visible = np.maximum(some[0], k0) < np.minimum(some[1], k1)
    full = visible & (every[0] <= k0) & (k1 <= every[1]) & (q1 <= rows)
    return _listed(visible & ~full), _listed(full)


def _listed(which: np.ndarray) -> Tiles:
    q, kv = np.nonzero(which)
    return Tiles(q.astype(np.int32), kv.astype(np.int32))
