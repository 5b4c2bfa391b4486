"""The allocator hands out no page twice, and sequences hold their tokens whatever happens."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxflash.cache import OutOfPages, PageAllocator, PagedKVCache


def test_copy_on_write_copies_only_a_shared_partly_filled_page() -> None:
    pool = PageAllocator(pages=8, page_size=16)
    prompt = pool.allocate(20)
    full = pool.allocate(16)
    a, b, c = pool.fork(prompt), pool.fork(prompt), pool.fork(full)
    assert pool.free_pages == 5
    assert pool.extend(prompt, 0) == []
    assert pool.extend(c, 1) == []  # starts a page of its own
    assert pool.extend(a, 13) == [(1, 4)]  # 20 + 13 tokens: the copy and a page
    assert pool.extend(a, 1) == []
    assert pool.extend(b, 1) == [(1, 6)]
    assert pool.extend(prompt, 1) == []  # no longer shared
    np.testing.assert_array_equal(
        pool.table([prompt, full, a, b, c], 3),
        [[0, 1, -1], [2, -1, -1], [0, 4, 5], [0, 6, -1], [2, 3, -1]],
    )
    assert pool.lengths([prompt, full, a, b, c]).tolist() == [21, 16, 34, 21, 17]


def test_a_full_pool_changes_nothing() -> None:
    pool = PageAllocator(pages=3, page_size=16)
    first = pool.allocate(20)
    second = pool.fork(first)
    before = pool.table([first, second], 3), pool.lengths([first, second])
    for call in (lambda: pool.allocate(17), lambda: pool.extend(second, 13)):
        with pytest.raises(OutOfPages, match="2 pages of 16 tokens are needed, and 1 of 3 are"):
            call()
        np.testing.assert_array_equal(pool.table([first, second], 3), before[0])
        np.testing.assert_array_equal(pool.lengths([first, second]), before[1])
        assert pool.free_pages == 1
    pool.free(first)
    assert pool.free_pages == 1
    assert pool.extend(second, 13) == []
    pool.free(second)
    assert pool.free_pages == 3
    with pytest.raises(ValueError, match="sequence 0 was freed or never allocated"):
        pool.free(first)


def test_table_must_have_room() -> None:
    pool = PageAllocator(pages=3, page_size=16)
    with pytest.raises(ValueError, match="sequence 0 has 2 pages, more than max_pages=1; build"):
        pool.table([pool.allocate(17)], 1)


# 10,000 random operations against a dict of lists

_POOL, _SIZE, _ROOM, _MOST, _T = 24, 16, 6, 12, 40


@partial(jax.jit, donate_argnums=0)
def _write(cache: Any, copies: Any, table: Any, lengths: Any, tokens: Any, count: Any) -> Any:
    """One sequence's copies, then its new tokens."""
    cache = cache.copy_page(copies[:, 0], copies[:, 1]).with_tables(table, lengths)
    new = tokens[None, :, None, None]
    return cache.append(new, -new, count)


@partial(jax.jit, donate_argnums=0)
def _poison(cache: Any, pages: Any) -> Any:
    """NaN in pages that became free."""
    spoil = lambda x: x.at[pages].set(jnp.nan, mode="drop")  # noqa: E731
    return PagedKVCache(
        spoil(cache.key_pages), spoil(cache.value_pages), cache.page_table, cache.lengths
    )


@jax.jit
def _read(cache: Any, table: Any, lengths: Any) -> Any:
    return tuple(x[..., 0, 0] for x in cache.with_tables(table, lengths).gather())


class _Machine:
    """An allocator and a cache, and beside them the tokens that each sequence should hold."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.pool = PageAllocator(_POOL, _SIZE)
        zeros = PagedKVCache.zeros(_POOL, _SIZE, 1, 1, batch=1, max_pages=_ROOM, dtype="float32")
        self.cache = _poison(zeros, np.arange(_POOL))
        self.model: dict[int, list[int]] = {}
        self.written = 0
        self.refused = 0

    def any_sequence(self) -> int:
        return int(self.random.choice(list(self.model)))

    def step(self) -> None:
        choices = ["allocate", "extend", "extend", "extend", "fork", "free"]
        choice = self.random.choice(choices) if self.model else "allocate"
        if choice in ("allocate", "fork") and len(self.model) == _MOST:
            choice = "free"
        free, before = self.pool.free_pages, self.tables()
        try:
            getattr(self, choice)()
        except OutOfPages as error:
            self.refused += 1
            needed = int(str(error).split()[0])
            assert needed > free == self.pool.free_pages
            for x, y in zip(before, self.tables(), strict=True):
                np.testing.assert_array_equal(x, y)

    def allocate(self) -> None:
        count = int(self.random.integers(0, _T + 1))
        sequence = self.pool.allocate(count)
        assert sequence not in self.model
        self.model[sequence] = []
        self.append(sequence, count, [])

    def extend(self) -> None:
        sequence = self.any_sequence()
        most = min(_T, _ROOM * _SIZE - len(self.model[sequence]))
        count = int(self.random.integers(0, self.random.choice([1, most]) + 1)) if most else 0
        self.append(sequence, count, self.pool.extend(sequence, count))

    def fork(self) -> None:
        sequence = self.any_sequence()
        self.model[self.pool.fork(sequence)] = list(self.model[sequence])

    def free(self) -> None:
        sequence = self.any_sequence()
        pages = set(self.pool.table([sequence], _ROOM).ravel().tolist())
        self.pool.free(sequence)
        del self.model[sequence]
        unused = pages - {-1} - set(self.tables()[0].ravel().tolist())
        padded = np.full(_ROOM, _POOL, np.int32)
        padded[: len(unused)] = sorted(unused)
        self.cache = _poison(self.cache, padded)

    def append(self, sequence: int, count: int, copies: list[tuple[int, int]]) -> None:
        held = self.model[sequence]
        assert len(copies) <= 1
        new = range(self.written, self.written + count)
        self.written += count
        tokens = np.zeros(_T, np.float32)
        tokens[:count] = new
        self.cache = _write(
            self.cache,
            np.array(copies or [(-1, -1)], np.int32),
            self.pool.table([sequence], _ROOM),
            np.array([len(held)], np.int32),
            tokens,
            np.array([count], np.int32),
        )
        held.extend(new)

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        sequences = list(self.model)
        return self.pool.table(sequences, _ROOM), self.pool.lengths(sequences)

    def check_pages(self) -> None:
        """A page is held by sequences that hold the same tokens in it, or it is free."""
        table, lengths = self.tables()
        assert lengths.tolist() == [len(tokens) for tokens in self.model.values()]
        content: dict[int, list[int]] = {}
        for row, tokens in zip(table, self.model.values(), strict=True):
            pages = row[row >= 0].tolist()
            assert len(pages) == -(-len(tokens) // _SIZE)
            for m, page in enumerate(pages):
                run = tokens[m * _SIZE : (m + 1) * _SIZE]
                assert content.setdefault(page, run) == run
        assert self.pool.free_pages == _POOL - len(content)

    def check_tokens(self) -> None:
        """Every sequence, with idle rows that hold nothing."""
        table, lengths = np.full((_MOST, _ROOM), -1, np.int32), np.zeros(_MOST, np.int32)
        table[: len(self.model)], lengths[: len(self.model)] = self.tables()
        key, value = map(np.asarray, _read(self.cache, table, lengths))
        expected = np.zeros(key.shape, np.float32)
        for row, tokens in zip(expected, self.model.values(), strict=False):
            row[: len(tokens)] = tokens
        np.testing.assert_array_equal(key, expected)
        np.testing.assert_array_equal(value, -expected)


def test_random_operations() -> None:
    machine = _Machine(seed=0)
    for i in range(10_000):
        machine.step()
        machine.check_pages()
        if i % 2 == 0:
            machine.check_tokens()
    assert machine.refused > 100
    assert machine.written < 2**24  # exact in float32
