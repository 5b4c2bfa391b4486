"""The forward: FlashAttention-2's (Dao 2023, algorithm 1), in Pallas for Triton.

A program has a tile of queries and visits the tiles of keys that some of them see: first those that
need a mask, then the others. Logits are kept to base 2. Keys may be in pages, and the visits of a
tile of queries may be divided among programs, whose parts are put together afterwards: `decode`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec
from pallas_kernels.common import accepts, block_map, evaluate, visits
from pallas_kernels.common.block_map import BlockMap
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk, part, part_exists
from pallas_kernels.triton import memory
from pallas_kernels.triton import tile as tiles
from pallas_kernels.triton.config import Config, forward_config, is_supported
from pallas_kernels.triton.memory import Ref, Run, dot, load_rows, store_rows, store_vector

LOG2_E = math.log2(math.e)
# Pallas-Triton's offsets have 32 bits up to 2^32 bytes, which are as many elements of a mask.
_LARGEST_MASK = 2**31


@dataclasses.dataclass(frozen=True)
class Forward:
    """The problem at hand, how it is cut, and where things are."""

    problem: spec.Problem  # whose functions a kernel can call
    config: Config
    splits: int
    is_packed: bool  # queries and outputs have heads before rows
    x: spec.Operands  # references
    map: BlockMap | None

    def at(self, work: Work) -> Callable[[Any], tuple[Any, ...]]:
        """Where rows of the queries are."""
        if self.is_packed:
            return lambda row: (work.batch, work.head, row)
        return lambda row: (work.batch, row, work.head)

    def walk(self, work: Work) -> Walk:
        """The tiles of keys to be visited."""
        if self.map is not None:
            heads = visits.heads_of(self.map.count, work.batch, work.head)
            return self.map.walk((*heads, work.q_block))
        walk = self.whole_walk(work)
        return walk if self.splits == 1 else part(walk, work.split, self.splits)

    def whole_walk(self, work: Work) -> Walk:
        c = self.config
        return visits.of_rows(self.problem, self.x, work, c.block_q, c.block_kv)

    def attend(self, work: Work) -> tuple[Run, jax.Array, jax.Array]:
        """Rows, and their output and lse."""
        p, c = self.problem, self.config
        rows = Run.of(work.q_block * c.block_q, c.block_q, p.T)
        q = load_rows(self.x.query, self.at(work), rows, Run.columns(p.H))
        walk = self.walk(work)
        state = spec.softmax.start((c.block_q, memory.padded(p.Hv)), jnp.float32)

        def visiting(masked: bool) -> Callable[[Any, spec.softmax.State], spec.softmax.State]:
            return lambda number, state: self.visit(work, rows, q, walk.tile(number), masked, state)

        first: Any = 0
        if self.masks:
            state = lax.fori_loop(0, walk.masked, visiting(True), state)
            first = walk.masked
        state = lax.fori_loop(first, walk.count, visiting(False), state)
        if self.splits > 1:
            exists = part_exists(self.whole_walk(work), work.split, self.splits)
            state = state._replace(m=jnp.where(exists, state.m, -jnp.inf))
        if self.x.query_lengths is not None:
            exist = rows.indices < visits.row_count(p, self.x, work.batch)
            state = state._replace(m=jnp.where(exist, state.m, -jnp.inf))
        sink = None if self.x.sinks is None else self.x.sinks[work.head].astype(jnp.float32)
        out, lse = spec.softmax.finish(state, sink, base2=True)
        return rows, out, lse

    def visit(
        self, work: Work, rows: Run, q: jax.Array, kv_block: Any, masked: bool, state: Any
    ) -> Any:
        """Takes a tile of keys and values into the state."""
        p, c = self.problem, self.config
        keys = Run.of(kv_block * c.block_kv, c.block_kv, p.S)
        place = tiles.Place(work.batch, work.head, rows, keys)
        columns, at, exist = self.where_keys(place, masked)
        s = dot(q, self.load(self.x.key, self.x.key_scale, at, exist, columns[0]).T)
        needs_tile = masked or spec.score.modifies(p) or p.dropout_rate > 0
        tile: Any = tiles.tile_of(p, self.x, place, masked) if needs_tile else None
        if spec.score.modifies(p):
            s = spec.score.modify(p, tile, s * p.scale) * LOG2_E
        else:
            s = s * (p.scale * LOG2_E)
        allowed = tiles.visible(p, tile, (c.block_q, c.block_kv)) if masked else None
        wanted = None
        if allowed is not None:
            s = jnp.where(allowed, s, -jnp.inf)
            # What no row here sees may hold NaN, and 0 * NaN would spread it.
            wanted = tiles.some(allowed, axis=0)
        v = self.load(self.x.value, self.x.value_scale, at, exist, columns[1], wanted)
        state, weights = spec.softmax.update(state, s, base2=True)
        if p.dropout_rate > 0:
            seed = self.x.dropout_seed
            weights = spec.dropout.apply(p, tile, (seed[0], seed[1]), weights)
        return state._replace(acc=state.acc + dot(weights.astype(v.dtype), v))

    @property
    def masks(self) -> bool:
        """Whether some visit needs a mask."""
        return visits.needs_masks(self.problem, self.config.block_kv)

    def load(self, ref: Ref, scales: Ref | None, at: Any, *tile: Any) -> jax.Array:
        """A tile of K or V, in the dtype of queries."""
        x = load_rows(ref, at, *tile)
        if scales is None:
            return x
        rows, _, *wanted = tile
        page, _, head = at(rows.indices[:, None])
        scale = memory.load_where(scales, (page[:, 0], head), rows, *wanted)
        dtype = self.problem.operands.key.dtype
        return (spec.narrow.from_bits(x, dtype) * scale[:, None]).astype(self.problem.dtype)

    def where_keys(self, place: tiles.Place, masked: bool) -> Any:
        """Columns of K and V, where a tile of them is, in pages perhaps, and which keys exist."""
        p, x = self.problem, self.x
        columns = Run.columns(p.H), Run.columns(p.Hv)
        head, keys = lax.div(place.head, p.G), place.keys
        if x.page_table is None:
            exist = keys if masked else keys._replace(limit=None)
            return columns, lambda key: (place.batch, key, head), exist
        size = x.key.shape[1]
        exist = keys._replace(limit=visits.key_count(p, x, place.batch))
        page = memory.load_pages(x.page_table, place.batch, exist, size)
        return columns, lambda key: (page[:, None], lax.rem(key, size), head), exist


@functools.partial(jax.jit, static_argnums=(0, 2))
def forward(
    problem: spec.Problem, operands: spec.Operands, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in float32."""
    c = config or forward_config(problem)
    found = None
    if block_map.needs_map(problem):
        found = block_map.block_map(problem, operands, c.block_q, c.block_kv)
    out, lse = launch(problem, c, operands, found)
    return out, lse.swapaxes(1, 2)


def launch(
    problem: spec.Problem,
    c: Config,
    operands: spec.Operands,
    found: BlockMap | None,
    splits: int | None = None,  # of packed rows
) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel over all tiles of queries, or over parts of the visits of packed rows.

    Output and lse are [B, T, N, Hv] and [B, N, T]; of parts [B, N, splits, T, Hv] in float32, and
    [B, N, splits, T].
    """
    p, is_packed, parts = problem, splits is not None, splits or 1
    lead = (p.B, p.N, parts) if is_packed else (p.B, p.N)
    out_shape = (*lead, p.T, p.Hv) if is_packed else (p.B, p.T, p.N, p.Hv)
    in_kernel = evaluate.in_kernel(problem, memory.read)
    leaves, tree = jax.tree.flatten((tiles.prepare(operands), found))
    q_blocks = pl.cdiv(problem.T, c.block_q)

    def kernel(*refs: Ref) -> None:
        x, by_data = jax.tree.unflatten(tree, refs[: len(leaves)])
        out_ref, lse_ref = refs[len(leaves) :]
        k = Forward(in_kernel, c, parts, is_packed, x, by_data)
        head, batch = pl.program_id(1), pl.program_id(2)

        def run(number: Any, _: Any = None) -> None:
            split, q_block = lax.rem(number, parts), lax.div(number, parts)
            work = Work(batch, head, q_blocks - 1 - q_block, split)  # those with most to do first
            rows, out, lse = k.attend(work)
            of_head = (batch, head, split) if is_packed else (batch, head)
            at = (lambda row: (*of_head, row)) if is_packed else k.at(work)
            store_rows(out_ref, at, rows, Run.columns(problem.Hv), out)
            store_vector(lse_ref, of_head, rows, lse)

        if c.schedule == 1:
            lax.fori_loop(0, q_blocks * parts, run, None)
        else:
            run(pl.program_id(0))

    outputs = [
        jax.ShapeDtypeStruct(out_shape, jnp.float32 if is_packed else p.dtype),
        jax.ShapeDtypeStruct((*lead, p.T), jnp.float32),
    ]
    tiles_of_head = 1 if c.schedule == 1 else q_blocks * parts
    out, lse = memory.launch(
        kernel,
        (tiles_of_head, problem.N, problem.B),
        leaves,
        outputs,
        problem.device,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        name="triton_forward",
    )
    return out, lse


def supports(problem: spec.Problem) -> str | None:
    """Why these kernels cannot run a problem, or None."""
    p = problem
    if not (is_supported(p.device) or (p.device.platform == "cpu" and memory.is_interpreting())):
        return f"needs an NVIDIA GPU, Ampere or later; this device is {p.device.kind}"
    if p.operands.mask is not None and p.operands.mask.size > _LARGEST_MASK:
        return f"addresses masks of at most 2**31 elements; got shape {p.operands.mask.shape}"
    return accepts.refused(p)
