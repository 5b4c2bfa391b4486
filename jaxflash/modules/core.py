"""Attention of projected heads, with or without a cache: all that is not Flax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxflash.api import Implementation, dot_product_attention
from jaxflash.cache import KVCache, PagedKVCache
from jaxflash.inference import decode_attention, paged_attention
from jaxflash.modules.rope import Rope

Cache = KVCache | PagedKVCache


@dataclasses.dataclass(frozen=True)
class Core:
    """What an attention layer does between its projections."""

    is_causal: bool
    rope: Rope | None
    local_window_size: int | tuple[int, int] | None
    logits_soft_cap: float | None
    scale: float | None
    dropout_rate: float
    broadcast_dropout: bool
    implementation: Implementation | None

    def __call__(
        self,
        query: jax.Array,  # [*B, T, N, H]
        key: jax.Array,  # [*B, S, K, H]
        value: jax.Array,  # [*B, S, K, Hv]
        *,
        sinks: Any,
        mask: Any,
        positions: Any,
        segment_ids: Any,
        inputs_kv: Any,  # None: those of the queries
        cache: Cache | None,
        counts: Any,
        dropout_key: Any,  # None: nothing is dropped
        debug_checks: bool,
    ) -> tuple[jax.Array, Cache | None]:
        """Output [*B, T, N, Hv], and the cache with the new tokens if there was one."""
        if cache is None:
            if positions is not None and self.rope is None:
                raise ValueError("positions are for rope; this layer has none, pass rope=Rope()")
            if counts is not None:
                raise ValueError("counts are of tokens for a cache; pass cache too")
            query, key = self.rotate(query, key, positions)
            options = {
                "mask": mask,
                "query_segment_ids": segment_ids,
                "key_value_segment_ids": segment_ids,
                "dropout_rate": 0.0 if dropout_key is None else self.dropout_rate,
                "dropout_key": dropout_key,
                "broadcast_dropout": self.broadcast_dropout,
            }
            return self.over_sequence(query, key, value, sinks=sinks, **options), None
        self._check_for_cache(
            inputs_kv=inputs_kv,
            mask=mask,
            positions=positions,
            segment_ids=segment_ids,
            dropout_key=dropout_key,
        )
        new = jnp.arange(query.shape[-3], dtype=jnp.int32)
        query, key = self.rotate(query, key, cache.lengths[:, None] + new)
        cache = cache.append(key, value, counts, debug_checks=debug_checks)
        return self.over_cache(query, cache, sinks=sinks, counts=counts), cache

    def rotate(
        self, query: jax.Array, key: jax.Array, positions: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Both with their positions, which are the same; from 0 on by default."""
        if self.rope is None:
            return query, key
        if query.shape[-3] != key.shape[-3]:
            raise ValueError(
                "rope needs queries and keys of the same tokens; got "
                f"{query.shape[-3]} queries and {key.shape[-3]} keys"
            )
        if positions is None:
            positions = jnp.arange(query.shape[-3], dtype=jnp.int32)
        return self.rope(query, positions), self.rope(key, positions)

    def over_sequence(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        """Attention of tokens to each other, or to other tokens."""
        return dot_product_attention(
            query, key, value, is_causal=self.is_causal, **self._of_logits, **options
        )

    def over_cache(self, query: jax.Array, cache: Cache, *, sinks: Any, counts: Any) -> jax.Array:
        """Attention of the newest tokens to a cache that holds them."""
        options = {**self._of_logits, "sinks": sinks, "counts": counts}
        if isinstance(cache, PagedKVCache):
            held = cache.key_pages, cache.value_pages, cache.page_table, cache.lengths
            options |= {"key_scale": cache.key_scale, "value_scale": cache.value_scale}
            return paged_attention(query, *held, **options)
        return decode_attention(query, cache.key, cache.value, cache.lengths, **options)

    @property
    def _of_logits(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "local_window_size": self.local_window_size,
            "logits_soft_cap": self.logits_soft_cap,
            "implementation": self.implementation,
        }

    def _check_for_cache(self, **absent: Any) -> None:
        if not self.is_causal:
            raise ValueError("attention to a cache is causal; got a layer with is_causal=False")
        for name, x in absent.items():
            if x is not None:
                raise ValueError(f"{name} cannot be combined with a cache")


def head_dim_of(heads: int, kv_heads: int, features: int, head_dim: int | None) -> int:
    """H, as given or as the features that N heads share."""
    if heads % kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads; got {heads} and {kv_heads}"
        )
    if head_dim is None and features % heads:
        raise ValueError(
            f"qkv_features must be a multiple of num_heads; got {features} and {heads}; "
            "set head_dim"
        )
    return features // heads if head_dim is None else head_dim


def drops(of_layer: bool | None, of_call: bool | None) -> bool:
    """Whether dropout is to drop, from the two flags named deterministic."""
    deterministic = of_layer if of_call is None else of_call
    if deterministic is None:
        raise ValueError(
            "dropout needs to know whether to drop; pass deterministic to the call or to the layer"
        )
    return not deterministic
