"""The model: one class for all families, told apart by their configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

import jaxflash
import jaxflash.nnx
from bench.models.config import Config
from bench.models.standard import StandardCore
from jaxflash.api import Implementation

Cache = jaxflash.KVCache | jaxflash.PagedKVCache
# A backend of jaxflash, None for the one that it chooses, or one of `STANDARD`.
Attention = Implementation | Literal["standard", "cudnn"] | None
STANDARD: dict[Any, Literal["xla", "cudnn"]] = {"standard": "xla", "cudnn": "cudnn"}  # by jax.nn


class Block(nnx.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: Config, attention: Attention, dtype: Any, rngs: nnx.Rngs) -> None:
        self.residual = config.residual
        self.attention_norm = _norm(config, dtype, rngs)
        self.attention = jaxflash.nnx.MultiHeadAttention(
            config.heads,
            config.width,
            num_kv_heads=config.key_value_heads,
            is_causal=True,
            rope=config.rope,
            use_bias=config.attention_bias,
            dtype=dtype,
            param_dtype=dtype,
            implementation=None if attention in STANDARD else cast(Implementation, attention),
            rngs=rngs,
        )
        if attention in STANDARD:
            core = _fields(self.attention.core)
            self.attention.core = StandardCore(**core, by=STANDARD[attention])
        has_own_norm = config.residual != "parallel, one norm"
        self.mlp_norm = nnx.data(_norm(config, dtype, rngs) if has_own_norm else None)
        self.mlp = Mlp(config, dtype, rngs)

    def __call__(
        self, x: jax.Array, cache: Cache | None = None, counts: Any = None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, width], and the cache with these tokens if there is one."""
        normed = self.attention_norm(x)
        attended = self.attention(normed, cache=cache, counts=counts)
        if cache is not None:
            attended, cache = attended
        given = x + attended if self.residual == "serial" else x
        if self.mlp_norm is not None:
            normed = self.mlp_norm(given)
        return x + attended + self.mlp(normed), cache


class Mlp(nnx.Module):
    """Expands, applies a nonlinearity, contracts."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs) -> None:
        def project(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias,
                dtype=dtype,
                param_dtype=dtype,
                rngs=rngs,
            )

        self.up = project(config.width, config.hidden)
        self.gate = nnx.data(project(config.width, config.hidden) if config.is_gated else None)
        self.down = project(config.hidden, config.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.gate is None:
            return self.down(nnx.gelu(self.up(x), approximate=True))
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Ends(nnx.Module):
    """What is before the blocks, and after them."""

    def __init__(self, config: Config, dtype: Any, rngs: nnx.Rngs) -> None:
        types = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        V, width = config.vocabulary, config.width
        self.tokens = nnx.Embed(V, width, **types)
        learned = nnx.Embed(config.positions, width, **types) if config.positions else None
        self.positions = nnx.data(learned)
        self.norm = _norm(config, dtype, rngs)
        head = nnx.Linear(width, V, use_bias=config.head_bias, **types)
        self.head = nnx.data(None if config.is_tied else head)

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """[B, T] and positions [T] or [B, T] as [B, T, width]."""
        x = self.tokens(tokens)
        return x if self.positions is None else x + self.positions(positions)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., width] as float32 [..., vocabulary]."""
        x = self.norm(x)
        out = self.tokens.attend(x) if self.head is None else self.head(x)
        return out.astype(jnp.float32)


class Decoder(nnx.Module):
    """A language model.

    Args:
      config: its sizes and its family.
      attention: by what.
      dtype: of parameters and computation.
      rngs: for the parameters.
    """

    def __init__(
        self,
        config: Config,
        *,
        attention: Attention = None,
        dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
    ) -> None:
        self.ends = Ends(config, dtype, rngs)
        blocks = [Block(config, attention, dtype, rngs) for _ in range(config.layers)]
        self.blocks = nnx.List(blocks)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of each next token, [B, T, vocabulary], of tokens [B, T]."""
        x = self.ends.embed(tokens, jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x, _ = block(x)
        return self.ends.logits(x)

    def extend(
        self, tokens: jax.Array, caches: Sequence[Cache], counts: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Appends tokens [B, T], of each sequence the first ``counts[b]``.

        Returns:
          Logits of what comes after each sequence's last token, [B, vocabulary], and the caches.
        """
        B, T = tokens.shape
        new = jnp.arange(T)
        lengths = caches[0].lengths  # of all layers: what follows from it is computed once
        x = self.ends.embed(tokens, lengths[:, None] + new)
        found: list[Cache] = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, extended = block(x, dataclasses.replace(cache, lengths=lengths), counts)
            found.append(cast(Cache, extended))
        last = jnp.full(B, T - 1) if counts is None else jnp.maximum(counts - 1, 0)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return self.ends.logits(x), tuple(found)


def _norm(config: Config, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    kind = nnx.RMSNorm if config.norm == "rms" else nnx.LayerNorm
    return kind(config.width, epsilon=config.epsilon, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _fields(x: Any) -> dict[str, Any]:
    return {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
