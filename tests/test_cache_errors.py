"""Bad input is an error when tracing if it is known then, else at run time with debug_checks."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxflash.cache import KVCache, OutOfPages, PageAllocator, PagedKVCache
from tests.caches import empty, kv, paged

_TOKEN = kv(2, 1)
_SEVENTEEN = kv(2, 17)
_BAD_NUMBERS: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...]]] = {
    "counts": (
        "counts must lie in [0, T] = [0, 1]; got 2 for sequence 1",
        lambda counts, **debug: empty("contiguous").append(*_TOKEN, counts, **debug),
        (np.array([1, 2], np.int32),),
    ),
    "paged-counts": (
        "counts must lie in [0, T] = [0, 1]; got -1 for sequence 0",
        lambda counts, **debug: empty("paged").append(*_TOKEN, counts, **debug),
        (np.array([-1, 2], np.int32),),
    ),
    "lengths": (
        "lengths must lie in [0, M * page_size] = [0, 32]; got 33 for sequence 1; give page_table "
        "more columns (max_pages)",
        lambda *tables, **debug: empty("paged").with_tables(*tables, **debug),
        (np.array([[0, 1], [2, 3]], np.int32), np.array([32, 33], np.int32)),
    ),
    "page-too-large": (
        "page_table must hold pages in [0, 8) where a sequence holds tokens; got 8 at [1, 0]",
        lambda *tables, **debug: empty("paged").with_tables(*tables, **debug),
        (np.array([[0, -5], [8, 3]], np.int32), np.array([16, 1], np.int32)),
    ),
    "page-negative": (
        "page_table must hold pages in [0, 8) where a sequence holds tokens; got -5 at [0, 1]",
        lambda *tables, **debug: empty("paged").with_tables(*tables, **debug),
        (np.array([[0, -5], [8, 3]], np.int32), np.array([17, 0], np.int32)),
    ),
    "copy": (
        "source and target must be pages in [0, 8), or both -1; got a copy of page -1 to page 2",
        lambda *pair, **debug: empty("paged").copy_page(*pair, **debug),
        (np.array([3, -1, -1], np.int32), np.array([1, -1, 2], np.int32)),
    ),
}


@pytest.mark.parametrize("name", _BAD_NUMBERS)
def test_bad_numbers(name: str) -> None:
    """Always an error when known at trace time, and with debug_checks when they are not."""
    message, call, arrays = _BAD_NUMBERS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*arrays)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda: call(*arrays))
    on_device = tuple(map(jnp.asarray, arrays))
    call(*on_device)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*on_device, debug_checks=True)
    jax.block_until_ready(jax.jit(call)(*on_device))
    checked = jax.jit(partial(call, debug_checks=True))
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
        jax.block_until_ready(checked(*on_device))


_OVERFLOWS: dict[str, tuple[str, Callable[[], Any], tuple[Any, Any]]] = {
    "contiguous": (
        "1 new tokens for sequence 0, which holds 32, exceed the capacity of 32; build the cache "
        "with a larger capacity",
        lambda: empty("contiguous").append(*kv(2, 30), [30, 2]),
        _TOKEN,
    ),
    "paged": (
        "1 new tokens for sequence 0, which holds 32, exceed the capacity of 32; give page_table "
        "more columns (max_pages)",
        lambda: empty("paged").append(*kv(2, 30), [30, 2]),
        _TOKEN,
    ),
    "no-page": (
        "token 16 of sequence 1 has no page; make room with PageAllocator.extend and install it "
        "with with_tables before append",
        lambda: paged([[5, 2], [7, -1]]).append(*kv(2, 14)),
        _TOKEN,
    ),
}


@pytest.mark.parametrize("name", _OVERFLOWS)
def test_overflow_is_seen_in_a_scan(name: str) -> None:
    """Two decode steps fit and the third does not."""
    message, make, token = _OVERFLOWS[name]

    def decode(cache: Any, debug_checks: bool, steps: int) -> Any:
        step = partial(type(cache).append, debug_checks=debug_checks)
        return lax.scan(lambda c, _: (step(c, *token), None), cache, length=steps)[0]

    decode = jax.jit(decode, static_argnums=(1, 2))
    jax.block_until_ready(decode(make(), True, 2))
    jax.block_until_ready(decode(make(), False, 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(message)):
        jax.block_until_ready(decode(make(), True, 3))


def test_gather_checks_tables() -> None:
    cache = empty("paged").with_tables(jnp.array([[0, 9]]), jnp.array([17]))
    assert not np.isnan(cache.gather()[0][:, 16:]).any()
    with pytest.raises(ValueError, match=re.escape("got 9 at [0, 1]")):
        cache.gather(debug_checks=True)
    gather = jax.jit(partial(PagedKVCache.gather, debug_checks=True))
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape("got 9 at [0, 1]")):
        jax.block_until_ready(gather(cache))


# Errors at trace time


def _raw(key: Any, value: Any = None, table: Any = ((0,),), lengths: Any = (0,)) -> PagedKVCache:
    value = key if value is None else value
    return PagedKVCache(key, value, jnp.asarray(table), jnp.asarray(lengths))


def _x(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


_PAGE = _x(4, 16, 2, 4)
_WRONG: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    # zeros
    (
        ValueError,
        "batch must be positive; got 0",
        lambda: KVCache.zeros(0, 8, 2, 4, dtype="float32"),
    ),
    (
        ValueError,
        "capacity must not be negative; got -8",
        lambda: KVCache.zeros(1, -8, 2, 4, dtype="float32"),
    ),
    (
        TypeError,
        "head_dim must be an int; got 4.0 (float)",
        lambda: KVCache.zeros(1, 8, 2, 4.0, dtype="float32"),
    ),
    (
        TypeError,
        "dtype must be bfloat16, float16, float32 or float64; got int8",
        lambda: KVCache.zeros(1, 8, 2, 4, dtype=jnp.int8),
    ),
    (
        ValueError,
        "page_size must be one of (16, 32, 64, 128, 256); got 48",
        lambda: PagedKVCache.zeros(4, 48, 2, 4, batch=1, max_pages=1, dtype="float32"),
    ),
    (
        ValueError,
        "max_pages must be positive; got 0",
        lambda: PagedKVCache.zeros(4, 16, 2, 4, batch=1, max_pages=0, dtype="float32"),
    ),
    # what the cache holds
    (
        ValueError,
        "key_pages must have four axes [P, page_size, K, H]; got shape (4, 16, 8)",
        lambda: _raw(_x(4, 16, 8)).gather(),
    ),
    (
        ValueError,
        "page_size must be one of (16, 32, 64, 128, 256); got 20",
        lambda: _raw(_x(4, 20, 2, 4)).gather(),
    ),
    (
        ValueError,
        "key_pages and value_pages must agree but for their last axis; got shapes (4, 16, 2, 4) "
        "and (4, 32, 2, 4)",
        lambda: _raw(_PAGE, _x(4, 32, 2, 4)).copy_page([0], [1]),
    ),
    (
        TypeError,
        "value_pages must be bfloat16, float16, float32, float64, float8_e4m3fn or int8; got "
        "int32; convert it with value_pages.astype",
        lambda: _raw(_PAGE, _x(4, 16, 2, 4, dtype=jnp.int32)).gather(),
    ),
    (
        TypeError,
        "page_table must be int32; got float32; convert it with .astype(jnp.int32)",
        lambda: _raw(_PAGE, table=((0.0,),)).gather(),
    ),
    (
        ValueError,
        "page_table and lengths must have shapes [B, M] and [B]; got (1, 1) and (2,)",
        lambda: _raw(_PAGE, lengths=(0, 0)).gather(),
    ),
    (
        ValueError,
        "key and value must agree but for their last axis; got shapes (1, 8, 2, 4) and "
        "(1, 9, 2, 4)",
        lambda: KVCache(_x(1, 8, 2, 4), _x(1, 9, 2, 4), _x(1, dtype=jnp.int32)).append(*kv(1, 1)),
    ),
    (
        ValueError,
        "lengths must have shape [B] = (1,); got shape (2,)",
        lambda: KVCache(_x(1, 8, 2, 4), _x(1, 8, 2, 4), _x(2, dtype=jnp.int32)).append(*kv(1, 1)),
    ),
    # append
    *(
        wrong
        for kind in ("contiguous", "paged")
        for wrong in [
            (
                ValueError,
                "T = 33 new tokens exceed the capacity of 32 tokens a sequence; "
                + ("build the cache" if kind == "contiguous" else "give page_table more columns"),
                lambda kind=kind: empty(kind).append(*kv(2, 33)),
            ),
            (
                ValueError,
                "key must have shape [B, T, K, H] = (2, T, 2, 4) to fit the cache; got shape "
                "(3, 1, 2, 4)",
                lambda kind=kind: empty(kind).append(*kv(3, 1)),
            ),
            (
                ValueError,
                "value must have shape [B, T, K, Hv] = (2, T, 2, 3) to fit the cache; got shape "
                "(2, 1, 2, 4)",
                lambda kind=kind: empty(kind).append(_TOKEN[0], _TOKEN[0]),
            ),
            (
                ValueError,
                "key and value must have as many tokens T; got 1 and 17",
                lambda kind=kind: empty(kind).append(_TOKEN[0], _SEVENTEEN[1]),
            ),
            (
                TypeError,
                "key must have the cache's dtype float32; got bfloat16; convert it with key.astype",
                lambda kind=kind: empty(kind).append(*kv(2, 1, jnp.bfloat16)),
            ),
            (
                TypeError,
                "key must be an array; got 'k' (str)",
                lambda kind=kind: empty(kind).append("k", _TOKEN[1]),
            ),
            (
                ValueError,
                "counts must have shape [B] = (2,); got shape ()",
                lambda kind=kind: empty(kind).append(*_TOKEN, 1),
            ),
            (
                TypeError,
                "counts must be int32; got float32; convert it with .astype(jnp.int32)",
                lambda kind=kind: empty(kind).append(*_TOKEN, jnp.ones(2)),
            ),
            (
                TypeError,
                "counts must hold integers; got float64",
                lambda kind=kind: empty(kind).append(*_TOKEN, [1.0, 1.0]),
            ),
            (
                ValueError,
                "counts must lie in [0, T] = [0, 1]; got 2147483647 for sequence 1",
                lambda kind=kind: empty(kind).append(*_TOKEN, np.array([1, 2**40])),
            ),
            (
                TypeError,
                "debug_checks must be True or False, known at trace time; got 1 (int)",
                lambda kind=kind: empty(kind).append(*_TOKEN, debug_checks=1),
            ),
        ]
    ),
    # with_tables, copy_page
    (
        ValueError,
        "page_table must have shape [B, M], not empty; got shape (2,)",
        lambda: empty("paged").with_tables([0, 1]),
    ),
    (
        ValueError,
        "lengths must have shape [B] of page_table = (1,); got shape (2,)",
        lambda: empty("paged").with_tables([[0, 1]]),
    ),
    (
        TypeError,
        "page_table must hold integers; got float64",
        lambda: empty("paged").with_tables([[0.5]], [0]),
    ),
    (
        ValueError,
        "source and target must have one shape [C]; got (2,) and (1,)",
        lambda: empty("paged").copy_page([0, 1], [2]),
    ),
    # the allocator
    (ValueError, "pages must be positive; got 0", lambda: PageAllocator(0, 16)),
    (
        ValueError,
        "page_size must be one of (16, 32, 64, 128, 256); got 8",
        lambda: PageAllocator(4, 8),
    ),
    (
        ValueError,
        "tokens must not be negative; got -1",
        lambda: PageAllocator(4, 16).allocate(-1),
    ),
    (
        TypeError,
        "tokens must be an int; got True (bool)",
        lambda: PageAllocator(4, 16).allocate(True),
    ),
    (
        OutOfPages,
        "5 pages of 16 tokens are needed, and 4 of 4 are free; free a sequence, or build the "
        "cache and its allocator with more pages",
        lambda: PageAllocator(4, 16).allocate(65),
    ),
    *(
        (
            ValueError,
            "sequence 3 was freed or never allocated; 0 sequences are held, pass a number that "
            "allocate or fork returned",
            call,
        )
        for call in (
            lambda: PageAllocator(4, 16).free(3),
            lambda: PageAllocator(4, 16).fork(3),
            lambda: PageAllocator(4, 16).extend(3, 1),
            lambda: PageAllocator(4, 16).table([3], 1),
            lambda: PageAllocator(4, 16).lengths([3]),
        )
    ),
]


@pytest.mark.parametrize(("error", "message", "call"), _WRONG)
def test_wrong_call(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda: (call(), None)[1])
