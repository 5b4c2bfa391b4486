"""The backward in one pass: FlashAttention-3's (Shah et al. 2024), in Pallas for Mosaic GPU.

A block takes a tile of keys and visits the tiles of queries that see some of them. Five products a
visit: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ = dS K. dK and dV stay in the
registers of two consumer warpgroups until the tile is done (and are then added up, where each head
of a large group has a block of its own); dQ is added to global memory in float32, in the order in
which threads have it, which XLA undoes when it rounds the sums, or, where these are large, the
kernel itself (`backward_rounding`).

How the consumers divide the work: `backward_by_keys` for heads of up to 128 columns,
`backward_by_columns` for wider ones. What they have in common, the computation of P and dS, is in
`backward_visit`; `backward_kernel.Refs` is the map of shared memory; the producer, which copies
tiles into it, is in `backward_producer`. What is to be known of rows beforehand is in
`backward_rows`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common import accepts, block_map, visits
from pallas_kernels.common.schedule import Schedule, largest_divisor
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.backward_by_columns import BY_COLUMNS
from pallas_kernels.hopper.backward_by_keys import BY_KEYS
from pallas_kernels.hopper.backward_kernel import (
    CONSUMERS,
    Backward,
    BackwardConfig,
    BackwardForms,
    divides_groups,
    key_sums,
    of_one,
    rounds_dq,
    stores_bias,
    sums_bias,
)
from pallas_kernels.hopper.backward_producer import produce
from pallas_kernels.hopper.backward_rounding import Rounding
from pallas_kernels.hopper.backward_rows import of_rows
from pallas_kernels.hopper.backward_visit import consume
from pallas_kernels.hopper.config import ROWS, modifies
from pallas_kernels.hopper.kernel import divide


class Plan(NamedTuple):
    """How a problem is cut into tiles, and how blocks divide them."""

    problem: spec.Problem
    config: BackwardConfig
    forms: BackwardForms
    q_blocks: int
    kv_blocks: int
    adds_keys: bool  # see `divides_groups`
    schedule: Schedule
    blocks: int

    @classmethod
    def of(cls, p: spec.Problem, config: BackwardConfig | None, blocks: int | None) -> "Plan":
        c = config or BackwardConfig.default(p)
        q_blocks, kv_blocks = pl.cdiv(p.T, c.block_q), pl.cdiv(p.S, c.block_kv)
        blocks = blocks or gpu.multiprocessors(p.device)
        adds_keys = divides_groups(p, c, blocks, kv_blocks)
        heads = p.N if adds_keys else p.K
        blocks = min(blocks, p.B * heads * kv_blocks)
        at_once = _heads_at_once(p, heads, blocks, kv_blocks)
        schedule = Schedule(p.B, heads, kv_blocks, at_once, last_head_first=True)
        forms = BackwardForms.of(p, c)
        return cls(p, c, forms, q_blocks, kv_blocks, adds_keys, schedule, blocks)

    @property
    def rows(self) -> int:
        """In whole tiles."""
        return self.q_blocks * self.config.block_q

    @property
    def keys(self) -> int:
        """Likewise."""
        return self.kv_blocks * self.config.block_kv

    @property
    def bias_tiles(self) -> tuple[int, ...]:
        """How many matrices a bias's gradient is summed in, or stored."""
        shape, c = self.problem.operands.bias.shape, self.config
        return (*shape[:2], self.kv_blocks * c.key_groups, self.rows // c.bias_width)

    def sums(self) -> dict[str, mosaic.Sums]:
        """What blocks add to, by the operand whose gradient it is; in the order of `Refs`."""
        p, c, forms = self.problem, self.config, self.forms
        dtype = jnp.int32 if p.deterministic else jnp.float32
        shape: tuple[int, ...] = (p.B, self.rows // ROWS, p.N, forms.q.strips)
        staged = not c.by_columns
        found = {"query": mosaic.Sums.zero(self.kv_blocks, shape, c.width, dtype, is_staged=staged)}
        if sums_bias(p) and not stores_bias(p):
            found["bias"] = mosaic.Sums.zero(p.B * p.N, self.bias_tiles, c.bias_width)
        for name, form in (("key", forms.k), ("value", forms.v)) if self.adds_keys else ():
            shape = (p.B, self.kv_blocks * c.key_groups, p.K, form.strips)
            found[name] = mosaic.Sums.zero(p.G, shape, c.width)
        return found

    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Of dK and dV unless they are sums, in whole tiles where they are not copied out.

        And of what is stored of a bias, sums over rows, by key, and dQ if the kernel rounds it.
        """
        p, c = self.problem, self.config
        shapes = [
            (p.B, self.keys, p.K, form.columns)
            if c.by_columns
            else (p.B, p.S, p.K, mosaic.copied_columns(form.array_columns))
            for form in (self.forms.k, self.forms.v)
        ]
        outputs = [] if self.adds_keys else [jax.ShapeDtypeStruct(s, p.dtype) for s in shapes]
        if stores_bias(p):
            shape = (*self.bias_tiles, ROWS * c.bias_width)
            outputs.append(jax.ShapeDtypeStruct(shape, p.operands.bias.dtype))
        if names := key_sums(p):
            shape = (len(names), CONSUMERS if c.by_columns else 1, p.B, p.N, self.keys)
            outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        if rounds_dq(p, c):
            shape = (p.B, p.T, p.N, mosaic.copied_columns(p.H))
            outputs.append(jax.ShapeDtypeStruct(shape, p.dtype))
        return outputs

    def launch(self, inputs: tuple[Any, ...], sums: dict[str, mosaic.Sums]) -> list[jax.Array]:
        """Runs the kernel on what `Refs` begins with; it adds to the sums, returns the outputs."""
        p, c, forms = tiles.in_kernel(self.problem), self.config, self.forms
        leaves, tree = jax.tree.flatten(inputs)

        def backward_kernel(*refs: mosaic.Ref) -> None:
            inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
            named = forms.refs(p, c, inputs, *refs[len(leaves) :])
            k = Backward(p, c, self.schedule, self.blocks, forms, named)
            order = BY_COLUMNS if c.by_columns else BY_KEYS
            rounding = Rounding.of(k) if rounds_dq(p, c) else None
            tasks = (functools.partial(consume, k, order, rounding), lambda: produce(k, rounding))
            divide(CONSUMERS, k.registers, *tasks)

        call = mosaic.kernel(
            backward_kernel,
            out_type=self.outputs(),
            scratch_types=list(forms.scratch(p, c).values()),
            grid={"block": self.blocks},
            threads=("warpgroup", CONSUMERS + 1),
            # As in the forward; what a thread of dS writes, `commit_smem` shows to the product that
            # waits at `ds_full`, where each thread arrives by itself.
            params=mosaic.compiler_params(reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
        )
        return list(call(*leaves, *(s.ref for s in sums.values())))


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def backward(
    problem: spec.Problem,
    operands: spec.Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    config: BackwardConfig | None = None,
    blocks: int | None = None,
) -> spec.Operands:
    """Gradients of the floating operands; None for the others.

    Args:
      problem: What `supports_backward` accepts.
      operands: Its arrays.
      out: [B, T, N, Hv], of the forward.
      lse: [B, T, N] float32, likewise.
      dout: Cotangent of ``out``.
      dlse: Cotangent of ``lse``.
      config: Default: see `BackwardConfig.default`.
      blocks: Size of the grid. Default: one for each multiprocessor.
    """
    plan = Plan.of(problem, config, blocks)
    p, c, forms = problem, plan.config, plan.forms
    needs_map = block_map.needs_map(p)
    found = block_map.by_key(p, operands, c.block_q, c.block_kv) if needs_map else None
    delta, stats, empty, units = of_rows(p, c, plan.q_blocks, operands, out, lse, dout, dlse)
    x = tiles.prepare(p, operands, plan.rows, plan.keys, turned=True)
    q, k, v = forms.q.array(x.query), forms.k.array(x.key), forms.v.array(x.value)
    x = x._replace(query=q, key=k, value=v)
    flags = empty if visits.empties_rows(p, modifies(p)) else None
    sums = plan.sums()
    rest = plan.launch((x, forms.do.array(dout), stats, flags, found), sums)
    if plan.adds_keys:
        dk, dv = (_from_strips(sums[name], p.dtype) for name in ("key", "value"))
    else:
        dk, dv = rest.pop(0), rest.pop(0)
    dbias = mosaic.matrices(rest.pop(0)) if stores_bias(p) else None
    if "bias" in sums:
        dbias = sums["bias"].total()
    dq = rest.pop() if rounds_dq(p, c) else _from_strips(sums["query"], p.dtype, p.scale, units)
    of_keys = jnp.sum(rest[0], axis=1) if rest else ()
    by_name = dict(zip(key_sums(p), of_keys, strict=True))
    result = spec.Operands(
        query=dq[:, : p.T, :, : p.H],
        key=dk[:, : p.S, :, : p.H],
        value=dv[:, : p.S, :, : p.Hv],
        bias=_dbias(p, dbias, by_name.get("bias")),
        alibi_slopes=_dslopes(by_name.get("alibi_slopes")),
        sinks=spec.softmax.of_sinks(operands.sinks, lse, delta),
    )
    return spec.gradients(operands, result)


def _from_strips(
    sums: mosaic.Sums, dtype: Any, scale: float = 1.0, units: jax.Array | None = None
) -> jax.Array:
    """[B, tokens, heads, columns] of sums of strips of 64 rows, rounded.

    ``units``: of integers, see `Refs.stats`, [B, heads, ...].
    """
    total = sums.total()  # [B, tokens / 64, heads, strips, 64, width]
    batch, _, heads, strips, _, width = total.shape
    if units is not None:
        of_tile = units.reshape(batch, heads, -1, ROWS).swapaxes(1, 2)[:, :, :, None, :, None]
        total = total * of_one(of_tile)
    x = total.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, strips * width) * scale
    # The barrier keeps XLA from taking a part of what it turns, element by element.
    return lax.optimization_barrier(x.astype(dtype))


def _dslopes(of_keys: Any) -> jax.Array | None:
    return None if of_keys is None else jnp.sum(of_keys, (0, 2))


def _dbias(problem: spec.Problem, of_tiles: jax.Array | None, of_keys: Any) -> jax.Array | None:
    """The gradient of a bias from tiles of dS^T, or from sums over all rows, by key."""
    if of_tiles is not None:
        dbias = of_tiles.transpose(0, 1, 3, 5, 2, 4)
        batch, heads, row_tiles, width, key_tiles, _ = dbias.shape
        dbias = dbias.reshape(batch, heads, row_tiles * width, key_tiles * ROWS)
        dbias = dbias[:, :, : problem.T, : problem.S]
        if not stores_bias(problem) or problem.band.is_unbounded:
            return dbias
        assert problem.static_band is not None
        row, key = jnp.arange(problem.T)[:, None], jnp.arange(problem.S)
        return jnp.where(problem.static_band.allowed(row, key), dbias, 0)  # not stored elsewhere
    if of_keys is None:
        return None
    shape = problem.operands.bias.shape
    alike = tuple(axis for axis in (0, 1, 3) if shape[axis] == 1)
    return jnp.sum(of_keys[:, :, None, : problem.S], alike, keepdims=True)


def _heads_at_once(p: spec.Problem, heads: int, blocks: int, kv_blocks: int) -> int:
    """Of how many heads, of the keys or of the queries, the tiles are worked on together.

    Not of fewer than have tiles enough for all blocks: heads that are worked on at the same time
    anyway had better begin with the tiles that have most to do. Where all have as much, one head
    after the other is faster, if blocks that add to the same rows at the same time have enough else
    to do.
    """
    if p.band.is_unbounded and not p.masks_by_data and max(p.H, p.Hv) > ROWS:
        return 1
    members = p.N // heads
    of_head = p.T * members * (p.H * (p.dtype.itemsize + 4) + p.Hv * p.dtype.itemsize)
    at_once = max(pl.cdiv(blocks, kv_blocks), gpu.L2_BYTES // of_head)
    return largest_divisor(p.B * heads, at_once)


def supports_backward(problem: spec.Problem) -> str | None:
    """Why this kernel cannot differentiate what the forward accepts, or None."""
    if not mosaic.Sums.exist():
        return "needs JAX 0.11 or newer"
    return _refused_logits(problem) or _refused_order(problem)


def _refused_order(p: spec.Problem) -> str | None:
    """Why their order of summation cannot be left open, or None."""
    if not p.deterministic:
        return None
    if p.score_mod is not None:
        return "knows no bound for gradients through score_mod, which deterministic sums need"
    if sums_bias(p) and p.operands.bias.shape[:2] != (p.B, p.N):
        return "adds a bias's gradient up over batch and heads in no fixed order"
    return None


def _refused_logits(p: spec.Problem) -> str | None:
    """Why their gradients are not for this kernel, or None."""
    bias = p.operands.bias
    if p.differentiates("bias") and bias.shape[3] == 1 and bias.shape[2] > 1:
        return "differentiates no bias that has rows, but not keys"
    return accepts.refused_gradients(p)
