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
tiles into it, is in `backward_producer`.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, spec
from pallas_kernels.common import accepts, block_map
from pallas_kernels.common.schedule import Schedule, largest_divisor
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.backward_by_columns import BY_COLUMNS
from pallas_kernels.hopper.backward_by_keys import BY_KEYS
from pallas_kernels.hopper.backward_kernel import (
    CONSUMERS,
    TINY,
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
from pallas_kernels.hopper.backward_visit import consume
from pallas_kernels.hopper.config import ROWS
from pallas_kernels.hopper.kernel import LOG2_E, divide


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
    blocks = blocks or gpu.multiprocessors(problem.device)
    adds_keys = divides_groups(problem, c, blocks, kv_blocks)
    heads = p.N if adds_keys else p.K
    blocks = min(blocks, p.B * heads * kv_blocks)
    at_once = _heads_at_once(problem, heads, blocks, kv_blocks)
    schedule = Schedule(p.B, heads, kv_blocks, at_once, last_head_first=True)
    delta, stats, flags, units = _of_rows(p, c, q_blocks, operands, out, lse, dout, dlse)
    sizes = q_blocks * c.block_q, kv_blocks * c.block_kv
    x = tiles.prepare(problem, operands, *sizes, turned=True)
    q, k_, v = forms.q.array(x.query), forms.k.array(x.key), forms.v.array(x.value)
    x = x._replace(query=q, key=k_, value=v)
    kernel_of = functools.partial(Backward, p, c, schedule, blocks, forms)
    empties = kernel_of(None).empties_rows
    inputs = (x, forms.do.array(dout), stats, flags if empties else None, found, units)
    leaves, tree = jax.tree.flatten(inputs)

    def backward_kernel(*refs: mosaic.Ref) -> None:
        inputs = jax.tree.unflatten(tree, refs[: len(leaves)])
        k = kernel_of(forms.refs(p, c, inputs, *refs[len(leaves) :]))
        order = BY_COLUMNS if c.by_columns else BY_KEYS
        rounding = Rounding.of(k) if rounds_dq(p, c) else None
        tasks = (functools.partial(consume, k, order, rounding), lambda: produce(k, rounding))
        divide(CONSUMERS, k.registers, *tasks)

    launch = mosaic.kernel(
        backward_kernel,
        out_type=_outputs(problem, c, forms, adds_keys, q_blocks, kv_blocks),
        scratch_types=list(forms.scratch(p, c).values()),
        grid={"block": blocks},
        threads=("warpgroup", CONSUMERS + 1),
        # As in the forward; what a thread of dS writes, `commit_smem` shows to the product that
        # waits at `ds_full`, where each thread arrives by itself.
        params=mosaic.compiler_params(reduction_scratch_bytes=0, unsafe_no_auto_barriers=True),
    )
    sums = _sums(problem, c, forms, adds_keys, q_blocks, kv_blocks)
    rest = list(launch(*leaves, *(s.ref for s in sums.values())))
    if adds_keys:
        dk, dv = (_from_strips(sums[name], p.dtype) for name in ("key", "value"))
    else:
        dk, dv = rest.pop(0), rest.pop(0)
    dbias = mosaic.matrices(rest.pop(0)) if stores_bias(problem) else None
    if "bias" in sums:
        dbias = sums["bias"].total()
    dq = rest.pop() if rounds_dq(p, c) else _from_strips(sums["query"], p.dtype, p.scale, units)
    dq = dq[:, : p.T, :, : p.H]
    of_keys = jnp.sum(rest[0], axis=1) if rest else ()
    by_name = dict(zip(key_sums(problem), of_keys, strict=True))
    result = spec.Operands(
        query=dq,
        key=dk[:, : p.S, :, : p.H],
        value=dv[:, : p.S, :, : p.Hv],
        bias=_dbias(problem, dbias, by_name.get("bias")),
        alibi_slopes=_dslopes(by_name.get("alibi_slopes")),
        sinks=spec.softmax.of_sinks(operands.sinks, lse, delta),
    )
    return spec.gradients(operands, result)


def _sums(
    p: spec.Problem,
    c: BackwardConfig,
    forms: BackwardForms,
    adds_keys: bool,
    q_blocks: int,
    kv_blocks: int,
) -> dict[str, mosaic.Sums]:
    """What blocks add to, by the operand whose gradient it is; in the order of `Refs`."""
    dtype = jnp.int32 if p.deterministic else jnp.float32
    shape: tuple[int, ...] = (p.B, q_blocks * c.block_q // ROWS, p.N, forms.q.strips)
    found = {
        "query": mosaic.Sums.zero(kv_blocks, shape, c.width, dtype, is_staged=not c.by_columns)
    }
    if sums_bias(p) and not stores_bias(p):
        shape = _bias_tiles(p, c, q_blocks, kv_blocks)
        found["bias"] = mosaic.Sums.zero(p.B * p.N, shape, c.bias_width)
    for name, form in (("key", forms.k), ("value", forms.v)) if adds_keys else ():
        shape = (p.B, kv_blocks * c.key_groups, p.K, form.strips)
        found[name] = mosaic.Sums.zero(p.G, shape, c.width)
    return found


def _from_strips(
    sums: mosaic.Sums, dtype: Any, scale: float = 1.0, units: jax.Array | None = None
) -> jax.Array:
    """[B, tokens, heads, columns] of sums of strips of 64 rows, rounded; ``units``: see `Refs`."""
    total = sums.total()  # [B, tokens / 64, heads, strips, 64, width]
    batch, _, heads, strips, _, width = total.shape
    if units is not None:
        of_tile = units.reshape(batch, heads, -1, ROWS).swapaxes(1, 2)[:, :, :, None, :, None]
        total = total * of_one(of_tile)
    x = total.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, strips * width) * scale
    # The barrier keeps XLA from taking a part of what it turns, element by element.
    return lax.optimization_barrier(x.astype(dtype))


def _of_rows(
    p: spec.Problem,
    c: BackwardConfig,
    q_blocks: int,
    operands: spec.Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Delta, [B, T, N]; and, as `Refs` has them, the statistics, `empty` and units of integers."""
    by_tile = functools.partial(_by_tile, c, q_blocks)
    norms = _norms(dout) if p.deterministic else None
    # The barrier keeps XLA from sums within the transpose, which reads column by column.
    sums = spec.softmax.sums_of_rows(out, dout, lse.dtype)
    sums, norms = lax.optimization_barrier((sums, norms))
    delta = spec.softmax.delta_of_sums(sums, lse, dlse)
    empty = lse == -math.inf
    base2 = jnp.where(empty, math.inf, lse * LOG2_E)
    stats = by_tile((base2, math.inf), (delta, 0.0))
    flags = jnp.any(by_tile((empty, False)), axis=-1).astype(jnp.int32)
    bits = lax.bitcast_convert_type(stats, jnp.int32)
    if norms is None:
        return delta, bits, flags, None
    is_number = jnp.isfinite(lse - delta) | empty
    norms = by_tile((jnp.where(is_number, norms, math.nan), 0.0))
    units = _units(operands, stats[..., c.block_q :], norms, p.dropout_rate)
    return delta, bits, flags, units.reshape(p.B, p.N, -1)


def _outputs(
    p: spec.Problem,
    c: BackwardConfig,
    forms: BackwardForms,
    adds_keys: bool,
    q_blocks: int,
    kv_blocks: int,
) -> list[jax.ShapeDtypeStruct]:
    """Of dK and dV unless they are sums, in whole tiles where they are not copied out.

    And of what is stored of a bias, sums over rows, by key, and dQ if the kernel rounds it.
    """
    keys = kv_blocks * c.block_kv
    shapes = [
        (p.B, keys, p.K, form.columns)
        if c.by_columns
        else (p.B, p.S, p.K, mosaic.copied_columns(form.array_columns))
        for form in (forms.k, forms.v)
    ]
    outputs = [] if adds_keys else [jax.ShapeDtypeStruct(shape, p.dtype) for shape in shapes]
    if stores_bias(p):
        shape = (*_bias_tiles(p, c, q_blocks, kv_blocks), ROWS * c.bias_width)
        outputs.append(jax.ShapeDtypeStruct(shape, p.operands.bias.dtype))
    if names := key_sums(p):
        shape = (len(names), CONSUMERS if c.by_columns else 1, p.B, p.N, keys)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    if rounds_dq(p, c):
        outputs.append(jax.ShapeDtypeStruct((p.B, p.T, p.N, mosaic.copied_columns(p.H)), p.dtype))
    return outputs


def _bias_tiles(
    p: spec.Problem, c: BackwardConfig, q_blocks: int, kv_blocks: int
) -> tuple[int, ...]:
    """How many tiles of a bias's gradient there are."""
    of_rows = q_blocks * c.block_q // c.bias_width
    return (*p.operands.bias.shape[:2], kv_blocks * c.key_groups, of_rows)


def _units(
    x: spec.Operands, delta: jax.Array, of_dout: jax.Array, dropout_rate: float
) -> jax.Array:
    """How many units a 1 is, such that no row of dQ exceeds 2^30 of them, from [B, N, ...].

    It is NaN, which no integer is, where the norm is.

    ``|dq| <= max|k| sum(p (|dp| + |delta|))``, where p sums to 1 and ``|dp| <= |dout| |v|``. Keys
    that are not finite count as none: rows that see them are no numbers anyway.
    """
    groups = x.query.shape[2] // x.key.shape[2]

    def largest(y: jax.Array) -> jax.Array:
        y = y.swapaxes(1, 2)  # XLA then writes it so, and reads rows
        found = jnp.max(jnp.where(jnp.isfinite(y), y, 0), axis=2)
        return jnp.repeat(found, groups, axis=-1)[..., None, None]

    keys = largest(jnp.max(jnp.abs(x.key.astype(jnp.float32)), axis=-1))
    dp = of_dout * largest(_norms(x.value)) / (1 - dropout_rate)
    limit = keys * (dp + jnp.abs(delta))
    units = jnp.where(limit > TINY, 2.0**30 / jnp.maximum(limit, TINY), 0.0)
    return jnp.where(jnp.isnan(of_dout), math.nan, units)


def _norms(x: jax.Array) -> jax.Array:
    """Of rows: [..., columns] to [...]."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


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


def _by_tile(c: BackwardConfig, q_blocks: int, *filled: tuple[jax.Array, Any]) -> jax.Array:
    """Arrays [B, T, N], each with what fills it up, as one [B, N, q_blocks, arrays * block_q]."""
    batch, tokens, heads = filled[0][0].shape
    missing = (0, 0), (0, q_blocks * c.block_q - tokens), (0, 0)
    # As one array they are turned by one kernel.
    x = jnp.stack([jnp.pad(x, missing, constant_values=fill) for x, fill in filled], axis=1)
    x = x.reshape(batch, -1, q_blocks, c.block_q, heads).transpose(0, 4, 2, 1, 3)
    return x.reshape(batch, heads, q_blocks, -1)


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
