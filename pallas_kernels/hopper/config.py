"""Sizes of tiles and rings, and what of a multiprocessor they take."""

import dataclasses
import math
from typing import NamedTuple

from pallas_kernels import mosaic, spec

ROWS = 64  # of a warpgroup's matrix product
# By the number of consumers: registers of a consumer's thread, and of a producer's, which needs
# more where it has values to clean. All must fit into what the block is launched with.
REGISTERS = {
    1: ((232, 80), (232, 80)),
    2: ((240, 24), (232, 40)),
    3: ((160, 32), (152, 56)),
    4: ((112, 32), (104, 64)),
}
# The same of one consumer, where two producers widen pages of 8 bits.
REGISTERS_TO_WIDEN = (232, 136)
_SMEM_BYTES = 227 * 1024
_SMEM_REST = 2304  # numbers and barriers; each buffer starts at a multiple of 1024
SMEM_SCALES = 2048  # of elements or pages of 8 bits


@dataclasses.dataclass(frozen=True)
class Config:
    """How a forward is cut into tiles."""

    consumers: int = 2  # warpgroups; a tile of queries has 64 rows of each
    block_kv: int = 128
    stages: int = 2
    q_stages: int = 2  # 1: the next tile's Q comes when this tile's scores are done
    late_wait: bool = False  # keep O += P V running during the exponentials
    ping_pong: bool = False  # consumers start their products in turns

    def __post_init__(self) -> None:
        if self.consumers not in REGISTERS:
            raise ValueError(f"consumers must be one of {list(REGISTERS)}; got {self.consumers}")
        if self.block_kv < ROWS or self.block_kv % 16 or self.block_kv > 256:
            raise ValueError(
                f"block_kv must be a multiple of 16 from {ROWS} to 256; got {self.block_kv}"
            )
        if self.stages < 2 or self.q_stages not in (1, 2):
            raise ValueError(f"needs stages >= 2 and 1 or 2 q_stages; got {self}")

    @property
    def block_q(self) -> int:
        return self.consumers * ROWS

    @property
    def scaled_parts(self) -> int:
        """Of a tile of 8-bit keys, the parts that blocks with scales do not cut."""
        return self.block_kv // math.gcd(self.block_kv, spec.quantization.SCALED)

    @classmethod
    def default(cls, problem: spec.Problem) -> "Config":
        """One that fits every problem; tuned ones are for the caller to choose."""
        wide = max(problem.H, problem.Hv)
        if problem.operands.is_quantized:
            if wide > 128:
                return cls(q_stages=1)
            is_plain = not (modifies(problem) or problem.dropout_rate or problem.masks_by_data)
            if wide <= 64 and is_plain:
                return cls(consumers=3, stages=4)
            return cls(stages=4)
        if wide > 128:
            large = cls(q_stages=1)
            fits = problem.Hv <= 128 and large.staging(problem.H, problem.Hv)
            return large if fits else cls(block_kv=64, q_stages=1)
        return cls(stages=4 if wide <= 64 else 2, late_wait=modifies(problem))

    def values(self, Hv: int, itemsize: int) -> mosaic.Form:
        """Of a tile of V; with elements of 8 bits it is turned."""
        if itemsize == 1:
            width = math.gcd(self.block_kv, 128)
            return mosaic.Form.in_strips(Hv, 0, width, self.block_kv // width)
        return mosaic.Form.in_one_piece(self.block_kv, Hv)

    def smem_bytes(self, H: int, Hv: int, staged: int, itemsize: int) -> int:
        """Of rings, and of staging for so many columns of O, which have 16 bits."""
        of_row = mosaic.Form.of(self.block_kv, H, itemsize=itemsize).columns
        keys = self.block_kv * of_row + sum(map(math.prod, self.values(Hv, itemsize).pieces))
        inputs = self.q_stages * self.block_q * of_row + self.stages * keys
        return itemsize * inputs + 2 * self.block_q * staged

    def spare_bytes(self, H: int, Hv: int, staged: int, itemsize: int) -> int:
        """How much of shared memory is left; less than 0 if there is not enough."""
        needed = self.smem_bytes(H, Hv, staged, itemsize) + _SMEM_REST
        return _SMEM_BYTES - needed - (SMEM_SCALES if itemsize == 1 else 0)

    def staging(self, H: int, Hv: int, itemsize: int = 2) -> "Staging | None":
        """As much of a row of O as shared memory has room for; None if it has none."""
        for staging in Staging.of(Hv):
            if self.spare_bytes(H, Hv, staging.form.columns, itemsize) >= 0:
                return staging
        return None


class Staging(NamedTuple):
    """Which strips of a tile of O are on their way out at the same time."""

    whole: mosaic.Form  # of all strips
    places: int  # for those of the first piece; the others have one each

    @classmethod
    def of(cls, columns: int) -> list["Staging"]:
        """All there are, the one with most places first."""
        whole = mosaic.Form.of(ROWS, columns)
        return [cls(whole, places) for places in range(whole.pieces[0].strips, 0, -1)]

    @property
    def form(self) -> mosaic.Form:
        """Of all places."""
        first, *rest = self.whole.pieces
        return self.whole._replace(pieces=(first._replace(strips=self.places), *rest))

    def groups(self) -> list[list[int]]:
        """For each time, the places that are filled with the strips that come next."""
        first = self.whole.pieces[0].strips
        groups = [list(range(min(self.places, first - i))) for i in range(0, first, self.places)]
        groups[-1] += range(self.places, self.form.strips)
        return groups


def modifies(problem: spec.Problem) -> bool:
    """Whether logits are more than ``scale * q.k``, or their order is not that of ``q.k``."""
    return spec.score.modifies(problem) or problem.scale <= 0
