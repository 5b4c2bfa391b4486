"""The backward: FlashAttention-2's (Dao 2023, algorithm 2) in two kernels, in Pallas for Triton.

One has a program for each tile of keys, which visits tiles of queries and sums dK and dV; the other
a program for each tile of queries, which visits tiles of keys and sums dQ. Both compute P and dS of
a visit anew. So nothing is added to memory in an order that changes, but for the gradient of a bias
that batch elements or heads share.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import spec
from pallas_kernels.common import accepts, block_map, evaluate, visits
from pallas_kernels.common.block_map import BlockMap
from pallas_kernels.common.schedule import Work
from pallas_kernels.common.walk import Walk
from pallas_kernels.triton import memory
from pallas_kernels.triton import tile as tiles
from pallas_kernels.triton.config import BackwardConfig, Config, backward_config
from pallas_kernels.triton.forward import LOG2_E
from pallas_kernels.triton.memory import Ref, Run, dot, load_rows, load_vector, store_rows


class Inputs(NamedTuple):
    """References to what both kernels read."""

    x: spec.Operands
    dout: Ref  # [B, T, N, Hv]
    lse: Ref  # [B, N, T], to base 2; infinite where a row saw nothing
    delta: Ref  # [B, N, T]
    map: BlockMap | None


class Rows(NamedTuple):
    """What is known of a tile of queries."""

    q: jax.Array  # [block_q, H]
    dout: jax.Array  # [block_q, Hv]
    lse: jax.Array  # [block_q]
    delta: jax.Array  # [block_q]


class Keys(NamedTuple):
    """What is known of a tile of keys."""

    k: jax.Array  # [block_kv, H]
    v: jax.Array  # [block_kv, Hv]


class Seen(NamedTuple):
    """What masks and modifications need to know of a tile of logits."""

    tile: Any  # None: nothing
    allowed: jax.Array | None  # [block_q, block_kv]; None: everything is visible


@dataclasses.dataclass(frozen=True)
class Backward:
    """The problem at hand, how it is cut, and where things are."""

    problem: spec.Problem  # whose functions a kernel can call
    config: Config
    inputs: Inputs

    @property
    def masks(self) -> bool:
        """Whether some visit needs a mask."""
        return visits.needs_masks(self.problem, self.config.block_kv)

    @property
    def empties_rows(self) -> bool:
        """Whether a row may see no key; it may then hold NaN."""
        return visits.empties_rows(self.problem, spec.score.modifies(self.problem))

    def rows(self, q_block: Any) -> Run:
        return Run.of(q_block * self.config.block_q, self.config.block_q, self.problem.T)

    def keys(self, kv_block: Any) -> Run:
        return Run.of(kv_block * self.config.block_kv, self.config.block_kv, self.problem.S)

    def load_of_rows(
        self, batch: Any, head: Any, rows: Run, wanted: jax.Array | None = None
    ) -> Rows:
        """Rows of a head; those that see nothing, or are not wanted, are zero."""
        p, x = self.problem, self.inputs
        at: Callable[[Any], tuple[Any, ...]] = lambda row: (batch, row, head)  # noqa: E731
        lse = load_vector(x.lse, (batch, head), rows, math.inf)
        if self.empties_rows:
            wanted = lse < math.inf if wanted is None else wanted & (lse < math.inf)
        return Rows(
            load_rows(x.x.query, at, rows, Run.columns(p.H), wanted),
            load_rows(x.dout, at, rows, Run.columns(p.Hv), wanted),
            lse,
            load_vector(x.delta, (batch, head), rows),
        )

    def load_of_keys(
        self, batch: Any, head: Any, keys: Run, wanted: jax.Array | None = None
    ) -> Keys:
        """Keys and values; keys that are not wanted are zero."""
        p, x = self.problem, self.inputs.x
        at: Callable[[Any], tuple[Any, ...]] = lambda key: (batch, key, head)  # noqa: E731
        return Keys(
            load_rows(x.key, at, keys, Run.columns(p.H), wanted),
            load_rows(x.value, at, keys, Run.columns(p.Hv)),
        )

    def see(self, place: tiles.Place, masked: bool) -> Seen:
        """What is visible of a tile of logits."""
        p, c = self.problem, self.config
        if not (masked or spec.score.modifies(p) or p.dropout_rate > 0):
            return Seen(None, None)
        tile = tiles.tile_of(p, self.inputs.x, place, masked)
        return Seen(tile, tiles.visible(p, tile, (c.block_q, c.block_kv)) if masked else None)

    def differentiate(self, seen: Seen, rows: Rows, keys: Keys) -> tuple[jax.Array, jax.Array]:
        """P after dropout, in the dtype of the operands, and dS by ``scale * q.k`` in float32."""
        p = self.problem
        s, slope = dot(rows.q, keys.k.T), None
        if spec.score.modifies(p):
            s, slope = spec.score.modify_with_slope(p, seen.tile, s * p.scale)
            s = s * LOG2_E
        else:
            s = s * (p.scale * LOG2_E)
        if seen.allowed is not None:
            s = jnp.where(seen.allowed, s, -jnp.inf)
        weights = jnp.exp2(s - rows.lse[:, None])
        kept, dp = weights, dot(rows.dout, keys.v.T)
        if p.dropout_rate > 0:
            seed = self.inputs.x.dropout_seed
            kept, dp = (
                spec.dropout.apply(p, seen.tile, (seed[0], seed[1]), x) for x in (weights, dp)
            )
        if slope is not None:  # which may be infinite where there is no row
            weights = jnp.where(weights > 0, weights * slope, 0)
        ds = weights * (dp - rows.delta[:, None])
        if seen.allowed is not None:  # of what is hidden it may be NaN
            ds = jnp.where(seen.allowed, ds, 0)
        return kept.astype(p.dtype), ds


def _walked(walk: Walk, masks: bool, visit: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
    """All visits of a walk, first those that need a mask."""
    first: Any = 0
    if masks:
        first = walk.masked
        carry = lax.fori_loop(0, first, lambda i, c: visit(walk.tile(i), True, c), carry)
    return lax.fori_loop(first, walk.count, lambda i, c: visit(walk.tile(i), False, c), carry)


class _Output(NamedTuple):
    shape: jax.ShapeDtypeStruct
    is_zeroed: bool = False


def _of_keys(k: Backward, out: dict[str, Ref], kv_block: Any, kv_head: Any, batch: Any) -> None:
    """DK and dV of a tile of keys; and what is summed over rows, for each head of the group."""
    p, c = k.problem, k.config
    keys = k.keys(kv_block)
    held = k.load_of_keys(batch, kv_head, keys)

    def of_member(member: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        head = kv_head * p.G + member

        def visit(q_block: Any, masked: bool, carry: Any) -> Any:
            dk, dv, bias = carry
            rows = k.rows(q_block)
            seen = k.see(tiles.Place(batch, head, rows, keys), masked)
            # What sees none of these keys may hold NaN, and 0 * NaN would spread it.
            wanted = None if seen.allowed is None else tiles.some(seen.allowed, axis=1)
            of_rows = k.load_of_rows(batch, head, rows, wanted)
            weights, ds = k.differentiate(seen, of_rows, held)
            dv = dv + dot(weights.T, of_rows.dout)
            dk = dk + dot(ds.astype(p.dtype).T, of_rows.q)
            return dk, dv, bias + jnp.sum(ds, axis=0) if "bias_by_key" in out else bias

        walk = _walk_of_keys(k, batch, head, kv_block)
        start = (*carry, jnp.zeros(c.block_kv, jnp.float32))
        dk, dv, bias = _walked(walk, k.masks, visit, start)
        if "bias_by_key" in out:
            memory.store_vector(out["bias_by_key"], (batch, head), keys, bias)
        return dk, dv

    dk = jnp.zeros((c.block_kv, memory.padded(p.H)), jnp.float32)
    zeros = dk, jnp.zeros((c.block_kv, memory.padded(p.Hv)), jnp.float32)
    dk, dv = of_member(0, zeros) if p.G == 1 else lax.fori_loop(0, p.G, of_member, zeros)
    at: Callable[[Any], tuple[Any, ...]] = lambda key: (batch, key, kv_head)  # noqa: E731
    store_rows(out["key"], at, keys, Run.columns(p.H), dk * p.scale)
    store_rows(out["value"], at, keys, Run.columns(p.Hv), dv)


def _walk_of_keys(k: Backward, batch: Any, head: Any, kv_block: Any) -> Walk:
    found, c = k.inputs.map, k.config
    if found is not None:
        return found.walk((*visits.heads_of(found.count, batch, head), kv_block))
    return visits.of_keys(k.problem, k.inputs.x, batch, kv_block, c.block_q, c.block_kv)


def _of_rows(k: Backward, out: dict[str, Ref], q_block: Any, head: Any, batch: Any) -> None:
    """DQ of a tile of queries; and what is summed over keys, or not at all."""
    p, c = k.problem, k.config
    rows = k.rows(q_block)
    held = k.load_of_rows(batch, head, rows)

    def visit(kv_block: Any, masked: bool, carry: Any) -> Any:
        dq, bias, slopes = carry
        keys = k.keys(kv_block)
        seen = k.see(tiles.Place(batch, head, rows, keys), masked)
        wanted = None if seen.allowed is None else tiles.some(seen.allowed, axis=0)
        of_keys = k.load_of_keys(batch, lax.div(head, p.G), keys, wanted)
        _, ds = k.differentiate(seen, held, of_keys)
        dq = dq + dot(ds.astype(p.dtype), of_keys.k)
        if "bias_by_row" in out:
            bias = bias + jnp.sum(ds, axis=1)
        if "alibi_slopes" in out:
            slopes = slopes - jnp.sum(ds * spec.score.distance(seen.tile), axis=1)
        if "bias" in out:
            at = visits.heads_of(out["bias"], batch, head)
            place_of = lambda row: (*at, row)  # noqa: E731
            if out["bias"].shape[:2] == (p.B, p.N):
                store_rows(out["bias"], place_of, rows, keys, ds)
            else:
                memory.add_rows(out["bias"], place_of, rows, keys, ds, p.device)
        return dq, bias, slopes

    work, x = Work(batch, head, q_block), k.inputs
    if x.map is not None:
        walk = x.map.walk((*visits.heads_of(x.map.count, batch, head), q_block))
    else:
        walk = visits.of_rows(p, x.x, work, c.block_q, c.block_kv)
    vector = jnp.zeros(c.block_q, jnp.float32)
    start = (jnp.zeros((c.block_q, memory.padded(p.H)), jnp.float32), vector, vector)
    dq, bias, slopes = _walked(walk, k.masks, visit, start)
    store_rows(out["query"], lambda row: (batch, row, head), rows, Run.columns(p.H), dq * p.scale)
    for name, total in (("bias_by_row", bias), ("alibi_slopes", slopes)):
        if name in out:
            memory.store_vector(out[name], (batch, head), rows, total)


def _outputs(p: spec.Problem) -> tuple[dict[str, _Output], dict[str, _Output]]:
    """Of the kernel of keys, and of that of rows."""
    x = p.operands

    def like(y: Any) -> _Output:
        return _Output(jax.ShapeDtypeStruct(y.shape, y.dtype))

    def summed(size: int) -> _Output:
        return _Output(jax.ShapeDtypeStruct((p.B, p.N, size), jnp.float32))

    of_keys, of_rows = {"key": like(x.key), "value": like(x.value)}, {"query": like(x.query)}
    if p.differentiates("bias"):
        has_rows, has_keys = (x.bias.shape[axis] > 1 for axis in (2, 3))
        if has_rows and has_keys:
            own = x.bias.shape[:2] == (p.B, p.N)
            dtype = x.bias.dtype if own else jnp.float32
            of_rows["bias"] = _Output(jax.ShapeDtypeStruct(x.bias.shape, dtype), True)
        elif has_keys:
            of_keys["bias_by_key"] = summed(p.S)
        else:
            of_rows["bias_by_row"] = summed(p.T)
    if p.differentiates("alibi_slopes"):
        of_rows["alibi_slopes"] = summed(p.T)
    return of_keys, of_rows


@functools.partial(jax.jit, static_argnums=(0, 6))
def backward(
    problem: spec.Problem,
    operands: spec.Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    config: BackwardConfig | None = None,
) -> spec.Operands:
    """Gradients of the floating operands; None for the others."""
    p, configs = problem, config or backward_config(problem)
    delta = spec.softmax.delta(out, lse, dout, dlse)
    base2 = jnp.where(lse == -math.inf, math.inf, lse * LOG2_E)
    has_map = block_map.needs_map(problem)
    found: dict[str, jax.Array] = {}
    keys = pl.cdiv(p.S, configs.of_keys.block_kv), p.K, p.B
    rows = pl.cdiv(p.T, configs.of_rows.block_q), p.N, p.B
    for kernel, c, outputs, make_map, grid in (
        (_of_keys, configs.of_keys, _outputs(p)[0], block_map.by_key, keys),
        (_of_rows, configs.of_rows, _outputs(p)[1], block_map.block_map, rows),
    ):
        by_data = make_map(problem, operands, c.block_q, c.block_kv) if has_map else None
        x = tiles.prepare(operands)
        inputs = Inputs(x, dout, base2.swapaxes(1, 2), delta.swapaxes(1, 2), by_data)
        found |= _launch(problem, c, kernel, outputs, inputs, grid)
    result = spec.Operands(
        query=found["query"],
        key=found["key"],
        value=found["value"],
        bias=_dbias(problem, found),
        alibi_slopes=jnp.sum(found["alibi_slopes"], (0, 2)) if "alibi_slopes" in found else None,
        sinks=spec.softmax.of_sinks(operands.sinks, lse, delta),
    )
    return spec.gradients(operands, result)


def _launch(
    problem: spec.Problem,
    c: Config,
    kernel: Callable[..., None],
    outputs: dict[str, _Output],
    inputs: Inputs,
    grid: tuple[int, ...],
) -> dict[str, jax.Array]:
    in_kernel = evaluate.in_kernel(problem, memory.read)
    leaves, tree = jax.tree.flatten(inputs)

    def body(*refs: Ref) -> None:
        k = Backward(in_kernel, c, jax.tree.unflatten(tree, refs[: len(leaves)]))
        out = dict(zip(outputs, refs[len(leaves) :], strict=True))
        block = grid[0] - 1 - pl.program_id(0) if kernel is _of_rows else pl.program_id(0)
        kernel(k, out, block, pl.program_id(1), pl.program_id(2))

    results = memory.launch(
        body,
        grid,
        leaves,
        [output.shape for output in outputs.values()],
        problem.device,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        name=f"triton_backward{kernel.__name__}",
        zeroed=[i for i, output in enumerate(outputs.values()) if output.is_zeroed],
    )
    return dict(zip(outputs, results, strict=True))


def _dbias(problem: spec.Problem, found: dict[str, jax.Array]) -> jax.Array | None:
    """The gradient of a bias, summed over what it is the same for."""
    if "bias" in found:
        return found["bias"]
    if "bias_by_key" in found:
        total = found["bias_by_key"][:, :, None, :]
    elif "bias_by_row" in found:
        total = found["bias_by_row"][:, :, :, None]
    else:
        return None
    shape = problem.operands.bias.shape
    alike = tuple(axis for axis in range(4) if shape[axis] == 1 and total.shape[axis] > 1)
    return jnp.sum(total, alike, keepdims=True)


def supports_backward(problem: spec.Problem) -> str | None:
    """Why these kernels cannot differentiate what the forward accepts, or None."""
    p = problem
    if p.deterministic and p.differentiates("bias"):
        shape = p.operands.bias.shape
        if min(shape[2:]) > 1 and shape[:2] != (p.B, p.N):
            return "adds a bias's gradient up over batch and heads in no fixed order"
    return accepts.refused_gradients(p)
