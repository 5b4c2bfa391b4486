"""Sizes of tiles and rings, and what of a multiprocessor they take."""

import dataclasses
import math
from typing import NamedTuple

from pallas_kernels import mosaic, spec

ROWS = 64  # of a warpgroup's matrix product
P_BUFFERS = 2  # for probabilities in shared memory, of visits by turns
# By the number of consumers: registers of a consumer's thread, and of a producer's, which needs
# more where it has values to clean. All must fit into what the block is launched with.
REGISTERS = {
    1: ((248, 232), (248, 232)),
    2: ((240, 24), (232, 40)),
    3: ((160, 32), (152, 56)),
    4: ((112, 32), (104, 64)),
}
_SMEM_BYTES = 227 * 1024
_SMEM_REST = 2304  # numbers and barriers
_FEW_KEYS, _FEW_KEYS_OF_BAND = 256, 1536  # of 8 bits, for which two consumers are faster
_ALIGNMENT = 1024  # of buffers; where rows are few, a piece of Q may end before a multiple of it
_SMEM_SCALES = 2048  # of elements or pages of 8 bits


class Sizes(NamedTuple):
    """Of elements in shared memory, in bytes."""

    of_query: int  # as it is multiplied
    of_key: int  # and of values
    given: int  # of queries as they are given

    @classmethod
    def of(cls, x: spec.Operands) -> "Sizes":
        given = x.query.dtype.itemsize
        return cls(1 if x.is_quantized else given, x.key.dtype.itemsize, given)


@dataclasses.dataclass(frozen=True)
class Config:
    """How a forward is cut into tiles."""

    consumers: int = 2  # warpgroups; a tile of queries has ``rows`` of each
    block_kv: int = 128
    stages: int = 2
    q_stages: int = 2  # 1: the next tile's Q comes when this tile's scores are done
    late_wait: bool = False  # keep O += P V running during the exponentials
    ping_pong: bool = False  # consumers start their products in turns
    overlaps: bool = True  # O += P V of a visit runs while S of the next one becomes P
    parts: int = 1  # of a visit's keys, if not: O += P V of one runs while S of the next becomes P
    rows: int = ROWS  # of queries, of a consumer
    turned: bool = False  # it computes S^T and O^T, whose columns may be fewer than 64

    def __post_init__(self) -> None:
        if self.consumers not in REGISTERS:
            raise ValueError(f"consumers must be one of {list(REGISTERS)}; got {self.consumers}")
        if self.block_kv < ROWS or self.block_kv % 16 or self.block_kv > 256:
            raise ValueError(
                f"block_kv must be a multiple of 16 from {ROWS} to 256; got {self.block_kv}"
            )
        multiple = 8 if self.turned else ROWS
        if not 0 < self.rows <= ROWS or self.rows % multiple:
            raise ValueError(f"rows must be a multiple of {multiple} up to {ROWS}; got {self}")
        if self.turned and (self.block_kv % ROWS or self.consumers > 1):
            raise ValueError(f"one consumer takes {ROWS} turned keys at a time; got {self}")
        if self.parts > 1 and (self.overlaps or self.turned or self.block_kv % (self.parts * 32)):
            raise ValueError(f"parts are multiples of 32 keys of visits one by one; got {self}")
        if self.stages < 2 or self.q_stages not in (1, 2):
            raise ValueError(f"needs stages >= 2 and 1 or 2 q_stages; got {self}")

    @property
    def block_q(self) -> int:
        return self.consumers * self.rows

    def divides_pages(self, problem: spec.Problem) -> bool:
        """Whether tiles of keys are whole pages, or pages whole tiles, if keys are in pages."""
        if problem.operands.page_table is None:
            return True
        page_size = problem.operands.key.shape[1]
        return self.block_kv % page_size == 0 or page_size % self.block_kv == 0

    @property
    def part(self) -> int:
        """Keys in a part."""
        return self.block_kv // self.parts

    @property
    def scratch_bytes(self) -> int:
        """To reduce a matrix along its rows: a thread has, of each eight columns, two float32."""
        return 128 * 2 * 4 * self.rows // 8 if self.turned else 0

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
            # Few tiles, or those that a band's edge crosses, had better be small.
            few_keys = _FEW_KEYS if problem.band.is_unbounded else _FEW_KEYS_OF_BAND
            if is_plain and (wide <= 64 or few_keys < problem.band.causal_keys(problem.S)):
                stages = 4 if wide <= 64 else 3
                return cls(consumers=3, stages=stages, ping_pong=True, overlaps=False, parts=2)
            return cls(stages=4)
        if wide > 128:
            large = cls(q_stages=1)
            fits = problem.Hv <= 128 and large.staging(problem.H, problem.Hv)
            return large if fits else cls(block_kv=64, q_stages=1)
        return cls(stages=4 if wide <= 64 else 2, late_wait=modifies(problem))

    def values(self, Hv: int, sizes: Sizes) -> mosaic.Form:
        """Of a tile of V; with all elements of 8 bits it is turned."""
        if sizes.of_query == 1:
            width = math.gcd(self.part, 128)
            return mosaic.Form.in_strips(Hv, 0, width, self.block_kv // width)
        if sizes.of_key == 1:
            return mosaic.Form.of(self.block_kv, Hv, itemsize=1)
        return mosaic.Form.in_one_piece(self.block_kv, Hv, self.part)

    def smem_bytes(self, H: int, Hv: int, staged: int, sizes: Sizes) -> int:
        """Of rings, and of staging for so many columns of O, which have 16 bits."""
        stack = self.q_stages * self.consumers * sizes.given
        pieces = mosaic.Form.of(self.rows, H, itemsize=sizes.given).pieces
        queries = sum(-(-stack * math.prod(x) // _ALIGNMENT) * _ALIGNMENT for x in pieces)
        of_row = mosaic.Form.of(self.block_kv, H, itemsize=sizes.of_key).columns
        of_values = sum(map(math.prod, self.values(Hv, sizes).pieces))
        keys = sizes.of_key * self.stages * (self.block_kv * of_row + of_values)
        probabilities = P_BUFFERS * self.rows * self.block_kv if self.turned else 0
        outputs = 2 * (self.block_q * staged + probabilities)
        return queries + keys + outputs + self.scratch_bytes

    def staging(self, H: int, Hv: int, sizes: Sizes | None = None) -> "Staging | None":
        """As much of a row of O as shared memory has room for; None if it has none.

        Elements have 16 bits by default.
        """
        sizes = sizes or Sizes(2, 2, 2)
        most = _SMEM_BYTES - _SMEM_REST - (_SMEM_SCALES if sizes.of_key == 1 else 0)
        for staging in Staging.of(self.rows, Hv):
            if self.smem_bytes(H, Hv, staging.form.columns, sizes) <= most:
                return staging
        return None


class Staging(NamedTuple):
    """Which strips of a tile of O are on their way out at the same time."""

    whole: mosaic.Form  # of all strips
    places: int  # for those of the first piece; the others have one each

    @classmethod
    def of(cls, rows: int, columns: int) -> list["Staging"]:
        """All there are, the one with most places first."""
        whole = mosaic.Form.of(rows, columns)
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
