"""What models are compared with: attention by `jax.nn`, in the place of the library's."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxflash import KVCache, PagedKVCache
from jaxflash.modules.core import Core


@dataclasses.dataclass(frozen=True)
class StandardCore(Core):
    """Attention by `jax.nn.dot_product_attention`: causal, over a sequence or a cache."""

    by: Literal["xla", "cudnn"] = "xla"

    def over_sequence(
        self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        assert not any(x is not None for x in (options["mask"], options["sinks"]))
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=self.by
        )

    def over_cache(
        self, query: jax.Array, cache: KVCache | PagedKVCache, *, sinks: Any, counts: Any
    ) -> jax.Array:
        """A cache in pages is copied into one run of memory first: `jax.nn` knows no pages."""
        assert sinks is None
        key, value = cache.gather() if isinstance(cache, PagedKVCache) else (cache.key, cache.value)
        T, S = query.shape[1], key.shape[1]
        new = T if counts is None else counts
        position = (cache.lengths - new)[:, None] + jnp.arange(T)  # [B, T]
        if T == 1 and counts is None:
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                query_seq_lengths=jnp.ones_like(cache.lengths),
                key_value_seq_lengths=cache.lengths,
                implementation=self.by,
            )
        mask = (jnp.arange(S) <= position[..., None])[:, None]  # [B, 1, T, S]
        # What lies beyond a length may hold anything, and 0 * NaN is NaN.
        value = jnp.where((jnp.arange(S) < cache.lengths[:, None])[..., None, None], value, 0)
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=self.by)
