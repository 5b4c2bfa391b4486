"""What the roles of the backward share: where things are, and which tiles there are."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels import mosaic, spec
from pallas_kernels.common.block_map import BlockMap
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk, of_band
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.kernel import Kernel

CONSUMERS = 2
_WIDTH = 64  # of strips of 16-bit elements
MOST_COLUMNS = 128


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How a backward is cut into tiles."""

    block_q: int = 64
    stages: int = 2

    def __post_init__(self) -> None:
        if self.block_q not in (ROWS, 2 * ROWS):
            raise ValueError(f"block_q must be {ROWS} or {2 * ROWS}; got {self.block_q}")
        if self.stages < 2:
            raise ValueError(f"needs stages >= 2; got {self.stages}")

    @property
    def block_kv(self) -> int:
        return CONSUMERS * ROWS

    @classmethod
    def default(cls, problem: spec.Problem) -> "BackwardConfig":
        """The one that shares a tile of dQ evenly among the consumers."""
        return cls(block_q=ROWS * CONSUMERS // strips(problem))


def strips(problem: spec.Problem) -> int:
    """How many strips a head takes: one or two, so that consumers can share a tile of dQ."""
    return -(-max(problem.H, problem.Hv) // _WIDTH)


def sums_bias(problem: spec.Problem) -> bool:
    """Whether the gradient of the bias is a matrix over rows and keys."""
    return problem.differentiates("bias") and problem.operands.bias.shape[2] > 1


def key_sums(problem: spec.Problem) -> tuple[str, ...]:
    """Operands whose gradient comes from sums over the rows of each head, by key."""
    found = {
        "bias": problem.differentiates("bias") and not sums_bias(problem),
        "alibi_slopes": problem.differentiates("alibi_slopes"),
    }
    return tuple(name for name, is_ in found.items() if is_)


class Refs(NamedTuple):
    """Global memory, shared memory, barriers."""

    x: spec.Operands
    dout: mosaic.Ref  # [B, T, N, Hv]
    stats: mosaic.Ref  # [B, N, q_blocks, 2 * block_q] float32: lse to base 2, and delta
    empty: mosaic.Ref | None  # [B, N, q_blocks] int32: not 0 if a row sees nothing
    map: BlockMap | None
    dq_gmem: mosaic.Ref  # [slabs, B, T / 64, N, H / 64, 4096], of `mosaic.Sums`
    dbias_gmem: mosaic.Ref | None  # [slabs, B|1, N|1, S / 64, T / 64, 4096], likewise
    dk_gmem: mosaic.Ref  # [B, S, K, H]
    dv_gmem: mosaic.Ref  # [B, S, K, Hv]
    sums_gmem: mosaic.Ref | None  # [key sums, B, N, S in whole tiles] float32
    k_smem: mosaic.Matrix  # [consumers, 64, H]
    v_smem: mosaic.Matrix  # [consumers, 64, Hv]
    q_smem: mosaic.Matrix  # [stages, block_q, H]
    do_smem: mosaic.Matrix  # [stages, block_q, Hv]
    ds_smem: mosaic.Matrix  # [2, consumers, 64, block_q]
    out_smem: mosaic.Matrix  # [consumers, 64, H or Hv]: dV, then dK
    stats_smem: mosaic.Ref  # [stages, 2 * block_q] float32
    tile_smem: mosaic.Ref  # [2] int32: which tile of keys comes next; a number taken
    kv_full: mosaic.Ref
    kv_free: mosaic.Ref
    q_full: mosaic.Ref  # [stages]: Q and the statistics
    do_full: mosaic.Ref  # [stages]
    free: mosaic.Ref  # [stages]: of Q, dO and the statistics
    ds_full: mosaic.Ref  # [2]
    kv_raw: mosaic.Ref  # K and V have arrived, with rows in them that are to be zeroed
    q_raw: mosaic.Ref  # likewise Q and dO


class BackwardForms(NamedTuple):
    """How matrices are held in shared memory: those of a head in as many strips, dK as K is."""

    q: mosaic.Form
    k: mosaic.Form
    v: mosaic.Form
    do: mosaic.Form
    ds: mosaic.Form

    @classmethod
    def of(cls, p: spec.Problem, c: BackwardConfig) -> "BackwardForms":
        def form(rows: int, columns: int) -> mosaic.Form:
            return mosaic.Form.in_strips(rows, columns, _WIDTH, strips(p))

        return cls(
            q=form(c.block_q, p.H),
            k=form(ROWS, p.H),
            v=form(ROWS, p.Hv),
            do=form(c.block_q, p.Hv),
            ds=mosaic.Form.in_strips(ROWS, c.block_q, _WIDTH, c.block_q // _WIDTH),
        )

    def scratch(self, c: BackwardConfig, dtype: Any) -> list[Any]:
        """Shared memory and barriers, in the order of `Refs`."""
        of_keys, of_q, of_do = self.k.copies + self.v.copies, self.q.copies, self.do.copies
        return [
            self.k.smem(CONSUMERS, dtype=dtype),
            self.v.smem(CONSUMERS, dtype=dtype),
            self.q.smem(c.stages, dtype=dtype),
            self.do.smem(c.stages, dtype=dtype),
            self.ds.smem(2, CONSUMERS, dtype=dtype),
            self.k.smem(CONSUMERS, dtype=dtype),
            mosaic.SMEM((c.stages, 2 * c.block_q), jnp.float32),
            mosaic.SMEM((2,), jnp.int32),
            mosaic.Barrier(num_arrivals=CONSUMERS * of_keys + 1),
            mosaic.Barrier(num_arrivals=CONSUMERS),
            mosaic.Barrier(num_barriers=c.stages, num_arrivals=of_q + 1),
            mosaic.Barrier(num_barriers=c.stages, num_arrivals=of_do),
            mosaic.Barrier(num_barriers=c.stages, num_arrivals=CONSUMERS),
            mosaic.Barrier(num_barriers=2, num_arrivals=CONSUMERS),
            mosaic.Barrier(num_arrivals=CONSUMERS * of_keys),
            mosaic.Barrier(num_arrivals=of_q + of_do),
        ]

    def refs(self, problem: spec.Problem, inputs: tuple[Any, ...], *rest: Any) -> Refs:
        """From what a kernel is given; ``rest`` are sums, outputs and scratch."""
        found: Any = iter(rest)
        dq, dbias = next(found), next(found) if sums_bias(problem) else None
        dk, dv, sums = next(found), next(found), next(found) if key_sums(problem) else None
        matrices = [mosaic.Matrix.of(next(found)) for _ in range(6)]
        return Refs(*inputs, dq, dbias, dk, dv, sums, *matrices, *found)


class KeyWork(NamedTuple):
    """One tile of keys."""

    batch: Any
    head: Any  # of the keys
    kv_block: Any


class Backward(Kernel):
    """The kernel of the backward."""

    config: BackwardConfig
    forms: BackwardForms
    refs: Refs

    @property
    def key_sums(self) -> tuple[str, ...]:
        return key_sums(self.problem)

    def work(self, tile: Any) -> KeyWork:
        """The tile of keys that comes at a place of the order: the first ones have most to do."""
        batch, head, last_first = self.schedule.work(tile)
        return KeyWork(batch, head, self.schedule.q_blocks - 1 - last_first)

    def of_group(self, work: KeyWork, member: Any) -> Work:
        """A head of the queries that see these keys."""
        return Work(work.batch, work.head * self.problem.G + member, None)

    def walk(self, work: KeyWork, member: Any) -> Walk:
        """The tiles of queries of a head that a tile of keys visits."""
        c, p, x, found = self.config, self.problem, self.refs.x, self.refs.map
        if found is not None:
            heads = tiles.heads_of(found.count, self.of_group(work, member))
            return found.walk((*heads, work.kv_block))
        first = work.kv_block * c.block_kv
        rows = tiles.row_count(p, x, work.batch)
        keys = tiles.key_count(p, x, work.batch)
        if x.key_value_lengths is not None:
            rows = jnp.where(first < keys, rows, 0)
        stop = jnp.minimum(first + c.block_kv, jnp.maximum(keys, first + 1))
        band = tiles.band_of(p, x, work.batch).transpose()
        walk = of_band(band, (first, stop), rows, c.block_q)
        # Where keys end within the tile, each visit needs a mask.
        return walk._replace(masked=jnp.where(first + c.block_kv > keys, walk.count, walk.masked))
