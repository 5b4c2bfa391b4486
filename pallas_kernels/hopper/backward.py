"""The backward in one pass: FlashAttention-3's (Shah et al. 2024), in Pallas for Mosaic GPU.

A block takes a tile of 128 keys and visits the tiles of queries that see some of them. Each of two
consumer warpgroups has 64 of the keys. Logits are computed turned, S^T, so that what a warpgroup
multiplies with dO and Q to add to its own dV and dK, P^T and dS^T, is in its registers. The
product dQ = dS K sums over all keys of the tile: dS goes through shared memory, each consumer
multiplies a part, and adds it to global memory in float32.

Five products a visit: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ = dS K. The last
needs what both consumers have shown. It is left to the next visit, so that neither waits: they
drift apart, and one multiplies while the other computes exponentials.

`backward_kernel.Refs` is the map of shared memory; the producer is in `backward_producer`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common import block_map
from pallas_kernels.common.schedule import Schedule, Work, largest_divisor
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.backward_kernel import (
    CONSUMERS,
    MOST_COLUMNS,
    Backward,
    BackwardConfig,
    BackwardForms,
    KeyWork,
    sums_bias,
)
from pallas_kernels.hopper.backward_producer import produce
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.kernel import LOG2_E, divide
from pallas_kernels.hopper.softmax import Visit


class Consumer(NamedTuple):
    """A warpgroup that computes."""

    k: Backward
    me: Any  # which one

    def here(self, work: KeyWork, member: Any, number: Any, masked: bool, step: Any) -> "Here":
        """A visit to a head, by its number."""
        k = self.k
        row0 = k.walk(work, member).tile(number) * k.config.block_q
        key0 = work.kv_block * k.config.block_kv + self.me * ROWS
        span = tiles.Span(row0, key0, (ROWS, k.config.block_q), turned=True)
        stage, slot = lax.rem(step, k.config.stages), lax.rem(step, 2)
        of_rows = k.of_group(work, member)
        visit = Visit.of(k, of_rows, lambda: span, masked)
        return Here(visit, of_rows, row0, key0, stage, slot)

    def fresh(self) -> "Consumer":
        """The same, of which the compiler computes nothing beforehand, to hold it in registers."""
        return self._replace(me=mosaic.uniform(self.me))

    @property
    def share(self) -> tuple[Any, Any]:
        """Of a tile of dQ: which strip of its rows, and which of its columns."""
        return (0, self.me) if self.k.config.block_q == ROWS else (self.me, 0)


class Here(NamedTuple):
    """A visit, and where it is."""

    visit: Visit
    of_rows: Work
    row0: Any
    key0: Any
    stage: Any  # of Q and dO
    slot: Any  # of dS

    @property
    def head(self) -> Any:
        return self.of_rows.head


class Weights(NamedTuple):
    """What of P^T the products need."""

    kept: jax.Array  # [64, block_q], after dropout, in the dtype of the operands
    p: jax.Array  # [64, block_q] float32, before it, times the slope of what modifies logits


class Carry(NamedTuple):
    """What a visit leaves to the next. Its dQ is yet to be computed, of dS in shared memory."""

    dk: jax.Array  # [64, H] float32
    dv: jax.Array  # [64, Hv] float32
    sums: tuple[jax.Array, ...]  # for each of `Backward.key_sums`: [64] float32, of a head
    head: Any
    row0: Any
    slot: Any


def consume(k: Backward) -> None:
    """Computes 64 rows of dK and dV of each tile of this block, and its share of dQ."""
    c = Consumer(k, lax.axis_index("warpgroup"))

    def next_tile() -> Any:
        mosaic.barrier_wait(k.refs.kv_full)
        return mosaic.uniform(k.refs.tile_smem[0])

    def of_tile(state: tuple[Any, Any]) -> tuple[Any, Any]:
        tile, step = state
        step = attend(c, k.work(tile), step)
        return next_tile(), step

    state = (next_tile(), jnp.int32(0))
    lax.while_loop(lambda state: state[0] < k.schedule.tiles, of_tile, state)
    mosaic.barrier_arrive(k.refs.kv_free)
    mosaic.wait_smem_to_gmem(0)


def attend(c: Consumer, work: KeyWork, step: Any) -> Any:
    """All visits of a tile of keys; returns the number of the next visit."""
    k = c.k

    def of_member(member: Any, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
        step, carry = state
        walk = k.walk(work, member)
        # The very first visit has been begun with.
        first: Any = 1 if k.problem.G == 1 else jnp.where(member > 0, 0, 1)

        def visits(masked: bool) -> Any:
            return lambda j, carry: visit_once(c.fresh(), work, member, j, masked, step + j, carry)

        if k.masks:
            masked = jnp.maximum(walk.masked, first)
            carry = lax.fori_loop(first, masked, visits(masked=True), carry)
            first = masked
        carry = lax.fori_loop(first, walk.count, visits(masked=False), carry)
        return step + mosaic.opaque(walk.count), finish_head(c.fresh(), work, member, carry)

    state = (step, begin(c.fresh(), work, step))
    if k.problem.G == 1:
        state = of_member(0, state)
    else:
        state = lax.fori_loop(0, k.problem.G, of_member, state)
    step, carry = state
    finish(c.fresh(), work, carry)
    return step


def begin(c: Consumer, work: KeyWork, step: Any) -> Carry:
    """The first visit of a tile of keys."""
    k, r = c.k, c.k.refs
    here = c.here(work, 0, 0, k.masks, step)
    dk, dv = (mosaic.full((ROWS, form.columns), 0, jnp.float32) for form in (k.forms.k, k.forms.v))
    mosaic.barrier_wait(r.q_full.at[here.stage])
    weights = probabilities(c, here, mosaic.settle(start_scores(c, here.stage)))
    return differentiate(c, here, weights, dk, dv, nothing_summed(k))


def nothing_summed(k: Backward) -> tuple[jax.Array, ...]:
    return tuple(mosaic.full((ROWS,), 0, jnp.float32) for _ in k.key_sums)


def finish_head(c: Consumer, work: KeyWork, member: Any, carry: Carry) -> Carry:
    """Stores what has been summed over the rows of a head."""
    if not carry.sums:
        return carry
    k, of_rows = c.k, c.k.of_group(work, member)
    keys = pl.ds(work.kv_block * k.config.block_kv + c.me * ROWS, ROWS)
    assert k.refs.sums_gmem is not None
    for i, found in enumerate(carry.sums):
        place = k.refs.sums_gmem.at[i, of_rows.batch, of_rows.head, keys]
        mosaic.store(place, found, optimized=False)
    return carry._replace(sums=nothing_summed(k))


def visit_once(
    c: Consumer, work: KeyWork, member: Any, number: Any, masked: bool, step: Any, carry: Carry
) -> Carry:
    """A visit, with dQ of the one before."""
    r, here = c.k.refs, c.here(work, member, number, masked, step)
    if masked:  # one after the other, or registers run out
        add_dq(c, work, carry, mosaic.settle(start_dq(c, carry)))
        mosaic.barrier_wait(r.q_full.at[here.stage])
        weights = probabilities(c, here, mosaic.settle(start_scores(c, here.stage)))
    else:
        mosaic.barrier_wait(r.q_full.at[here.stage])
        s = start_scores(c, here.stage)
        dq = start_dq(c, carry)
        weights = probabilities(c, here, mosaic.settle(s, in_flight=CONSUMERS))
        weights = lax.optimization_barrier(weights)
        add_dq(c, work, carry, mosaic.settle(dq))
    return differentiate(c, here, weights, carry.dk, carry.dv, carry.sums)


def differentiate(
    c: Consumer,
    here: Here,
    weights: Weights,
    dk: jax.Array,
    dv: jax.Array,
    sums: tuple[jax.Array, ...],
) -> Carry:
    """A visit from P^T on; leaves dS in shared memory."""
    r = c.k.refs
    mosaic.barrier_wait(r.do_full.at[here.stage])
    dp = start_dp(c, here.stage)
    (dv,) = mosaic.start_columns(weights.kept, r.do_smem.at(here.stage), (dv,))
    exact = gradient(c, here, weights, mosaic.settle(dp, in_flight=1))
    add_bias(c, here, exact)
    sums = sum_keys(c, here, exact, sums)
    ds = exact.astype(c.k.problem.dtype)
    show(c, here, ds)
    (dk,) = mosaic.start_columns(ds, r.q_smem.at(here.stage), (dk,))
    dv, dk = mosaic.settle(dv, in_flight=1), mosaic.settle(dk)
    mosaic.barrier_arrive(r.free.at[here.stage])
    return Carry(dk, dv, sums, here.head, here.row0, here.slot)


def finish(c: Consumer, work: KeyWork, carry: Carry) -> None:
    """The last dQ of a tile of keys; stores dK and dV."""
    k, r = c.k, c.k.refs
    dq = mosaic.settle(start_dq(c, carry))
    mosaic.barrier_arrive(r.kv_free)
    add_dq(c, work, carry, dq)
    store(c, work, carry.dv, r.dv_gmem)
    store(c, work, carry.dk * k.problem.scale, r.dk_gmem)


def start_scores(c: Consumer, stage: Any) -> jax.Array:
    """Starts S^T = K Q^T."""
    r = c.k.refs
    return mosaic.start(r.k_smem.at(c.me), r.q_smem.at(stage), transpose_b=True)


def start_dp(c: Consumer, stage: Any) -> jax.Array:
    """Starts dP^T = V dO^T."""
    r = c.k.refs
    return mosaic.start(r.v_smem.at(c.me), r.do_smem.at(stage), transpose_b=True)


def start_dq(c: Consumer, carry: Carry) -> jax.Array:
    """Starts this consumer's share of dQ = dS K of a visit: a product for each one's keys."""
    r = c.k.refs
    rows, columns = c.share
    mosaic.barrier_wait(r.ds_full.at[carry.slot])
    dq = None
    for i in range(CONSUMERS):
        (ds,), (keys,) = r.ds_smem.at(carry.slot, i).views, r.k_smem.at(i).views
        dq = mosaic.start(ds.tiled.at[rows], keys.tiled.at[columns], dq, transpose_a=True)
    assert dq is not None
    return dq


def add_dq(c: Consumer, work: KeyWork, carry: Carry, dq: jax.Array) -> None:
    """Adds this consumer's share of dQ of a visit to global memory."""
    rows, columns = c.share
    slab = work.kv_block if mosaic.is_interpreting() else 0
    q_tile = lax.div(carry.row0, ROWS) + rows
    mosaic.add(c.k.refs.dq_gmem.at[slab, work.batch, q_tile, carry.head, columns], dq)


def probabilities(c: Consumer, here: Here, s: jax.Array) -> Weights:
    """P^T from S^T and the lse of the forward."""
    k = c.k
    lse = mosaic.load_columns(k.refs.stats_smem.at[here.stage, pl.ds(0, k.config.block_q)])
    s, slope = here.visit.logits_and_slope(s)
    p = jnp.exp2(s * (k.unit * LOG2_E) - mosaic.spread_columns(lse, s.shape))
    kept = here.visit.kept(here.visit.signed(p)).astype(k.problem.dtype)
    if slope is None:
        return Weights(kept, p)
    return Weights(kept, jnp.where(p > 0, p * slope, 0.0))  # of what is hidden it may be NaN


def gradient(c: Consumer, here: Here, weights: Weights, dp: jax.Array) -> jax.Array:
    """dS^T = P^T (dP^T - delta), where dP^T has gone through dropout, times the slope."""
    block_q, rate = c.k.config.block_q, c.k.problem.dropout_rate
    delta = mosaic.load_columns(c.k.refs.stats_smem.at[here.stage, pl.ds(block_q, block_q)])
    delta = mosaic.spread_columns(delta, dp.shape)
    if rate > 0:
        dp = jnp.where(weights.kept > 0, dp * (1 / (1 - rate)), 0.0)
    return weights.p * (dp - delta)


def add_bias(c: Consumer, here: Here, ds: jax.Array) -> None:
    """Adds dS^T to the gradient of a bias that has rows and keys."""
    k = c.k
    if k.refs.dbias_gmem is None:
        return
    batch, head = tiles.heads_of(k.refs.dbias_gmem.at[0], here.of_rows)
    slab = here.of_rows.batch * k.problem.N + here.head if mosaic.is_interpreting() else 0
    keys = lax.div(here.key0, ROWS)
    for i in range(k.config.block_q // ROWS):
        place = k.refs.dbias_gmem.at[slab, batch, head, keys, lax.div(here.row0, ROWS) + i]
        mosaic.add(place, ds[:, i * ROWS : (i + 1) * ROWS])


def sum_keys(
    c: Consumer, here: Here, ds: jax.Array, sums: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Adds what a visit contributes to the sums over rows."""

    def added(name: str, total: jax.Array) -> jax.Array:
        if name == "bias":
            return total + jnp.sum(ds, axis=1)
        tile, span = here.visit.tile, here.visit.span
        assert tile is not None
        assert span is not None
        return total - jnp.sum(ds * tiles.distance(tile, span), axis=1)

    return tuple(added(n, x) for n, x in zip(c.k.key_sums, sums, strict=True))


def show(c: Consumer, here: Here, ds: jax.Array) -> None:
    """Shows dS^T to all consumers.

    The place is free: it had what was shown two visits ago, and all have shown something since, as
    they do after their product with what was shown before.
    """
    r = c.k.refs
    for strip, start, width in r.ds_smem.at(here.slot, c.me).strips():
        mosaic.store(strip.tiled, ds[:, start : start + width])
    mosaic.commit_smem()
    mosaic.barrier_arrive(r.ds_full.at[here.slot])


def store(c: Consumer, work: KeyWork, x: jax.Array, gmem: mosaic.Ref) -> None:
    """Stores this consumer's rows of dK or dV."""
    k = c.k
    keys = pl.ds(work.kv_block * k.config.block_kv + c.me * ROWS, ROWS)
    gmem = gmem.at[work.batch, keys, work.head]
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
    places = list(k.refs.out_smem.at(c.me).strips())
    for strip, start, width in places:
        mosaic.store(strip.tiled, x[:, start : start + width].astype(k.problem.dtype))
    mosaic.commit_smem()
    for strip, start, _ in places:
        mosaic.copy_out(strip, gmem, start)


# ---------------------------------------------------------------------------- host


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
    c = config or BackwardConfig.default(problem)
    q_blocks, kv_blocks = pl.cdiv(problem.T, c.block_q), pl.cdiv(problem.S, c.block_kv)
    needs_map = block_map.needs_map(problem)
    found = block_map.by_key(problem, operands, c.block_q, c.block_kv) if needs_map else None
    p, forms = tiles.in_kernel(problem), BackwardForms.of(problem, c)
    schedule = Schedule(p.B, p.K, kv_blocks, _heads_at_once(p))
    blocks = min(blocks or gpu.multiprocessors(problem.device), schedule.tiles)
    # The barrier keeps XLA from a sum within the transpose, which reads column by column.
    delta = lax.optimization_barrier(spec.softmax.delta(out, lse, dout, dlse))
    empty = lse == -math.inf
    base2 = jnp.where(empty, math.inf, lse * LOG2_E)
    by_tile = functools.partial(_by_tile, c, q_blocks)
    stats = jnp.concatenate([by_tile(base2, math.inf), by_tile(delta, 0.0)], axis=-1)
    sizes = q_blocks * c.block_q, kv_blocks * c.block_kv
    x = tiles.prepare(problem, operands, *sizes, turned=True)
    q, k_, v = forms.q.array(x.query), forms.k.array(x.key), forms.v.array(x.value)
    x = x._replace(query=q, key=k_, value=v)
    kernel_of = functools.partial(Backward, p, c, schedule, blocks, forms)
    empties = kernel_of(None).empties_rows
    flags = jnp.any(by_tile(empty, False), axis=-1).astype(jnp.int32)
    inputs = (x, forms.do.array(dout), stats, flags if empties else None, found)
    leaves, tree = jax.tree.flatten(inputs)

    def backward_kernel(*refs: mosaic.Ref) -> None:
        inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
        k = kernel_of(forms.refs(p, inputs, *refs[len(leaves) :]))
        divide(CONSUMERS, k.hides_keys or empties, lambda: consume(k), lambda: produce(k))

    outputs = [
        jax.ShapeDtypeStruct((p.B, p.S, p.K, mosaic.copied_columns(n)), p.dtype)
        for n in (p.H, p.Hv)
    ]
    names = kernel_of(None).key_sums
    if names:
        shape = (len(names), p.B, p.N, kv_blocks * c.block_kv)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    launch = mosaic.kernel(
        backward_kernel,
        out_type=outputs,
        scratch_types=forms.scratch(c, p.dtype),
        grid={"block": blocks},
        threads=("warpgroup", CONSUMERS + 1),
        # As in the forward; what a thread of dS writes, `commit_smem` shows to the product that
        # waits at `ds_full`, where each thread arrives by itself.
        params=mosaic.compiler_params(reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
    )
    row_tiles, key_tiles = q_blocks * c.block_q // ROWS, kv_blocks * CONSUMERS
    dq_sums = mosaic.Sums.zero(kv_blocks, (p.B, row_tiles, p.N, forms.q.strips))
    dbias_sums = None
    if sums_bias(problem):
        shape = (*x.bias.shape[:2], key_tiles, row_tiles)
        dbias_sums = mosaic.Sums.zero(p.B * p.N, shape)
    refs = [s.ref for s in (dq_sums, dbias_sums) if s is not None]
    dk, dv, *by_key = launch(*leaves, *refs)
    dq = dq_sums.total().transpose(0, 1, 4, 2, 3, 5).reshape(p.B, -1, p.N, forms.q.columns)
    dq = dq[:, : p.T, :, : p.H] * p.scale
    of_keys = dict(zip(names, by_key[0], strict=True)) if names else {}
    result = spec.Operands(
        query=dq,
        key=dk[..., : p.H],
        value=dv[..., : p.Hv],
        bias=_dbias(problem, dbias_sums, of_keys.get("bias")),
        alibi_slopes=jnp.sum(of_keys["alibi_slopes"], (0, 2)) if "alibi_slopes" in names else None,
        sinks=spec.softmax.of_sinks(operands.sinks, lse, delta),
    )
    return spec.gradients(operands, result)


def _dbias(problem: spec.Problem, sums: mosaic.Sums | None, of_keys: Any) -> jax.Array | None:
    """The gradient of a bias from sums of tiles of dS^T, or of keys over all rows."""
    if sums is not None:
        dbias = sums.total().transpose(0, 1, 3, 5, 2, 4)
        dbias = dbias.reshape(*dbias.shape[:2], dbias.shape[2] * ROWS, -1)
        return dbias[:, :, : problem.T, : problem.S]
    if of_keys is None:
        return None
    shape = problem.operands.bias.shape
    alike = tuple(axis for axis in (0, 1, 3) if shape[axis] == 1)
    return jnp.sum(of_keys[:, :, None, : problem.S], alike, keepdims=True)


def _by_tile(c: BackwardConfig, q_blocks: int, x: jax.Array, fill: Any) -> jax.Array:
    """An array [B, T, N] as [B, N, q_blocks, block_q]."""
    x = x.swapaxes(1, 2)
    missing = q_blocks * c.block_q - x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=fill)
    return x.reshape(*x.shape[:2], q_blocks, c.block_q)


def _heads_at_once(p: spec.Problem) -> int:
    """Of how many heads of the keys the tiles are worked on together."""
    of_head = p.T * p.G * (p.H * (p.dtype.itemsize + 4) + p.Hv * p.dtype.itemsize)
    return largest_divisor(p.B * p.K, max(1, gpu.L2_BYTES // of_head))


def supports_backward(problem: spec.Problem) -> str | None:
    """Why this kernel cannot differentiate what the forward accepts, or None."""
    p = problem
    if not mosaic.Sums.exist():
        return "needs JAX 0.11 or newer"
    if max(p.H, p.Hv) > MOST_COLUMNS:
        return f"takes head dims up to {MOST_COLUMNS}; got {p.H=}, {p.Hv=}"
    return _refused_logits(problem)


def _refused_logits(p: spec.Problem) -> str | None:
    """Why their gradients are not for this kernel, or None."""
    bias = p.operands.bias
    if p.differentiates("bias") and bias.shape[3] == 1 and bias.shape[2] > 1:
        return "differentiates no bias that has rows, but not keys"
    if p.differentiates("alibi_slopes") and (p.score_mod or p.soft_cap):
        return "differentiates no slopes where logits are modified after them"
    if p.score_mod is None:
        return None
    if p.differentiates("score_consts"):
        return "differentiates no arrays that score_mod captures"
    reason = mosaic.refusal(p.score_mod.with_slope)
    return reason and f"cannot differentiate this score_mod: {reason}"
