"""What the roles share: where things are, and which tiles there are; the backward adds its own."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common import visits
from pallas_kernels.common.block_map import BlockMap
from pallas_kernels.common.schedule import Schedule, Work
from pallas_kernels.common.walk import Walk
from pallas_kernels.hopper.config import P_BUFFERS, ROWS, Config, Sizes, Staging, modifies
from pallas_kernels.hopper.orientation import Orientation

LOG2_E = math.log2(math.e)


RANGE_OF_HALF = 12.0  # log2 of what probabilities are multiplied by to be float16 numbers
RANGE = 6.0  # the same for 8 bits, where 448 is the largest
# log2 of how much larger than 1 probabilities may grow: until then sums stay as they are.
_PATIENCE = 8.0
_PATIENCE_IN_8_BITS = 8.8 - RANGE  # beyond 448, as by rounding, conversions saturate


class Scales(NamedTuple):
    """What 8-bit elements mean, as the kernel uses it."""

    query: Any  # [B, blocks of T, N]; None: see `Forward.rounds`
    key: Any  # [B, blocks of S, K]
    value: Any  # likewise
    largest: Any  # [B, K] of values

    @classmethod
    def of(cls, x: spec.Operands) -> "Scales | None":
        """From operands."""
        if not x.is_quantized:
            return None
        return cls(x.query_scale, x.key_scale, x.value_scale, jnp.max(x.value_scale, axis=1))

    def out(self, batch: Any, head: Any) -> Any:
        """What sums of raised probabilities times values are multiplied by."""
        return self.largest[batch, head] * 2.0**-RANGE


def shift_of(scale: Any, largest: Any) -> Any:
    """By how much log2 of the probabilities of a block is raised, whose values have a scale.

    `RANGE`, less where that is smaller than the largest of the head.
    """
    # What is raised by so much less is zero as an 8-bit number.
    return jnp.maximum(jnp.log2(scale) - jnp.log2(largest) + RANGE, -64.0)


def scale_at(scales: Any, batch: Any, token: Any, head: Any) -> Any:
    """Of the block that a token is in, which may not exist: then of some block."""
    blocks = scales.shape[1]
    block = 0 if blocks == 1 else jnp.minimum(lax.div(token, spec.quantization.SCALED), blocks - 1)
    return scales[batch, block, head]


class Refs(NamedTuple):
    """Global memory, shared memory, barriers."""

    x: spec.Operands
    map: BlockMap | None
    scales: Scales | None
    out_gmem: mosaic.Ref  # [B, T, N, Hv]
    lse_gmem: mosaic.Ref  # [B, N, T in whole tiles] float32
    q_smem: mosaic.Matrix  # [q_stages, consumers, rows, H]
    k_smem: mosaic.Matrix  # [stages, block_kv, H]
    v_smem: mosaic.Matrix  # [stages, block_kv, Hv]; [stages, Hv, block_kv] of 8-bit elements
    out_smem: mosaic.Matrix  # [consumers, rows, columns of staging]
    tile_smem: mosaic.Ref  # [q_stages] int32: which tile of queries comes next
    ticket_smem: mosaic.Ref  # [1] int32: a number taken, the producer's own
    q_full: mosaic.Ref
    q_free: mosaic.Ref
    k_full: mosaic.Ref
    k_free: mosaic.Ref
    v_full: mosaic.Ref
    v_free: mosaic.Ref
    v_raw: mosaic.Ref  # V has arrived, with rows in it that are to be zeroed
    turn: mosaic.Ref  # [consumers]: it is this one's turn to start its products
    q_given_smem: Any = None  # a matrix likewise, in the same place: Q before it is converted
    # Of elements or pages of 8 bits, float32.
    q_scale_smem: mosaic.Ref = None  # [q_stages, consumers], of elements that are given
    q_numbers_smem: mosaic.Ref = None  # [consumers, 5], of those that are rounded: the last one
    kv_scale_smem: mosaic.Ref = None  # [stages, scaled_parts, 2]: of the keys; shift
    p_smem: mosaic.Ref = None  # [2, rows, block_kv]: of visits by turns, where they are turned


class Forms(NamedTuple):
    """How matrices are held in shared memory."""

    q_given: mosaic.Form
    q: mosaic.Form
    k: mosaic.Form
    v: mosaic.Form
    out: Staging
    parts: int  # that a tile of keys is copied in, for they are in pages
    converts: bool  # whether queries are given as others than those that are multiplied

    @classmethod
    def of(cls, p: spec.Problem, c: Config) -> "Forms":
        sizes = Sizes.of(p.operands)
        staging = c.staging(p.H, p.Hv, sizes)
        assert staging is not None, f"{c} needs too much shared memory for {p.H=}, {p.Hv=}"
        assert c.divides_pages(p), f"{c} cuts pages of {p.operands.key.shape[1]} tokens"
        assert c.turned or not p.operands.has_narrow_pages, "what is widened is a left operand"
        assert not c.turned or not (p.operands.is_quantized or p.Hv % ROWS), "no product has V^T"
        table = p.operands.page_table
        # Queries that are rounded have strips of as many columns as before, and keys like them.
        width = ROWS if p.operands.rounds_query else 0
        return cls(
            q_given=mosaic.Form.of(c.rows, p.H, itemsize=sizes.given),
            q=mosaic.Form.of(c.rows, p.H, dividing=width, itemsize=sizes.of_query),
            k=mosaic.Form.of(c.block_kv, p.H, dividing=width, itemsize=sizes.of_key),
            v=c.values(p.Hv, sizes),
            out=staging,
            parts=1 if table is None else max(1, c.block_kv // p.operands.key.shape[1]),
            converts=p.operands.has_narrow_pages or p.operands.rounds_query,
        )

    def arrays(self, x: spec.Operands) -> spec.Operands:
        """Operands whose queries, keys and values are as copies take them."""
        value = x.value if x.is_quantized else self.v.array(x.value)
        return x._replace(query=self.q_given.array(x.query), key=self.k.array(x.key), value=value)

    def scratch(self, c: Config, p: spec.Problem) -> dict[str, Any]:
        """Shared memory and barriers, by their names in `Refs`."""
        x = p.operands
        of_k, of_v = self.k.copies_in(self.parts), self.v.copies_in(self.parts)
        others: dict[str, Any] = {}
        if x.rounds_query:
            numbers = (c.consumers, mosaic.NARROWED_NUMBERS)
            others["q_numbers_smem"] = mosaic.SMEM(numbers, jnp.float32)
        elif x.is_quantized:
            others["q_scale_smem"] = mosaic.SMEM((c.q_stages, c.consumers), jnp.float32)
        if x.key_scale is not None:
            of_k += 1  # with the scales of the stage
            shape = (c.stages, self.scaled_parts(c, x), 2)
            others["kv_scale_smem"] = mosaic.SMEM(shape, jnp.float32)
        if c.turned:
            shape = (P_BUFFERS, c.rows, c.block_kv)
            others["p_smem"] = mosaic.tiled_smem(shape, dtype_of_queries(p))
        of_q, stack = dtype_of_queries(p), (c.q_stages, c.consumers)
        if self.converts:
            queries = mosaic.smem_of_two(self.q_given, self.q, *stack, dtypes=(p.dtype, of_q))
        else:
            queries = self.q.smem(*stack, dtype=of_q)
        return {
            "q_smem": queries,
            "k_smem": self.k.smem(c.stages, dtype=x.key.dtype),
            "v_smem": self.v.smem(c.stages, dtype=x.value.dtype),
            "out_smem": self.out.form.smem(c.consumers, dtype=p.dtype),
            "tile_smem": mosaic.SMEM((c.q_stages,), jnp.int32),
            "ticket_smem": mosaic.SMEM((1,), jnp.int32),
            "q_full": _barriers(c.q_stages, c.consumers * self.q_given.copies + 1),
            "q_free": _barriers(c.q_stages, c.consumers),
            "k_full": _barriers(c.stages, of_k),
            "k_free": _barriers(c.stages, c.consumers),
            "v_full": _barriers(c.stages, of_v),
            "v_free": _barriers(c.stages, c.consumers),
            "v_raw": mosaic.Barrier(num_arrivals=of_v),
            "turn": _barriers(c.consumers, 1),
        } | others

    def scaled_parts(self, c: Config, x: spec.Operands) -> int:
        """Of a tile of keys, the parts that have scales of their own; 0: there are no scales."""
        if x.key_scale is None:
            return 0
        return self.parts if x.has_narrow_pages else c.scaled_parts

    def refs(self, given: Any, out: Any, lse: Any, scratch: dict[str, Any]) -> Refs:
        """From what a kernel is given, its outputs, and what `scratch` asked for."""
        x, found, scales = given
        queries = scratch.pop("q_smem")
        by_name: dict[str, Any] = {
            name: mosaic.Matrix.of(x) if isinstance(x, list | tuple) else x
            for name, x in scratch.items()
        }
        if self.converts:
            by_name["q_given_smem"], by_name["q_smem"] = mosaic.Matrix.two(queries)
        else:
            by_name["q_smem"] = mosaic.Matrix.of(queries)
        return Refs(x=x, map=found, scales=scales, out_gmem=out, lse_gmem=lse, **by_name)


def dtype_of_queries(p: spec.Problem) -> Any:
    """Of Q, and of P in shared memory: every number of 8 bits is one of float16."""
    x = p.operands
    if x.has_narrow_pages:
        return jnp.float16
    return x.key.dtype if x.is_quantized else x.query.dtype


def _barriers(number: int, arrivals: int) -> Any:
    return mosaic.Barrier(num_barriers=number, num_arrivals=arrivals)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The problem at hand, and how it is cut. What forward and backward have in common."""

    problem: spec.Problem
    config: Any
    schedule: Schedule
    blocks: int
    forms: Any
    refs: Any

    @property
    def one_tile_each(self) -> bool:
        """Whether each block has one tile to work on, and knows so."""
        return False

    @property
    def takes_first(self) -> bool:
        """Whether a block takes its first tile as it takes the others: none has one before it runs.

        Blocks that run may then wait for tiles that others have. It costs the time of one access.
        """
        return False

    @property
    def masks(self) -> bool:
        """Whether some visit needs a mask."""
        return visits.needs_masks(self.problem, self.config.block_kv)

    def over_visits(
        self, walk: Walk, first: Any, visit: Callable[[bool], Callable[[Any, Any], Any]], carry: Any
    ) -> Any:
        """Calls ``visit(masked)`` for each of a walk from ``first`` on; returns the last carry."""
        if self.masks:
            from_start = isinstance(first, int) and first == 0
            masked = walk.masked if from_start else jnp.maximum(walk.masked, first)
            carry = lax.fori_loop(first, masked, visit(True), carry)
            first = masked
        return lax.fori_loop(first, walk.count, visit(False), carry)

    @property
    def ends_within_tiles(self) -> bool:
        """See `visits.ends_within_tiles`."""
        return visits.ends_within_tiles(self.problem, self.config.block_kv)

    @property
    def modifies(self) -> bool:
        return modifies(self.problem)

    @property
    def unit(self) -> float:
        """What `Visit.logits` are multiples of: one that saves a multiplication of each.

        What is added to ``q.k``, ALiBi, and what it is capped by are divided by it beforehand.
        """
        p = self.problem
        if p.operands.bias is not None or p.score_mod is not None:
            return 1.0
        return p.soft_cap or (p.scale if p.scale > 0 else 1.0)

    @property
    def hides_keys(self) -> bool:
        """Whether there may be keys that nobody sees: their values may be NaN, and 0 NaN is NaN."""
        p, x = self.problem, self.refs.x
        if p.operands.is_quantized:  # hidden values of 8 bits are finite, by contract
            return False
        if self.refs.map is not None or x.key_value_lengths is not None:
            return True
        if p.static_band is None or x.query_lengths is not None:
            return not p.band.is_unbounded
        return visits.band_hides_keys(p)

    @property
    def empties_rows(self) -> bool:
        """Whether a row may see no key. It still multiplies the values of those that others see."""
        return visits.empties_rows(self.problem, self.modifies)


def divide(
    consumers: int,
    registers: tuple[int, int],
    consume: Callable[[], None],
    produce: Callable[[], None],
) -> None:
    """Runs consumers and the producer, each in its warpgroup, with ``registers`` for its task."""
    of_consumer, of_producer = registers

    @pl.when(lax.axis_index("warpgroup") < consumers)
    def _() -> None:
        mosaic.set_max_registers(of_consumer, action="increase")
        consume()

    @pl.when(lax.axis_index("warpgroup") == consumers)
    def _() -> None:
        mosaic.set_max_registers(of_producer, action="decrease")
        produce()


def next_tile(k: "Forward", round_: Any) -> tuple[Any, Work]:
    """Waits for the Q of a round; returns which tile it is, beyond the last if there is none."""
    stage = lax.rem(round_, k.config.q_stages)
    mosaic.barrier_wait(k.refs.q_full.at[stage])
    tile = mosaic.uniform(k.refs.tile_smem[stage])
    return tile, k.schedule.work(jnp.minimum(tile, k.schedule.tiles - 1))


def drain(uses: Any, stages: int, *free: mosaic.Ref) -> None:
    """Waits until the stages of a ring that has had some uses are free."""

    @pl.loop(jnp.maximum(uses - stages, 0), uses)
    def _(use: Any) -> None:
        for barrier in free:
            mosaic.barrier_wait(barrier.at[lax.rem(use, stages)])


class Forward(Kernel):
    """The kernel of the forward."""

    config: Config
    forms: Forms
    refs: Refs

    @property
    def one_tile_each(self) -> bool:
        return self.schedule.tiles <= self.blocks

    def walk(self, work: Work) -> Walk:
        """The tiles of keys that a tile of queries visits."""
        found = self.refs.map
        if found is not None:
            heads = visits.heads_of(found.count, work.batch, work.head)
            return found.walk((*heads, work.q_block))
        return self.whole_walk(work)

    def kv_head(self, work: Work) -> Any:
        """The head of the keys."""
        return lax.div(work.head, self.problem.G)

    def whole_walk(self, work: Work) -> Walk:
        """The same where the band and lengths tell all."""
        p, c = self.problem, self.config
        return visits.of_rows(p, self.refs.x, work, c.block_q, c.block_kv)

    @property
    def has_tiles_without_rows(self) -> bool:
        """Whether consumers have no rows in the last tile of queries."""
        return -self.problem.T % self.config.block_q >= self.config.rows

    def row_count(self, work: Work) -> Any:
        """How many rows see anything, the others being empty whatever their logits; None if all."""
        if self.refs.x.query_lengths is None:
            return None
        return visits.row_count(self.problem, self.refs.x, work.batch)

    @property
    def widens(self) -> bool:
        """Whether keys and values are in pages of 8 bits."""
        return self.problem.operands.has_narrow_pages

    @property
    def rounds(self) -> bool:
        """Whether queries are to be rounded to 8 bits."""
        return self.problem.operands.rounds_query

    @property
    def scaled_parts(self) -> int:
        """See `Forms.scaled_parts`."""
        return self.forms.scaled_parts(self.config, self.problem.operands)

    def is_patient(self, masked: bool) -> bool:
        """Whether a visit leaves sums as they are until a row has grown by `patience`.

        Those that need a mask are few, and their registers are taken; so they are where data may
        mask them and products overlap. Where a tile of scores is turned, a row is spread over all
        warps, which would have to agree.
        """
        c = self.config
        return not (masked or c.turned or (c.overlaps and self.problem.masks_by_data))

    @property
    def patience(self) -> float:
        """log2 of how much larger than 1 probabilities may grow before sums follow."""
        return _PATIENCE if self.refs.scales is None else _PATIENCE_IN_8_BITS

    def decayed(
        self, o: tuple[jax.Array, ...], decay: jax.Array, masked: bool
    ) -> tuple[jax.Array, ...]:
        """Sums relative to what is the largest now."""
        if self.is_patient(masked):
            return mosaic.scaled_rows(o, decay)
        return tuple(x * self.orientation.spread(decay, x.shape) for x in o)

    def output_columns(self) -> list[int]:
        """Of the pieces that O has."""
        if self.refs.scales is None:
            return [piece.columns for piece in self.forms.v.pieces]
        return [self.problem.Hv]

    @property
    def orientation(self) -> Orientation:
        """How tiles are held."""
        return Orientation.of(self)

    def query(self, work: Work, rows: Any) -> mosaic.Ref:
        """Rows of a head's queries."""
        return self.refs.x.query.at[work.batch, rows, work.head]

    def out(self, work: Work, rows: Any) -> mosaic.Ref:
        """Where rows of O go."""
        return self.refs.out_gmem.at[work.batch, rows, work.head]

    def lse(self, work: Work, rows: Any) -> mosaic.Ref:
        """Where rows of the lse go."""
        return self.refs.lse_gmem.at[work.batch, work.head, rows]
