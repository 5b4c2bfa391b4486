"""What the roles of the backward share: where things are, and which tiles there are."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common import visits
from pallas_kernels.common.block_map import BlockMap
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper.config import REGISTERS, ROWS, modifies
from pallas_kernels.hopper.kernel import Kernel

CONSUMERS = 2
_NARROW = 128  # the most columns whose dK and dV of 64 keys fit into registers
_FEW_KEYS_OF_ROW = 8192
TINY = 1e-30  # what is smaller counts as zero


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """How a backward is cut into tiles.

    The two consumers divide a tile of logits by keys, each with 64 of its own, or, for wide heads,
    by rows, and 64 keys' dK and dV by columns.
    """

    block_q: int = 64
    stages: int = 2
    key_stages: int = 1  # 2: the next tile's K comes before this tile is done
    by_columns: bool = False
    divides_groups: bool | None = None  # None: as `divides_groups` finds best
    rounds: bool = False  # dQ within the kernel, see `backward_rounding`

    def __post_init__(self) -> None:
        choices = (ROWS,) if self.by_columns else (ROWS, 2 * ROWS)
        if self.block_q not in choices:
            raise ValueError(f"block_q must be one of {choices}; got {self.block_q}")
        if self.stages < 2 or self.key_stages not in (1, 2):
            raise ValueError(f"needs stages >= 2 and 1 or 2 key_stages; got {self}")

    @property
    def key_groups(self) -> int:
        """Of 64 keys in a tile."""
        return 1 if self.by_columns else CONSUMERS

    @property
    def block_kv(self) -> int:
        return self.key_groups * ROWS

    @property
    def rows(self) -> int:
        """Of a tile of queries, how many a consumer has the logits of."""
        return self.block_q // CONSUMERS if self.by_columns else self.block_q

    @property
    def width(self) -> int:
        """Of strips of 16-bit elements."""
        return 32 if self.by_columns else 64

    @property
    def bias_width(self) -> int:
        """Rows in each of the matrices that a bias's gradient is summed in."""
        return min(self.rows, ROWS)

    def strips(self, columns: int) -> int:
        """In how many strips so many columns are held."""
        count = -(-columns // self.width)
        return count + count % CONSUMERS if self.by_columns else count

    @classmethod
    def default(cls, problem: spec.Problem) -> "BackwardConfig":
        """The one that shares a tile of dQ evenly among the consumers."""
        wide, rounds = max(problem.H, problem.Hv), _should_round(problem)
        if wide > _NARROW:
            return cls(by_columns=True, rounds=rounds)
        # Sums of integers, or the slope of a soft cap, leave no register for which K it is.
        has_registers = not problem.deterministic and problem.soft_cap is None
        if wide > ROWS:
            return cls(stages=3 if has_registers else 2, rounds=rounds)
        return cls(block_q=2 * ROWS, key_stages=2 if has_registers else 1, rounds=rounds)


def _should_round(p: spec.Problem) -> bool:
    """Whether it is faster that the kernel rounds dQ, see `bench/LOG.md`.

    It always is if sums are integers, of which each row has a unit of its own. Else not if they are
    in the L2 cache when the kernel ends; nor, of wide heads, if many add to the same rows at the
    same time: to tell that a tile of keys is done then takes long.
    """
    if p.deterministic:
        return True
    is_large = 4 * p.B * p.T * p.N * p.H > gpu.L2_CACHE_BYTES
    if max(p.H, p.Hv) <= _NARROW:
        return is_large
    return is_large and p.band.most_keys(p.S) <= _FEW_KEYS_OF_ROW


def divides_groups(problem: spec.Problem, c: BackwardConfig, blocks: int, kv_blocks: int) -> bool:
    """Whether each head of a group is for a block of its own; they then add up dK and dV.

    A block that visits all heads of a large group, one after the other, finds nothing in the L2
    cache: what the other blocks have read has left it by then.
    """
    p = problem
    if p.G == 1 or p.deterministic:  # additions come in any order
        return False
    if c.divides_groups is not None:
        return c.divides_groups
    of_group = p.T * p.G * (p.H * (p.dtype.itemsize + 4) + p.Hv * p.dtype.itemsize)
    return of_group * blocks / kv_blocks > gpu.L2_AT_ONCE_BYTES


def sums_bias(problem: spec.Problem) -> bool:
    """Whether the gradient of the bias is a matrix over rows and keys."""
    return problem.differentiates("bias") and problem.operands.bias.shape[2] > 1


def stores_bias(problem: spec.Problem) -> bool:
    """Whether that gradient's tiles are visited once at the most, and the band tells which."""
    p = problem
    if not sums_bias(p) or p.masks_by_data:
        return False
    return p.operands.bias.shape[:2] == (p.B, p.N)


def rounds_dq(problem: spec.Problem, c: BackwardConfig) -> bool:
    """Whether the kernel rounds dQ: not where each block has a slab of sums.

    Nor where all warps of the producer are needed to zero what is hidden.
    """
    p = problem
    if not c.rounds or mosaic.is_interpreting():
        return False
    return not visits.empties_rows(p, modifies(p)) and not visits.band_hides_keys(p)


def of_one(units: Any) -> Any:
    """What a unit is where so many are a 1, see `Refs.stats`; NaN where that is."""
    return 1 / jnp.where(units < TINY, TINY, units)


def key_sums(problem: spec.Problem) -> tuple[str, ...]:
    """Operands whose gradient comes from sums over the rows of each head, by key."""
    found = {
        "bias": problem.differentiates("bias") and not sums_bias(problem),
        "alibi_slopes": problem.differentiates("alibi_slopes"),
    }
    return tuple(name for name, is_ in found.items() if is_)


def tells_rows(problem: spec.Problem) -> bool:
    """Whether the producer tells consumers which rows come.

    A walk that is read from global memory would cost them registers that wide heads do not leave:
    ptxas then has each product wait for the one before.
    """
    return problem.masks_by_data and max(problem.H, problem.Hv) > 64


class Refs(NamedTuple):
    """Global memory, shared memory, barriers."""

    x: spec.Operands
    dout: mosaic.Ref  # [B, T, N, Hv]
    # [B, N, q_blocks, 2 or 3 * block_q] int32, bits of float32: lse to base 2, delta and, if sums
    # are integers, how many units of dQ a 1 is, NaN if its gradient is no number
    stats: mosaic.Ref
    empty: mosaic.Ref | None  # [B, N, q_blocks] int32: not 0 if a row sees nothing
    map: BlockMap | None
    dq_gmem: mosaic.Ref  # [slabs, B, T / 64, N, strips, 64 * width], of `mosaic.Sums`
    # [slabs, B|1, N|1, S / 64, T / n, 64 * n], n = bias_width; without slabs if stored
    dbias_gmem: mosaic.Ref | None
    # [B, S, K, H], [B, S, K, Hv]; if added up, [slabs, B, S / 64, K, strips, 64 * width]
    dk_gmem: mosaic.Ref
    dv_gmem: mosaic.Ref
    sums_gmem: mosaic.Ref | None  # [key sums, 2 if by_columns else 1, B, N, S] float32
    rounded_gmem: mosaic.Ref | None  # [B, T, N, H]: dQ, where the kernel rounds it
    k_smem: mosaic.Matrix  # [key_stages, key_groups, 64, H]
    v_smem: mosaic.Matrix  # [key_groups, 64, Hv]
    q_smem: mosaic.Matrix  # [stages, block_q, H]
    do_smem: mosaic.Matrix  # [stages, block_q, Hv]
    ds_smem: mosaic.Matrix  # [2, key_groups, 64, block_q]
    p_smem: mosaic.Matrix  # likewise, if by_columns
    # [consumers, 64, H or Hv, at least 128], unless by_columns: dV, then dK; before, sums of dQ.
    out_smem: mosaic.Matrix
    # [stages + 1, 2 * block_q] int32: the bits of the statistics; and numbers that roles tell each
    # other, for which, apart, there would be no room.
    stats_smem: mosaic.Ref
    k_full: mosaic.Ref  # [key_stages]
    k_free: mosaic.Ref  # [key_stages]
    v_full: mosaic.Ref  # [1]
    v_free: mosaic.Ref  # [1]
    q_full: mosaic.Ref  # [stages]: Q and the statistics, and which rows they are
    do_full: mosaic.Ref  # [stages]
    free: mosaic.Ref  # [stages]: of Q and the statistics, and of dO unless by_columns
    do_free: mosaic.Ref  # [stages]: of dO, if by_columns
    added: mosaic.Ref  # all that a tile of keys adds to dQ
    ds_full: mosaic.Ref  # [2]
    k_raw: mosaic.Ref  # K has arrived, with rows in it that are to be zeroed
    v_raw: mosaic.Ref  # likewise V
    q_raw: mosaic.Ref  # likewise Q and dO

    @property
    def numbers(self) -> mosaic.Ref:
        """Which tiles of keys come next; a number taken; first rows; and, at last, `Rounding`'s."""
        return self.stats_smem.at[self.stats_smem.shape[0] - 1]


class BackwardForms(NamedTuple):
    """How matrices are held in shared memory; dK as K is, P as dS is."""

    q: mosaic.Form
    k: mosaic.Form
    v: mosaic.Form
    do: mosaic.Form
    ds: mosaic.Form

    @classmethod
    def of(cls, p: spec.Problem, c: BackwardConfig) -> "BackwardForms":
        # By keys, all in as many strips: dV goes out through where dK does.
        wide = max(p.H, p.Hv)

        def form(rows: int, columns: int) -> mosaic.Form:
            strips = c.strips(columns if c.by_columns else wide)
            return mosaic.Form.in_strips(rows, columns, c.width, strips)

        return cls(
            q=form(c.block_q, p.H),
            k=form(ROWS, p.H),
            v=form(ROWS, p.Hv),
            do=form(c.block_q, p.Hv),
            ds=mosaic.Form.in_strips(ROWS, c.block_q, c.width, c.block_q // c.width),
        )

    def out(self, c: BackwardConfig) -> mosaic.Form:
        """Of dK and dV on their way out, with room for 64 x 64 float32."""
        strips = max(self.k.strips, 2)
        return mosaic.Form.in_strips(ROWS, strips * c.width, c.width, strips)

    def of_tile(self, c: BackwardConfig) -> tuple[int, int]:
        """How many copies it takes to have K, and V, of a tile of keys."""
        return c.key_groups * self.k.copies, c.key_groups * self.v.copies

    def scratch(self, p: spec.Problem, c: BackwardConfig) -> dict[str, Any]:
        """Shared memory and barriers, by their names in `Refs`; matrices are lists."""
        dtype, of_q, of_do = p.dtype, self.q.copies, self.do.copies
        of_k, of_v = self.of_tile(c)
        return {
            "k_smem": self.k.smem(c.key_stages, c.key_groups, dtype=dtype),
            "v_smem": self.v.smem(c.key_groups, dtype=dtype),
            "q_smem": self.q.smem(c.stages, dtype=dtype),
            "do_smem": self.do.smem(c.stages, dtype=dtype),
            "ds_smem": self.ds.smem(2, c.key_groups, dtype=dtype),
            **(
                {"p_smem": self.ds.smem(2, c.key_groups, dtype=dtype)}
                if c.by_columns
                else {"out_smem": self.out(c).smem(CONSUMERS, dtype=dtype)}
            ),
            "stats_smem": mosaic.SMEM((c.stages + 1, 2 * c.block_q), jnp.int32),
            "k_full": mosaic.Barrier(num_barriers=c.key_stages, num_arrivals=of_k + 1),
            "k_free": mosaic.Barrier(num_barriers=c.key_stages, num_arrivals=CONSUMERS),
            "v_full": mosaic.Barrier(num_arrivals=of_v),
            "v_free": mosaic.Barrier(num_arrivals=CONSUMERS),
            "q_full": mosaic.Barrier(num_barriers=c.stages, num_arrivals=of_q + 1 + tells_rows(p)),
            "do_full": mosaic.Barrier(num_barriers=c.stages, num_arrivals=of_do),
            "free": mosaic.Barrier(num_barriers=c.stages, num_arrivals=CONSUMERS),
            "do_free": mosaic.Barrier(num_barriers=c.stages, num_arrivals=CONSUMERS),
            "added": mosaic.Barrier(num_arrivals=CONSUMERS),
            "ds_full": mosaic.Barrier(num_barriers=2, num_arrivals=CONSUMERS),
            "k_raw": mosaic.Barrier(num_arrivals=of_k),
            "v_raw": mosaic.Barrier(num_arrivals=of_v),
            "q_raw": mosaic.Barrier(num_arrivals=of_q + of_do),
        }

    def refs(
        self,
        p: spec.Problem,
        c: BackwardConfig,
        inputs: tuple[Any, ...],
        *rest: Any,
    ) -> Refs:
        """From what a kernel is given; ``rest`` are sums, outputs and scratch."""
        given = iter(rest)
        found: dict[str, Any] = {"dq_gmem": next(given)}
        stored = stores_bias(p)
        found["dbias_gmem"] = next(given) if sums_bias(p) and not stored else None
        # Either way next: the last of the sums, or the first of the outputs.
        found.update(dk_gmem=next(given), dv_gmem=next(given))
        found["dbias_gmem"] = next(given) if stored else found["dbias_gmem"]
        found["sums_gmem"] = next(given) if key_sums(p) else None
        found["rounded_gmem"] = next(given) if rounds_dq(p, c) else None
        found.update(p_smem=None, out_smem=None)
        for name, kind in self.scratch(p, c).items():
            ref = next(given)
            found[name] = mosaic.Matrix.of(ref) if isinstance(kind, list) else ref
        return Refs(*inputs, **found)


class KeyWork(NamedTuple):
    """One tile of keys."""

    batch: Any
    head: Any  # of the keys
    kv_block: Any
    q_head: Any  # of the queries, the one that it is visited for; None: all of the group


class Backward(Kernel):
    """The kernel of the backward."""

    config: BackwardConfig
    forms: BackwardForms
    refs: Refs

    def place_of_row(self, step: Any) -> Any:
        """In `Refs.numbers`, of the first row of a visit; it stays until the next one is done."""
        return self.config.key_stages + 1 + lax.rem(step, 2 * self.config.stages)

    @property
    def place_of_part(self) -> int:
        """Of what comes after those: the part that all warpgroups round from, see `Rounding`."""
        return self.config.key_stages + 1 + 2 * self.config.stages

    def work(self, tile: Any) -> KeyWork:
        """The tile of keys that comes at a place of the order: the first ones have most to do."""
        work = self.schedule.work(tile)
        kv_block = self.schedule.q_blocks - 1 - work.q_block
        if not self.adds_keys:
            return KeyWork(work.batch, work.head, kv_block, None)
        return KeyWork(work.batch, lax.div(work.head, self.problem.G), kv_block, work.head)

    @property
    def takes_first(self) -> bool:
        return rounds_dq(self.problem, self.config)

    @property
    def hides_keys(self) -> bool:
        """Also where no row is there to see any: dP of what it does not see must be a number."""
        return super().hides_keys or self.refs.x.query_lengths is not None

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer's thread and of the producer's, which may have more to do than to copy."""
        rounds_wide = self.takes_first and max(self.problem.H, self.problem.Hv) > ROWS
        return REGISTERS[CONSUMERS][self.hides_keys or self.empties_rows or rounds_wide]

    @property
    def members(self) -> int:
        """How many heads of a group a block visits for a tile of keys."""
        return self.problem.N // self.schedule.heads

    @property
    def adds_keys(self) -> bool:
        """Whether several blocks add to dK and dV of the same keys."""
        return self.members < self.problem.G

    def of_group(self, work: KeyWork, member: Any) -> Work:
        """A head of the queries that see these keys."""
        if work.q_head is not None:
            return Work(work.batch, work.q_head, None)
        return Work(work.batch, work.head * self.problem.G + member, None)

    def units(self, batch: Any, head: Any, row0: Any) -> jax.Array | None:
        """How many units a 1 is in 64 rows of dQ; None if they are summed as floats."""
        if not self.problem.deterministic:
            return None
        block_q = self.config.block_q
        q_block, first = lax.div(row0, block_q), lax.rem(row0, block_q)
        rows = pl.ds(2 * block_q + first, ROWS)
        bits = mosaic.load_rows(self.refs.stats.at[batch, head, q_block, rows])
        return lax.bitcast_convert_type(bits, jnp.float32)

    def walk(self, work: KeyWork, member: Any) -> Walk:
        """The tiles of queries of a head that a tile of keys visits."""
        c, p, x, found = self.config, self.problem, self.refs.x, self.refs.map
        if found is not None:
            of_rows = self.of_group(work, member)
            heads = visits.heads_of(found.count, of_rows.batch, of_rows.head)
            return found.walk((*heads, work.kv_block))
        return visits.of_keys(p, x, work.batch, work.kv_block, c.block_q, c.block_kv)
