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
from pallas_kernels.common.schedule import Schedule, largest_divisor
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.backward_kernel import (
    CONSUMERS,
    MOST_COLUMNS,
    Backward,
    BackwardConfig,
    BackwardForms,
    KeyWork,
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
        return Here(Visit.of(k, of_rows, lambda: span, masked), of_rows.head, row0, stage, slot)

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
    head: Any
    row0: Any
    stage: Any  # of Q and dO
    slot: Any  # of dS


class Carry(NamedTuple):
    """What a visit leaves to the next. Its dQ is yet to be computed, of dS in shared memory."""

    dk: jax.Array  # [64, H] float32
    dv: jax.Array  # [64, Hv] float32
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
        return step + mosaic.opaque(walk.count), carry

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
    p = probabilities(c, here, mosaic.settle(start_scores(c, here.stage)))
    return differentiate(c, here, p, dk, dv)


def visit_once(
    c: Consumer, work: KeyWork, member: Any, number: Any, masked: bool, step: Any, carry: Carry
) -> Carry:
    """A visit, with dQ of the one before."""
    r, here = c.k.refs, c.here(work, member, number, masked, step)
    if masked:  # one after the other, or registers run out
        add_dq(c, work, carry, mosaic.settle(start_dq(c, carry)))
        mosaic.barrier_wait(r.q_full.at[here.stage])
        p = probabilities(c, here, mosaic.settle(start_scores(c, here.stage)))
    else:
        mosaic.barrier_wait(r.q_full.at[here.stage])
        s = start_scores(c, here.stage)
        dq = start_dq(c, carry)
        p = probabilities(c, here, mosaic.settle(s, in_flight=CONSUMERS))
        p = lax.optimization_barrier(p)
        add_dq(c, work, carry, mosaic.settle(dq))
    return differentiate(c, here, p, carry.dk, carry.dv)


def differentiate(c: Consumer, here: Here, p: jax.Array, dk: jax.Array, dv: jax.Array) -> Carry:
    """A visit from P^T on; leaves dS in shared memory."""
    r, dtype = c.k.refs, c.k.problem.dtype
    mosaic.barrier_wait(r.do_full.at[here.stage])
    dp = start_dp(c, here.stage)
    kept = here.visit.kept(p).astype(dtype)
    (dv,) = mosaic.start_columns(kept, r.do_smem.at(here.stage), (dv,))
    ds = gradient(c, here, p, mosaic.settle(dp, in_flight=1)).astype(dtype)
    show(c, here, ds)
    (dk,) = mosaic.start_columns(ds, r.q_smem.at(here.stage), (dk,))
    dv, dk = mosaic.settle(dv, in_flight=1), mosaic.settle(dk)
    mosaic.barrier_arrive(r.free.at[here.stage])
    return Carry(dk, dv, here.head, here.row0, here.slot)


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


def probabilities(c: Consumer, here: Here, s: jax.Array) -> jax.Array:
    """P^T from S^T and the lse of the forward, negative where dropout drops it."""
    k = c.k
    lse = mosaic.load_columns(k.refs.stats_smem.at[here.stage, pl.ds(0, k.config.block_q)])
    base2 = here.visit.logits(s) * (k.unit * LOG2_E)
    return here.visit.signed(jnp.exp2(base2 - mosaic.spread_columns(lse, s.shape)))


def gradient(c: Consumer, here: Here, p: jax.Array, dp: jax.Array) -> jax.Array:
    """dS^T = P^T (dP^T - delta), where dP^T has gone through dropout."""
    block_q = c.k.config.block_q
    delta = mosaic.load_columns(c.k.refs.stats_smem.at[here.stage, pl.ds(block_q, block_q)])
    delta = mosaic.spread_columns(delta, p.shape)
    if c.k.problem.dropout_rate == 0:
        return p * (dp - delta)
    return here.visit.kept(p) * dp - jnp.maximum(p, -p) * delta


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
        k = kernel_of(forms.refs(inputs, *refs[len(leaves) :]))
        divide(CONSUMERS, k.hides_keys or empties, lambda: consume(k), lambda: produce(k))

    launch = mosaic.kernel(
        backward_kernel,
        out_type=[
            jax.ShapeDtypeStruct((p.B, p.S, p.K, mosaic.copied_columns(n)), p.dtype)
            for n in (p.H, p.Hv)
        ],
        scratch_types=forms.scratch(c, p.dtype),
        grid={"block": blocks},
        threads=("warpgroup", CONSUMERS + 1),
        # As in the forward; what a thread of dS writes, `commit_smem` shows to the product that
        # waits at `ds_full`, where each thread arrives by itself.
        params=mosaic.compiler_params(reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
    )
    matrices = (p.B, q_blocks * c.block_q // ROWS, p.N, forms.q.strips)
    sums = mosaic.Sums.zero(kv_blocks, matrices)
    dk, dv = launch(*leaves, sums.ref)
    dq = sums.total().transpose(0, 1, 4, 2, 3, 5).reshape(p.B, -1, p.N, forms.q.columns)
    dq = dq[:, : p.T, :, : p.H] * p.scale
    return spec.Operands(
        query=dq.astype(p.dtype),
        key=dk[..., : p.H],
        value=dv[..., : p.Hv],
        sinks=spec.softmax.of_sinks(operands.sinks, lse, delta),
        score_consts=(None,) * len(operands.score_consts),
        mask_consts=(None,) * len(operands.mask_consts),
    )


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
    p, x = problem, problem.operands
    if not mosaic.Sums.exist():
        return "needs JAX 0.11 or newer"
    if max(p.H, p.Hv) > MOST_COLUMNS:
        return f"takes head dims up to {MOST_COLUMNS}; got {p.H=}, {p.Hv=}"
    if x.bias is not None or x.alibi_slopes is not None or p.score_mod or p.soft_cap:
        return "differentiates no logits that are modified"
    return None
