"""Small caches with NaN in every place, tokens for them, and what they should hold then."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflash.cache import KVCache, PagedKVCache

DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
KINDS = pytest.mark.parametrize("kind", ["contiguous", "paged"])
K, H, HV = 2, 4, 3


def kv(batch: int, tokens: int, dtype: Any = jnp.float32, seed: int = 0) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    key, value = (random.standard_normal((batch, tokens, K, dim)) for dim in (H, HV))
    return jnp.asarray(key.astype(dtype)), jnp.asarray(value.astype(dtype))


def poisoned(cache: Any) -> Any:
    """The cache with NaN in every place."""

    def poison(x: jax.Array) -> jax.Array:
        if x.dtype == jnp.int8:
            return jnp.full_like(x, 99)
        is_held = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(np.full(x.shape, np.nan, x.dtype)) if is_held else x

    return jax.tree.map(poison, cache)


def contiguous(batch: int, capacity: int, dtype: Any = jnp.float32) -> KVCache:
    return poisoned(KVCache.zeros(batch, capacity, K, H, value_dim=HV, dtype=dtype))


def paged(
    table: Any, lengths: Any = None, *, pages: int = 8, page_size: int = 16, dtype: Any = "float32"
) -> PagedKVCache:
    batch, max_pages = np.shape(table)
    cache = PagedKVCache.zeros(
        pages, page_size, K, H, batch=batch, max_pages=max_pages, value_dim=HV, dtype=dtype
    )
    return poisoned(cache).with_tables(table, lengths)


def empty(kind: str) -> Any:
    """Two sequences with room for 32 tokens, in eight pages if paged."""
    return contiguous(2, 32) if kind == "contiguous" else paged([[5, 2], [7, 0]])


def _both(cache: Any) -> tuple[Any, Any]:
    """Keys and values [B, S, K, _]; NaN from the lengths on if contiguous, zero if paged."""
    return cache.gather() if isinstance(cache, PagedKVCache) else (cache.key, cache.value)


def assert_holds(cache: Any, sequences: list[tuple[Any, Any]]) -> None:
    """Each sequence holds its tokens, bit by bit."""
    assert [len(key) for key, _ in sequences] == cache.lengths.tolist()
    for held, which in zip(_both(cache), (0, 1), strict=True):
        for row, tokens in zip(np.asarray(held), sequences, strict=True):
            np.testing.assert_array_equal(row[: len(tokens[which])], tokens[which])
            rest = row[len(tokens[which]) :].astype(np.float32)
            if isinstance(cache, PagedKVCache):
                assert (rest == 0).all()
            else:
                assert np.isnan(rest).all()


def cut(both: tuple[Any, Any], row: int, count: int) -> tuple[Any, Any]:
    return tuple(np.asarray(x)[row, :count] for x in both)


def joined(*parts: tuple[Any, Any]) -> tuple[Any, Any]:
    return tuple(np.concatenate(x) for x in zip(*parts, strict=True))
