"""The next token of a few sequences by a model like Llama, in few kernels.

As `decoder` has it, a layer is fifteen kernels to XLA, of which ten read next to nothing while the
memory waits. Here it is ten: four products by `few_rows`, attention's two, the gate's, two that add
to the residual stream and normalise it, and one that rotates and appends. The results are those of
`Decoder.extend`, up to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.pallas import triton

import jaxflash
from bench.models import few_rows
from bench.models.config import Config
from bench.models.decoder import Block, Decoder
from jaxflash import device

_WARPS_OF_ROW, _WARPS_OF_HEAD = 8, 1


def is_for(c: Config, caches: Sequence[Any]) -> bool:
    """Whether a model is like Llama, its sizes are such that kernels take them, and caches too."""
    cache = caches[0]
    is_like_llama = c.norm == "rms" and c.residual == "serial" and c.is_gated and not c.is_tied
    has_biases = c.attention_bias or c.mlp_bias or c.head_bias
    turns_all = c.rope is not None and c.rope.dims is None and not c.rope.interleaved
    sizes = c.width, c.hidden, c.vocabulary, c.key_value_heads * c.head_dim
    return (
        isinstance(cache, jaxflash.KVCache)
        and is_like_llama
        and not has_biases
        and turns_all
        and c.head_dim & (c.head_dim - 1) == 0
        and few_rows.supports(len(cache.lengths), sizes)
    )


class Stream(NamedTuple):
    """The residual stream: what it was, and products that are yet to be added."""

    x: jax.Array  # bfloat16 [B, width]
    shares: jax.Array  # float32 [shares, B, width]


def extend(
    model: Decoder, tokens: jax.Array, caches: Sequence[Any]
) -> tuple[jax.Array, tuple[jaxflash.KVCache, ...]]:
    """`Decoder.extend` with tokens [B, 1]."""
    held = caches[0]  # as long as those of all other layers
    lengths = jnp.minimum(held.lengths + 1, held.capacity)
    turns = _turns(model.blocks[0].attention.core.rope, held)
    x = model.ends.embed(tokens, held.lengths[:, None])[:, 0]
    stream = Stream(x, jnp.zeros((1, *x.shape), jnp.float32))
    found = []
    firsts = [*(_first(block) for block in model.blocks[1:]), [_matrix(model.ends.head)]]
    for block, cache, following in zip(model.blocks, caches, firsts, strict=True):
        own = dataclasses.replace(cache, lengths=held.lengths)
        stream, extended = _block(block, stream, own, turns, lengths, following)
        found.append(extended)
    _, normed = add_and_norm(stream, model.ends.norm)
    shares = few_rows.products(normed, [_matrix(model.ends.head)], _first(model.blocks[0]))
    return jnp.sum(shares, axis=0).astype(normed.dtype).astype(jnp.float32), tuple(found)


def _block(
    block: Block,
    stream: Stream,
    cache: jaxflash.KVCache,
    turns: tuple[jax.Array, jax.Array],
    lengths: jax.Array,  # with the new token
    following: Sequence[jax.Array],
) -> tuple[Stream, jaxflash.KVCache]:
    """What a layer adds to the stream, and its cache with the new token."""
    attention, mlp = block.attention, block.mlp
    out, down = _matrix(attention.out), _matrix(mlp.down)
    x, normed = add_and_norm(stream, block.attention_norm)
    shares = few_rows.products(normed, _first(block), [out])
    query, key, value = rotate_and_append(shares, turns, cache.lengths, cache.key, cache.value)
    extended = jaxflash.KVCache(key, value, lengths)
    attended = attention.core.over_cache(query[:, None], extended, sinks=None, counts=None)
    expanding = [_matrix(mlp.gate), _matrix(mlp.up)]
    rows = attended.reshape(len(x), -1)
    x, normed = add_and_norm(Stream(x, few_rows.products(rows, [out], expanding)), block.mlp_norm)
    both = jnp.sum(few_rows.products(normed, expanding, [down]), axis=0).astype(x.dtype)
    gate, up = jnp.split(both, 2, axis=-1)
    return Stream(x, few_rows.products(nnx.silu(gate) * up, [down], following)), extended


def _turns(rope: jaxflash.Rope | None, cache: jaxflash.KVCache) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, H / 2] by which the next token's heads are rotated."""
    assert rope is not None, "see is_for"
    half = jnp.ones((len(cache.lengths), 1, 1, cache.key.shape[-1] // 2), jnp.float32)
    rotated = rope(jnp.concatenate([half, 0 * half], axis=-1), cache.lengths[:, None])
    cos, sin = jnp.split(rotated[:, 0, 0], 2, axis=-1)
    return cos, sin


def _first(block: Block) -> list[jax.Array]:
    """The matrices that a block multiplies first."""
    attention = block.attention
    return [_matrix(layer) for layer in (attention.query, attention.key, attention.value)]


def _matrix(layer: Any) -> jax.Array:
    """Of a linear layer, [inputs, outputs]."""
    return layer.kernel[...].reshape(math.prod(np.atleast_1d(layer.in_features)), -1)


# ------------------------------------------------------------------------------ kernels


def add_and_norm(stream: Stream, norm: Any) -> tuple[jax.Array, jax.Array]:
    """The stream with what is added, and its RMS norm: bfloat16 [B, width] both."""
    (B, width), count = stream.x.shape, len(stream.shares)

    def kernel(x: Any, shares: Any, scale: Any, out: Any, normed: Any) -> None:
        row, columns = pl.program_id(0), jnp.arange(pl.next_power_of_2(width))
        exists = columns < width

        def load(ref: Any, *at: Any) -> jax.Array:
            return triton.load(ref.at[(*at, columns)], mask=exists, other=jnp.array(0, ref.dtype))

        added = _added(load(shares, share, row) for share in range(count))
        total = load(x, row) + added.astype(x.dtype)
        triton.store(out.at[row, columns], total, mask=exists)
        total = total.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.sum(total * total) / width + norm.epsilon)
        result = total * factor * load(scale).astype(jnp.float32)
        triton.store(normed.at[row, columns], result.astype(normed.dtype), mask=exists)

    shape = jax.ShapeDtypeStruct((B, width), stream.x.dtype)
    call = _kernel(kernel, (B,), [shape, shape], "add_and_norm", _WARPS_OF_ROW)
    out, normed = call(*stream, norm.scale[...])
    return out, normed


def rotate_and_append(
    shares: jax.Array,  # float32 [shares, B, (N + 2 K) H]
    turns: tuple[jax.Array, jax.Array],  # cosines and sines, float32 [B, H / 2]
    lengths: jax.Array,  # int32 [B], what the caches hold
    key: jax.Array,  # [B, S, K, H]
    value: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, N, H], and keys and values in whose place they came, with the new token's."""
    (count, B, columns), (_, S, K, H) = shares.shape, key.shape
    N = columns // H - 2 * K
    half = H // 2

    def kernel(*refs: Any) -> None:
        shares, cos, sin, lengths, _, _, query, key, value = refs
        batch, head = pl.program_id(0), pl.program_id(1)
        place = lengths[batch]
        low = jnp.arange(half)
        high = low + half

        def load(columns: Any) -> jax.Array:
            at = head * H + columns
            total = _added(triton.load(shares.at[share, batch, at]) for share in range(count))
            return total.astype(query.dtype).astype(jnp.float32)

        def put(ref: Any, *at: Any, turned: bool) -> None:
            a, b = load(low), load(high)
            if turned:
                c, s = (triton.load(ref.at[batch, low]) for ref in (cos, sin))
                a, b = a * c - b * s, b * c + a * s
            triton.store(ref.at[(*at, low)], a.astype(ref.dtype))
            triton.store(ref.at[(*at, high)], b.astype(ref.dtype))

        fits = place < S
        pl.when(head < N)(lambda: put(query, batch, head, turned=True))
        is_key, of_key = (head >= N) & (head < N + K), head - N
        pl.when(is_key & fits)(lambda: put(key, batch, place, of_key, turned=True))
        is_value, of_value = head >= N + K, head - N - K
        pl.when(is_value & fits)(lambda: put(value, batch, place, of_value, turned=False))

    outputs = [
        jax.ShapeDtypeStruct(shape, key.dtype) for shape in ((B, N, H), key.shape, key.shape)
    ]
    grid, aliases = (B, N + 2 * K), {4: 1, 5: 2}
    call = _kernel(kernel, grid, outputs, "rotate_and_append", _WARPS_OF_HEAD, aliases)
    query, key, value = call(shares, *turns, lengths, key, value)
    return query, key, value


def _added(shares: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, shares)


def _kernel(
    body: Any,
    grid: tuple[int, ...],
    outputs: Sequence[jax.ShapeDtypeStruct],
    name: str,
    warps: int,
    aliases: dict[int, int] | None = None,
) -> Any:
    return pl.pallas_call(
        body,
        out_shape=list(outputs),
        grid=grid,
        input_output_aliases=aliases or {},
        interpret=device.target().platform == "cpu",
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        name=name,
    )
