"""Consumers of the backward that divide a tile of logits by keys: for heads of up to 128 columns.

A tile has 128 keys, 64 for each consumer, which keeps their dK and dV in registers. Computed
turned, P^T and dS^T, which a consumer multiplies with dO and Q, are in its registers too. Only
the product dQ = dS K sums over all keys: dS goes through shared memory, and each consumer
multiplies a part, which it adds to global memory.

That product needs what both consumers have shown. It is left to the next visit, so that neither
waits: they drift apart, and one multiplies while the other computes exponentials. From there dQ
goes to shared memory, and is added to global memory by a copy that starts when dS is shown: to add
by threads has them wait in a queue while tensor cores have nothing to do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.hopper.backward_kernel import CONSUMERS, KeyWork
from pallas_kernels.hopper.backward_visit import (
    At,
    Carry,
    Consumer,
    Here,
    Order,
    Weights,
    add_dq,
    add_keys,
    gradient,
    nothing_summed,
    probabilities,
    show,
    stage_dq,
    sum_up,
)
from pallas_kernels.hopper.config import ROWS


class Last(NamedTuple):
    """Where dQ goes that is yet to be computed, of dS in shared memory."""

    head: Any
    row: Any  # `Here.row`


def begin(c: Consumer, work: KeyWork, step: Any) -> Carry:
    """The first visit of a tile of keys."""
    k = c.k
    here = c.here(work, At(0, 0, step), k.masks)
    dk, dv = (mosaic.full((ROWS, form.columns), 0, jnp.float32) for form in (k.forms.k, k.forms.v))
    weights = probabilities(c, here, mosaic.settle(start_scores(c, here.stage)))
    mosaic.barrier_wait(k.refs.v_full)
    return differentiate(c, here, weights, dk, dv, nothing_summed(k))


def visit(c: Consumer, work: KeyWork, at: At, masked: bool, carry: Carry) -> Carry:
    """A visit, with dQ of the one before."""
    before = c.slot(at.step - 1)
    if masked:  # one after the other, or registers run out
        dq = mosaic.settle(start_dq(c, before))
        add = stage_share(c, work, carry.last, units_of_share(c, work, carry.last), dq)
        here = c.here(work, at, masked)
        weights = probabilities(c, here, mosaic.settle(start_scores(c, here.stage)))
    else:
        here = c.here(work, at, masked)
        s = start_scores(c, here.stage)
        dq = start_dq(c, before)
        units = units_of_share(c, work, carry.last)
        weights = probabilities(c, here, mosaic.settle(s, in_flight=CONSUMERS))
        weights = lax.optimization_barrier(weights)
        add = stage_share(c, work, carry.last, units, mosaic.settle(dq))
    return differentiate(c, here, weights, carry.dk, carry.dv, carry.sums, add)


def differentiate(
    c: Consumer,
    here: Here,
    weights: Weights,
    dk: jax.Array,
    dv: jax.Array,
    sums: tuple[jax.Array, ...],
    add: Callable[[], None] | None = None,
) -> Carry:
    """A visit from P^T on; leaves dS in shared memory. ``add``: of `stage_share`.

    The place of dS is free: it had what was shown two visits ago, and all have shown something
    since, as they do after their product with what was shown before.
    """
    r = c.k.refs
    mosaic.barrier_wait(r.do_full.at[here.stage])
    dp = start_dp(c, here.stage)
    (dv,) = mosaic.start_columns(weights.kept, r.do_smem.at(here.stage), (dv,))
    exact = gradient(c, here, weights, mosaic.settle(dp, in_flight=1))
    sums = sum_up(c, here, exact, sums)
    ds = exact.astype(c.k.problem.dtype)
    (dk,) = mosaic.start_columns(ds, r.q_smem.at(here.stage), (dk,))
    strips = r.ds_smem.at(here.slot, c.group).strips()
    show(c, here.slot, *((strip, ds[:, at : at + width]) for strip, at, width in strips))
    if add is not None:
        add()
    dv, dk = mosaic.settle(dv, in_flight=1), mosaic.settle(dk)
    mosaic.barrier_arrive(r.free.at[here.stage])
    return Carry(dk, dv, sums, Last(here.of_rows.head, here.row))


def finish(c: Consumer, work: KeyWork, step: Any, carry: Carry) -> None:
    """The last dQ of a tile of keys; stores dK and dV."""
    k, r = c.k, c.k.refs
    mosaic.barrier_arrive(r.v_free)
    units = units_of_share(c, work, carry.last)
    dq = mosaic.settle(start_dq(c, c.slot(step)))
    mosaic.barrier_arrive(r.k_free.at[c.place])
    add_dq(c, *place_of_share(c, work, carry.last), units, dq)  # dV is waiting for shared memory
    store(c, work, carry.dv, r.dv_gmem)
    store(c, work, carry.dk * k.problem.scale, r.dk_gmem)


BY_KEYS = Order(begin, visit, finish)


def start_scores(c: Consumer, stage: Any) -> jax.Array:
    """Starts S^T = K Q^T."""
    return mosaic.start(c.keys(c.group), c.k.refs.q_smem.at(stage), transpose_b=True)


def start_dp(c: Consumer, stage: Any) -> jax.Array:
    """Starts dP^T = V dO^T."""
    r = c.k.refs
    return mosaic.start(r.v_smem.at(c.group), r.do_smem.at(stage), transpose_b=True)


def share(c: Consumer) -> tuple[Any, Any]:
    """Of a tile of dQ: which 64 of its rows, and which strip of its columns."""
    return (0, c.me) if c.k.config.block_q == ROWS else (c.me, 0)


def start_dq(c: Consumer, slot: Any) -> jax.Array:
    """Starts this consumer's share of dQ = dS K of a visit: a product for each one's keys."""
    r = c.k.refs
    rows, columns = share(c)
    mosaic.barrier_wait(r.ds_full.at[slot])
    dq = None
    for i in range(CONSUMERS):
        group = lax.rem(c.group + i, CONSUMERS)
        (ds,), (keys,) = r.ds_smem.at(slot, group).views, c.keys(group).views
        dq = mosaic.start(ds.tiled.at[rows], keys.tiled.at[columns], dq, transpose_a=True)
    assert dq is not None
    return dq


def units_of_share(c: Consumer, work: KeyWork, last: Last) -> Any:
    _, head, row0, _ = place_of_share(c, work, last)
    return c.k.units(work.batch, head, row0)


def stage_share(
    c: Consumer, work: KeyWork, last: Last, units: Any, dq: jax.Array
) -> Callable[[], None]:
    return stage_dq(c, *place_of_share(c, work, last), units, dq)


def place_of_share(c: Consumer, work: KeyWork, last: Last) -> tuple[KeyWork, Any, Any, Any]:
    rows, strip = share(c)
    return work, last.head, c.row0(last.row) + rows * ROWS, strip


def store(c: Consumer, work: KeyWork, x: jax.Array, gmem: mosaic.Ref) -> None:
    """Stores this consumer's rows of dK or dV, or adds them."""
    k = c.k
    if k.adds_keys:
        add_keys(c, work, 0, x, gmem)
        return
    gmem = gmem.at[work.batch, pl.ds(c.key0(work), ROWS), work.head]
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
    strips = k.refs.out_smem.at(c.me).strips()
    places = [strip for strip in strips if strip[1] < x.shape[1]]
    for strip, start, width in places:
        mosaic.store_operand(strip.tiled, x[:, start : start + width].astype(k.problem.dtype))
    mosaic.commit_smem()
    for strip, start, _ in places:
        mosaic.copy_out(strip, gmem, start)
