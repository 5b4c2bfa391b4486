"""Caches hold what was appended, where it belongs, and touch nothing else."""

import doctest
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxflash.cache
from jaxflash.cache import KVCache, PageAllocator, PagedKVCache, tokens
from tests.caches import (
    DTYPES,
    KINDS,
    H,
    K,
    assert_holds,
    contiguous,
    cut,
    empty,
    joined,
    kv,
    paged,
)

# What append writes


@DTYPES
@pytest.mark.parametrize("jits", [False, True], ids=["eager", "jit"])
def test_contiguous_prompt_chunk_and_tokens(dtype: Any, jits: bool) -> None:
    append = jax.jit(KVCache.append) if jits else KVCache.append
    prompt, chunk, token = (kv(3, T, dtype, seed=T) for T in (6, 3, 1))
    cache = append(contiguous(3, 12, dtype), *prompt, jnp.array([6, 2, 0]))
    cache = append(cache, *chunk)
    cache = append(cache, *token, np.array([1, 0, 1]))
    counts = ((6, 3, 1), (2, 3, 0), (0, 3, 1))
    assert_holds(
        cache,
        [
            joined(*(cut(x, row, n) for x, n in zip((prompt, chunk, token), of, strict=True)))
            for row, of in enumerate(counts)
        ],
    )
    assert cache.key.dtype == cache.value.dtype == dtype


@DTYPES
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_paged_prompt_and_tokens(dtype: Any, page_size: int) -> None:
    """Pages in any order; the pages of nobody stay as they were."""
    table = np.random.default_rng(page_size).permutation(10)[:6].reshape(2, 3).astype(np.int32)
    cache = paged(table, pages=10, page_size=page_size, dtype=dtype)
    T = 2 * page_size + 1
    prompt, token = kv(2, T, dtype), kv(2, 1, dtype, seed=1)
    counts = (T, page_size - 1)
    append = jax.jit(PagedKVCache.append, donate_argnums=0)
    cache = append(append(cache, *prompt, jnp.array(counts)), *token)
    assert_holds(cache, [joined(cut(prompt, b, counts[b]), cut(token, b, 1)) for b in range(2)])
    others = np.setdiff1d(np.arange(10), [*table[0], table[1, 0]])
    for pages in (cache.key_pages, cache.value_pages):
        assert np.isnan(np.asarray(pages)[others].astype(np.float32)).all()


@KINDS
def test_what_does_not_fit_is_dropped(kind: str) -> None:
    """No token wraps around, is clamped, or lands in another sequence."""
    first, second = kv(2, 30), kv(2, 5, seed=1)
    cache = empty(kind).append(*first, [30, 1])
    assert_holds(
        cache.append(*second),
        [
            joined(cut(first, 0, 30), cut(second, 0, 2)),
            joined(cut(first, 1, 1), cut(second, 1, 5)),
        ],
    )
    full = cache.append(*second).append(*second, jnp.array([5, 0]))
    assert full.lengths.tolist() == [32, 6]


@KINDS
def test_counts_out_of_range_at_run_time_are_clipped(kind: str) -> None:
    new = kv(2, 5)
    cache = jax.jit(type(empty(kind)).append)(empty(kind), *new, jnp.array([-3, 99]))
    assert_holds(cache, [cut(new, 0, 0), cut(new, 1, 5)])


@pytest.mark.parametrize("missing", [-1, -7, 8, 2**31 - 1, -(2**31)])
def test_a_token_without_a_page_is_dropped(missing: int) -> None:
    """And those after it, whose page exists: nothing is held beyond a hole."""
    new = kv(2, 40)
    table = jnp.array([[3, missing, 4], [6, 1, 0]])
    cache = jax.jit(lambda cache: cache.with_tables(table).append(*new))(paged([[0], [0]]))
    assert_holds(cache, [cut(new, 0, 16), cut(new, 1, 40)])
    for pages in (cache.key_pages, cache.value_pages):
        assert np.isnan(np.asarray(pages)[[2, 4, 5, 7]]).all()


def _assert_unchanged(before: Any, after: Any) -> None:
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(params=[False, True], ids=["perhaps divided", "local"])
def of_one_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token is written in two ways."""
    monkeypatch.setattr(tokens, "is_local", lambda: request.param)


@KINDS
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.usefixtures("of_one_device")
def test_one_token_of_one_sequence(kind: str, x64: bool) -> None:
    """It is written where it belongs, or not at all."""
    with jax.enable_x64(x64):
        cache = contiguous(1, 32) if kind == "contiguous" else paged([[5, 2]])
        append = jax.jit(lambda cache, *new: cache.append(*new))
        prompt, token = kv(1, 31), kv(1, 1, seed=1)
        cache = append(cache, *prompt)
        _assert_unchanged(cache, append(cache, *token, jnp.array([0], jnp.int32)))
        cache = append(cache, *token)
        assert_holds(cache, [joined(cut(prompt, 0, 31), cut(token, 0, 1))])
        _assert_unchanged(cache, append(cache, *kv(1, 1, seed=2)))


@pytest.mark.parametrize("missing", [-1, -7, 8, 2**31 - 1, -(2**31)])
@pytest.mark.usefixtures("of_one_device")
def test_one_token_without_a_page_is_dropped(missing: int) -> None:
    cache = paged([[3, missing]], [16])
    append = jax.jit(lambda cache, *new: cache.append(*new))  # traced anew
    _assert_unchanged(cache, append(cache, *kv(1, 1)))


@KINDS
def test_negative_lengths_write_nothing(kind: str) -> None:
    cache = empty(kind)
    broken = jax.tree.map(lambda x: x, cache)
    object.__setattr__(broken, "lengths", jnp.array([-2, 2**31 - 1], jnp.int32))
    _assert_unchanged(broken, broken.append(*kv(2, 5)))


@KINDS
def test_no_tokens(kind: str) -> None:
    cache = empty(kind).append(*kv(2, 0))
    assert cache.lengths.tolist() == [0, 0]


def test_gather_reads_no_page_of_others() -> None:
    """Pages that are not in use, not there, or not the sequence's never reach the result."""
    table = jnp.array([[3, -1, 3], [6, 9, 1], [2, 6, 0]])  # -1 and 9 are used, and not there
    cache = paged(np.zeros((3, 3), np.int32))
    cache = cache.with_tables(table, jnp.array([20, 20, 0]))
    own = jnp.full((16, K, H), 7.0)
    keys = cache.key_pages.at[jnp.array([3, 6])].set(own)
    cache = PagedKVCache(keys, cache.value_pages, cache.page_table, cache.lengths)
    key = np.asarray(cache.gather()[0])
    assert (key[:2, :16] == 7).all()
    assert (key[:2, 16:] == 0).all()
    assert (key[2] == 0).all()


# In place, under jit and scan


def _decode(steps: int) -> Callable[..., Any]:
    def decode(cache: Any, key: Any, value: Any) -> Any:
        return lax.scan(lambda c, _: (c.append(key, value), None), cache, length=steps)[0]

    return decode


def _copy(cache: Any, source: Any, target: Any) -> Any:
    return cache.copy_page(source, target)


_PAGES = np.array([5, 2, -1], np.int32), np.array([1, 3, -1], np.int32)
_IN_PLACE: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...]]] = {
    "contiguous-prompt": ("contiguous", KVCache.append, kv(2, 9)),
    "contiguous-scan": ("contiguous", _decode(4), kv(2, 1)),
    "paged-prompt": ("paged", PagedKVCache.append, kv(2, 9)),
    "paged-scan": ("paged", _decode(4), kv(2, 1)),
    "paged-copies": ("paged", _copy, _PAGES),
}


def _large(kind: str, dtype: Any) -> Any:
    return (
        contiguous(2, 1024, dtype)
        if kind == "contiguous"
        else paged([[5, 2], [7, 0]], pages=128, dtype=dtype)
    )


@DTYPES
@pytest.mark.parametrize("name", _IN_PLACE)
def test_donated_cache_is_updated_in_place(name: str, dtype: Any) -> None:
    kind, function, new = _IN_PLACE[name]
    cache = _large(kind, dtype)
    new = tuple(x.astype(dtype) if x.ndim == 4 else x for x in new)
    held = sum(x.nbytes for x in jax.tree.leaves(cache))
    compiled = jax.jit(function, donate_argnums=0).lower(cache, *new).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    # XLA's CPU backend in JAX 0.10 scatters bfloat16 through a copy in float32.
    if dtype == jnp.float32 or jax.__version_info__ >= (0, 11):
        assert memory.temp_size_in_bytes < held / 8
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)[:2]]
    after = compiled(cache, *new)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(after)[:2]] == before


@KINDS
def test_scan_over_decode_steps(kind: str) -> None:
    tokens = [kv(2, 1, seed=i) for i in range(6)]
    stacked = tuple(jnp.stack(x) for x in zip(*tokens, strict=True))
    prompt = kv(2, 13)

    @partial(jax.jit, donate_argnums=0)
    def decode(cache: Any) -> Any:
        return lax.scan(lambda c, new: (c.append(*new), c.lengths), cache, stacked)

    cache, lengths = decode(empty(kind).append(*prompt, [13, 4]))
    assert lengths[:, 0].tolist() == list(range(13, 19))
    assert_holds(
        cache,
        [
            joined(cut(prompt, row, count), *(cut(token, row, 1) for token in tokens))
            for row, count in enumerate((13, 4))
        ],
    )


@KINDS
def test_dtypes_with_x64(kind: str) -> None:
    with jax.enable_x64(True):
        before = empty(kind)
        after = _decode(2)(before, *kv(2, 1))
        assert jax.tree.map(jax.typeof, before.__dict__) == jax.tree.map(jax.typeof, after.__dict__)


def test_copies_run_one_after_the_other() -> None:
    cache = paged([[0, 1]])
    rows = jnp.arange(8.0)[:, None, None, None]
    keys, values = (jnp.broadcast_to(rows, x.shape) for x in (cache.key_pages, cache.value_pages))
    cache = PagedKVCache(keys, values, cache.page_table, cache.lengths)
    for pages in (
        cache.copy_page([3, 1, 5], [1, 2, 7]),
        jax.jit(_copy)(cache, jnp.array([3, -1, 1, 0, 99, 5]), jnp.array([1, -1, 2, -1, 0, 7])),
    ):
        for x in (pages.key_pages, pages.value_pages):
            assert x[:, 0, 0, 0].tolist() == [0, 3, 3, 3, 4, 5, 6, 5]
            assert (x == x[:, :1, :1, :1]).all()
    assert cache.copy_page([], []).key_pages.shape == cache.key_pages.shape


def test_donating_takes_nothing_from_the_caller() -> None:
    table, lengths = jnp.array([[1, 2]]), jnp.array([3])
    jax.jit(PagedKVCache.append, donate_argnums=0)(
        paged([[0]]).with_tables(table, lengths), *kv(1, 1)
    )
    assert table.tolist() == [[1, 2]]
    assert lengths.tolist() == [3]


@DTYPES
def test_prefix_sharing(dtype: Any) -> None:
    """Two answers to one prompt share its pages, but for the last, which each fills on its own."""
    pool, prompt, answers = (
        PageAllocator(pages=8, page_size=16),
        kv(1, 40, dtype),
        kv(2, 9, dtype),
    )
    first = pool.allocate(40)
    cache = paged(pool.table([first], 4), dtype=dtype).append(*prompt)
    sequences = [first, pool.fork(first)]
    copies = [pair for sequence in sequences for pair in pool.extend(sequence, 9)]
    table = pool.table(sequences, 4)
    assert copies == [(2, 3)]
    np.testing.assert_array_equal(table[:, :2], [[0, 1], [0, 1]])
    shared = cache.key_pages[:2]
    cache = cache.copy_page(*zip(*copies, strict=True)).with_tables(table, [40, 40])
    cache = cache.append(*answers)
    assert_holds(cache, [joined(cut(prompt, 0, 40), cut(answers, b, 9)) for b in range(2)])
    np.testing.assert_array_equal(cache.key_pages[:2], shared)


@pytest.mark.parametrize("module", ["allocator", "contiguous", "paged"])
def test_examples_in_docstrings_run(module: str) -> None:
    result = doctest.testmod(getattr(jaxflash.cache, module))
    assert result.attempted > 5
    assert result.failed == 0
