"""Consumers of the backward that divide 64 keys' dK and dV by columns: for wide heads.

dK and dV of 64 keys and 256 columns are as many numbers as a warpgroup has registers. So the two
consumers share a tile of 64 keys: each has half of the columns of dK, dV and dQ, and computes P and
dS of half of the rows. Both go through shared memory, where each product finds all of them.

A visit begins with S and dP of its own rows and dV += P^T dO of the visit before, which needs no
more registers and runs while P and dS are computed; dQ and dK follow once both consumers have shown
theirs. dO is thus kept for one visit longer than Q.
"""

from typing import Any

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
    add_dq,
    add_keys,
    gradient,
    nothing_summed,
    probabilities,
    show,
    sum_up,
)
from pallas_kernels.hopper.config import ROWS


def begin(c: Consumer, work: KeyWork, step: Any) -> Carry:
    """The first visit of a tile of keys."""
    k = c.k
    here = c.here(work, At(0, 0, step), k.masks)
    dk, dv = (
        mosaic.full((ROWS, form.columns // CONSUMERS), 0, jnp.float32)
        for form in (k.forms.k, k.forms.v)
    )
    mosaic.barrier_wait(k.refs.v_full)
    s, dp = start_tile(c, here)
    s, dp = mosaic.settle(s, in_flight=1), mosaic.settle(dp)
    weights, ds, sums = differentiate(c, here, s, dp, nothing_summed(k))
    return multiply(c, work, here, weights, ds, Carry(dk, dv, sums, None))


def visit(c: Consumer, work: KeyWork, at: At, masked: bool, carry: Carry) -> Carry:
    """A visit, with what it takes to complete dV of the one before."""
    here = c.here(work, at, masked)
    s, dp = start_tile(c, here)
    dv = start_dv(c, here.step - 1, carry)
    s, dp = mosaic.settle(s, in_flight=2), mosaic.settle(dp, in_flight=1)
    weights, ds, sums = differentiate(c, here, s, dp, carry.sums)
    dv = mosaic.settle(dv)
    mosaic.barrier_arrive(c.k.refs.do_free.at[c.stage(here.step - 1)])
    return multiply(c, work, here, weights, ds, Carry(carry.dk, dv, sums, None))


def finish(c: Consumer, work: KeyWork, step: Any, carry: Carry) -> None:
    """Completes dV of a tile of keys; stores dK and dV."""
    k, r = c.k, c.k.refs
    mosaic.barrier_arrive(r.k_free.at[c.place])
    mosaic.barrier_arrive(r.v_free)
    dv = mosaic.settle(start_dv(c, step, carry))
    mosaic.barrier_arrive(r.do_free.at[c.stage(step)])
    store(c, work, dv, r.dv_gmem)
    store(c, work, carry.dk * k.problem.scale, r.dk_gmem)


BY_COLUMNS = Order(begin, visit, finish)


def start_tile(c: Consumer, here: Here) -> tuple[jax.Array, jax.Array]:
    """Starts S^T = K Q^T and dP^T = V dO^T of this consumer's rows."""
    r = c.k.refs
    rows = pl.ds(here.first, c.k.config.rows)
    s = mosaic.start(c.keys(c.group), r.q_smem.at(here.stage).rows(rows), transpose_b=True)
    mosaic.barrier_wait(r.do_full.at[here.stage])
    dp = mosaic.start(r.v_smem.at(c.group), r.do_smem.at(here.stage).rows(rows), transpose_b=True)
    return s, dp


def differentiate(
    c: Consumer, here: Here, s: jax.Array, dp: jax.Array, sums: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """P and dS of this consumer's rows, rounded, and the sums with what they add to them."""
    weights = probabilities(c, here, s)
    exact = gradient(c, here, weights, dp)
    sums = sum_up(c, here, exact, sums)
    ds = exact.astype(c.k.problem.dtype)
    return *lax.optimization_barrier((weights.kept, ds)), sums


def multiply(
    c: Consumer, work: KeyWork, here: Here, p: jax.Array, ds: jax.Array, carry: Carry
) -> Carry:
    """Shows P and dS; adds dQ of this consumer's columns to global memory, and dS^T Q to dK.

    The places of P and dS are free: they had what was shown two visits ago, and all have shown
    something since, as they do when their products with what was shown before have ended.
    """
    r = c.k.refs
    (p_view,), (ds_view,) = (
        r.p_smem.at(here.slot, c.group).views,
        r.ds_smem.at(here.slot, c.group).views,
    )
    show(c, here.slot, (p_view.at(c.me), p), (ds_view.at(c.me), ds))
    mosaic.barrier_wait(r.ds_full.at[here.slot])
    dq = mosaic.start(ds_view.tiled, columns(c, c.keys(c.group)), transpose_a=True)
    dk = mosaic.start(ds_view.tiled, columns(c, r.q_smem.at(here.stage)), carry.dk)
    units = c.k.units(work.batch, here.of_rows.head, here.row0)
    add_share(c, work, here, units, mosaic.settle(dq, in_flight=1))
    dk = mosaic.settle(dk)
    mosaic.barrier_arrive(r.free.at[here.stage])
    return carry._replace(dk=dk)


def start_dv(c: Consumer, step: Any, carry: Carry) -> jax.Array:
    """Starts dV += P^T dO of a visit."""
    r = c.k.refs
    (p,) = r.p_smem.at(c.slot(step), c.group).views
    return mosaic.start(p.tiled, columns(c, r.do_smem.at(c.stage(step))), carry.dv)


def columns(c: Consumer, matrix: mosaic.Matrix) -> mosaic.Ref:
    """This consumer's strips of a matrix."""
    (view,) = matrix.share(c.me, CONSUMERS).views
    return view.tiled


def add_share(c: Consumer, work: KeyWork, here: Here, units: Any, dq: jax.Array) -> None:
    """Adds this consumer's columns of dQ to global memory."""
    width = c.k.config.width
    count = dq.shape[1] // width
    for i in range(count):
        part = dq[:, i * width : (i + 1) * width]
        add_dq(c, work, here.of_rows.head, here.row0, c.me * count + i, units, part)


def store(c: Consumer, work: KeyWork, x: jax.Array, gmem: mosaic.Ref) -> None:
    """Stores this consumer's columns of dK or dV, an array of whole tiles, or adds them."""
    if c.k.adds_keys:
        add_keys(c, work, c.me * (x.shape[1] // c.k.config.width), x, gmem)
        return
    at = pl.ds(c.me * x.shape[1], x.shape[1])
    place = gmem.at[work.batch, pl.ds(c.key0(work), ROWS), work.head, at]
    mosaic.store_rows(place, x.astype(c.k.problem.dtype))
