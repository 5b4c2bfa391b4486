"""Two small Mosaic kernels that prove the harness: compiled for a GPU, and interpreted on a CPU.

`scores` is the skeleton of attention: one warpgroup copies tiles of K by TMA into two stages of
shared memory while another multiplies, Q K^T, and writes each product out. Per block:

    q_smem       [block_q, H] bf16             copied once
    k_smem       [stages, block_kv, H] bf16    filled by the producer, freed by the consumer
    scores_smem  [block_q, block_kv] float32   on its way out

`product` runs every form of matrix product on one tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic

Fault = Literal["none", "late_wait", "early_free"]
Form = Literal["fresh", "add", "transposed", "registers", "overlapped", "chained"]
FORMS: tuple[Form, ...] = ("fresh", "add", "transposed", "registers", "overlapped", "chained")
_PRODUCER, _CONSUMER = 0, 1
TILE = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes, and the fault to plant in the consumer.

    late_wait: it waits for a stage to be filled only after having read it.
    early_free: it hands a stage back to the producer before having read it.
    """

    block_q: int = 64
    block_kv: int = 64
    stages: int = 2
    fault: Fault = "none"


class Refs(NamedTuple):
    """What the stage functions share."""

    q_gmem: mosaic.Ref  # [T, H] bf16
    k_gmem: mosaic.Ref  # [S, H] bf16
    scores_gmem: mosaic.Ref  # [T, S] float32
    q_smem: mosaic.Ref
    k_smem: mosaic.Ref
    scores_smem: mosaic.Ref
    q_full: mosaic.Ref
    k_full: mosaic.Ref  # a barrier a stage
    k_free: mosaic.Ref  # a barrier a stage


def scores(q: jax.Array, k: jax.Array, config: Config = Config()) -> jax.Array:
    """``q @ k.T`` of bf16 [T, H] and [S, H] in float32; T and S multiples of the tiles."""
    (T, H), (S, _) = q.shape, k.shape
    tiles = S // config.block_kv

    def scores_kernel(*refs: mosaic.Ref) -> None:
        r = Refs(*refs)
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == _PRODUCER)(lambda: _produce(r, config, tiles))
        pl.when(warpgroup == _CONSUMER)(lambda: _consume(r, config, tiles))

    stages = config.stages
    launch = mosaic.kernel(
        scores_kernel,
        out_type=jax.ShapeDtypeStruct((T, S), jnp.float32),
        scratch_types=[
            mosaic.tiled_smem((config.block_q, H), q.dtype),
            mosaic.tiled_smem((stages, config.block_kv, H), k.dtype),
            mosaic.tiled_smem((config.block_q, config.block_kv), jnp.float32),
            mosaic.Barrier(),
            mosaic.Barrier(num_barriers=stages),
            mosaic.Barrier(num_barriers=stages),
        ],
        grid={"q": T // config.block_q},
        threads=("warpgroup", 2),
    )
    return launch(q, k)


def _q_rows(config: Config) -> Any:
    return pl.ds(lax.axis_index("q") * config.block_q, config.block_q)


def _produce(r: Refs, config: Config, tiles: int) -> None:
    mosaic.set_max_registers(40, action="decrease")
    mosaic.copy_gmem_to_smem(r.q_gmem.at[_q_rows(config)], r.q_smem, r.q_full)

    @pl.loop(0, tiles)
    def _(i: jax.Array) -> None:
        stage = lax.rem(i, config.stages)
        pl.when(i >= config.stages)(lambda: mosaic.barrier_wait(r.k_free.at[stage]))
        rows = pl.ds(i * config.block_kv, config.block_kv)
        mosaic.copy_gmem_to_smem(r.k_gmem.at[rows], r.k_smem.at[stage], r.k_full.at[stage])

    # The interpreter insists that every arrival is waited for.
    @pl.loop(max(tiles - config.stages, 0), tiles)
    def _(i: jax.Array) -> None:
        mosaic.barrier_wait(r.k_free.at[lax.rem(i, config.stages)])


def _consume(r: Refs, config: Config, tiles: int) -> None:
    mosaic.set_max_registers(232, action="increase")
    mosaic.barrier_wait(r.q_full)

    @pl.loop(0, tiles)
    def _(i: jax.Array) -> None:
        stage = lax.rem(i, config.stages)
        full, free = r.k_full.at[stage], r.k_free.at[stage]
        if config.fault != "late_wait":
            mosaic.barrier_wait(full)
        if config.fault == "early_free":
            mosaic.barrier_arrive(free)
        s = mosaic.matmul(r.q_smem, r.k_smem.at[stage], transpose_b=True)  # [block_q, block_kv]
        if config.fault == "late_wait":
            mosaic.barrier_wait(full)
        if config.fault != "early_free":
            mosaic.barrier_arrive(free)
        mosaic.wait_smem_to_gmem(0)  # the previous tile has left scores_smem
        mosaic.store(r.scores_smem, s)
        mosaic.commit_smem()
        columns = pl.ds(i * config.block_kv, config.block_kv)
        mosaic.copy_smem_to_gmem(r.scores_smem, r.scores_gmem.at[_q_rows(config), columns])

    mosaic.wait_smem_to_gmem(0)


def product(a: jax.Array, b: jax.Array, row: jax.Array, form: Form) -> jax.Array:
    """A product of bf16 [TILE, TILE] operands by `form`, plus ``row[:, None]``."""

    def product_kernel(
        a_gmem: mosaic.Ref,
        b_gmem: mosaic.Ref,
        row_gmem: mosaic.Ref,  # [TILE] float32
        out_gmem: mosaic.Ref,
        a_smem: mosaic.Ref,
        b_smem: mosaic.Ref,
        out_smem: mosaic.Ref,
        full: mosaic.Ref,
    ) -> None:
        mosaic.copy_gmem_to_smem(a_gmem, a_smem, full)
        mosaic.copy_gmem_to_smem(b_gmem, b_smem, full)
        mosaic.barrier_wait(full)
        value = _product(a_smem, b_smem, form)
        added = mosaic.load(row_gmem, layout=mosaic.Layout.WGMMA.reduce(1), optimized=False)
        value = value + lax.broadcast_in_dim(added, value.shape, [0])
        mosaic.store(out_smem, value)
        mosaic.commit_smem()
        mosaic.copy_smem_to_gmem(out_smem, out_gmem)
        mosaic.wait_smem_to_gmem(0)

    tile = (TILE, TILE)
    launch = mosaic.kernel(
        product_kernel,
        out_type=jax.ShapeDtypeStruct(tile, jnp.float32),
        scratch_types=[
            mosaic.tiled_smem(tile, a.dtype),
            mosaic.tiled_smem(tile, b.dtype),
            mosaic.tiled_smem(tile, jnp.float32),
            mosaic.Barrier(num_arrivals=2),
        ],
        grid={"block": 1},
        threads=("warpgroup", 1),
    )
    return launch(a, b, row)


def product_reference(a: jax.Array, b: jax.Array, row: jax.Array, form: Form) -> jax.Array:
    """What `product` computes, in jnp."""
    x, y = a.astype(jnp.float32), b.astype(jnp.float32)
    once = x.T @ y.T if form == "transposed" else x @ y
    times = 2 if form in ("overlapped", "chained") else 1
    return times * once + (form in ("add", "chained")) + row[:, None]


def _product(a: mosaic.Ref, b: mosaic.Ref, form: Form) -> jax.Array:
    ones = mosaic.full((TILE, TILE), 1, jnp.float32)
    if form == "fresh":
        return mosaic.matmul(a, b)
    if form == "add":
        return mosaic.matmul(a, b, ones)
    if form == "transposed":
        return mosaic.matmul(a, b, transpose_a=True, transpose_b=True)
    if form == "registers":
        return mosaic.matmul(mosaic.load(a, layout=mosaic.Layout.WGMMA), b)
    if form == "overlapped":
        first, second = mosaic.start(a, b), mosaic.start(a, b)
        return mosaic.settle(first, in_flight=1) + mosaic.settle(second)
    return mosaic.settle(mosaic.start(a, b, mosaic.start(a, b, ones)))
