"""Continuous batching: requests of random lengths over a cache in pages, or over a contiguous one.

A server has slots, one for each request that is being answered. A request waits until a slot is
free, and pages for all that it may come to hold; its prompt is prefilled in chunks, by itself; then
its slot decodes together with all others, so many steps at a time. A slot without a request decodes
too, in vain.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxflash
from bench.models.config import Config
from bench.models.generate import Caches, Model, contiguous_caches, decode, paged_caches


class Request(NamedTuple):
    """A prompt, and how many tokens are wanted."""

    prompt: np.ndarray  # [T] int32
    tokens: int

    @property
    def held(self) -> int:
        """Tokens of the cache that it may take."""
        return len(self.prompt) + self.tokens


class Memory(NamedTuple):
    """How the memory of keys and values is divided."""

    slots: int
    capacity: int  # tokens that a request may take
    pages: int | None  # of all slots together; None: each slot has its capacity to itself
    page_size: int = 64
    dtype: str = "bfloat16"  # of keys and values


class Served(NamedTuple):
    """What came of it."""

    answers: list[np.ndarray]  # of each request, in their order
    seconds: float
    users: float  # requests that were in work at a time, on average over the rounds


class Server:
    """Answers requests with one model.

    Args:
      model: its structure and parameters.
      config: its sizes.
      memory: slots and pages.
      chunk: tokens of a prompt that are prefilled at once.
      steps: tokens of each request that are decoded before others may come in.
    """

    def __init__(
        self,
        model: Model,
        config: Config,
        memory: Memory,
        *,
        chunk: int = 512,
        steps: int = 8,
    ) -> None:
        self._model, self._memory, self._chunk, self._steps = model, memory, chunk, steps
        self._max_pages = -(-memory.capacity // memory.page_size)
        slots, dtype = memory.slots, jnp.dtype(memory.dtype)
        if memory.pages is None:
            self._caches = contiguous_caches(config, slots, memory.capacity, dtype)
            self._allocator = None
        else:
            self._caches = paged_caches(
                config, slots, memory.pages, self._max_pages, memory.page_size, dtype
            )
            self._allocator = jaxflash.PageAllocator(memory.pages, memory.page_size)
        self._logits = jnp.zeros((slots, config.vocabulary), jnp.float32)

    def serve(self, requests: Sequence[Request]) -> Served:
        """Answers all of them, in the order in which they can be taken in."""
        start = time.perf_counter()
        waiting = collections.deque(enumerate(requests))
        slots: list[_Slot | None] = [None] * self._memory.slots
        answers: list[Any] = [None] * len(requests)
        in_work = []
        while waiting or any(slots):
            for i in range(len(slots)):
                if slots[i] is None and waiting and self._has_room(waiting[0][1]):
                    slots[i] = self._admit(i, *waiting.popleft())
            if not any(slots):
                raise ValueError(f"no room for a request of {waiting[0][1].held} tokens")
            in_work.append(sum(slot is not None for slot in slots))
            tokens = self._round(slots)
            for i, slot in enumerate(slots):
                if slot is not None and slot.take(tokens[i]):
                    answers[slot.number] = np.array(slot.answer, np.int32)
                    self._release(slot)
                    slots[i] = None
        return Served(answers, time.perf_counter() - start, float(np.mean(in_work)))

    def _has_room(self, request: Request) -> bool:
        if request.held > self._memory.capacity:
            raise ValueError(
                f"a request of {request.held} tokens exceeds the capacity of "
                f"{self._memory.capacity}"
            )
        if self._allocator is None:
            return True
        return -(-request.held // self._memory.page_size) <= self._allocator.free_pages

    def _admit(self, index: int, number: int, request: Request) -> _Slot:
        """Prefills a prompt."""
        slot = _Slot(number, request, len(request.prompt))
        table = None
        if self._allocator is not None:
            slot.sequence = self._allocator.allocate(request.held)
            table = self._allocator.table([slot.sequence], self._max_pages)
        for first in range(0, len(request.prompt), self._chunk):
            part = request.prompt[first : first + self._chunk]
            padded = np.zeros((1, self._chunk), np.int32)
            padded[0, : len(part)] = part
            self._logits, self._caches = _prefill_slot(
                *self._model,
                self._caches,
                self._logits,
                padded,
                np.array([len(part)], np.int32),
                table,
                np.array([first], np.int32),
                np.int32(index),
            )
        return slot

    def _round(self, slots: Sequence[_Slot | None]) -> np.ndarray:
        """Tokens [slots, steps] of all slots."""
        lengths = np.array([0 if s is None else s.held for s in slots], np.int32)
        tables = None
        if self._allocator is not None:
            tables = np.full((len(slots), self._max_pages), -1, np.int32)
            for table, slot in zip(tables, slots, strict=True):
                if slot is not None and slot.sequence is not None:
                    table[:] = self._allocator.table([slot.sequence], self._max_pages)[0]
        caches = _installed(self._caches, tables, lengths)
        tokens, self._logits, self._caches = decode(
            *self._model, caches, self._logits, jax.random.key(0), self._steps
        )
        return np.asarray(tokens)

    def _release(self, slot: _Slot) -> None:
        if self._allocator is not None and slot.sequence is not None:
            self._allocator.free(slot.sequence)


class _Slot:
    """A request that is being answered."""

    def __init__(self, number: int, request: Request, held: int) -> None:
        self.number, self.request, self.held = number, request, held
        self.sequence: int | None = None
        self.answer: list[int] = []

    def take(self, tokens: np.ndarray) -> bool:
        """Takes new tokens; whether the answer is complete."""
        self.answer += tokens[: self.request.tokens - len(self.answer)].tolist()
        self.held += len(tokens)
        return len(self.answer) == self.request.tokens


def _installed(caches: Caches, tables: np.ndarray | None, lengths: np.ndarray) -> Caches:
    """Caches with the host's idea of who holds what."""
    return _replace(caches, None if tables is None else jnp.asarray(tables), jnp.asarray(lengths))


@functools.partial(jax.jit, donate_argnums=0)
def _replace(caches: Caches, tables: jax.Array | None, lengths: jax.Array) -> Caches:
    def each(cache: Any) -> Any:
        if tables is None:
            return jaxflash.KVCache(cache.key, cache.value, lengths)
        return cache.with_tables(tables, lengths)

    return tuple(map(each, caches))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _prefill_slot(
    structure: Any,
    parameters: Any,
    caches: Caches,
    logits: jax.Array,  # [slots, vocabulary]
    tokens: jax.Array,  # [1, chunk]
    count: jax.Array,  # [1]
    table: jax.Array | None,  # [1, max_pages]
    held: jax.Array,  # [1]
    slot: jax.Array,  # []
) -> tuple[jax.Array, Caches]:
    """A chunk of a prompt into one slot; the logits after it."""

    def take(cache: Any) -> Any:
        if isinstance(cache, jaxflash.PagedKVCache):  # the same pages, under one table
            assert table is not None
            return cache.with_tables(table, held)
        key, value = (jax.lax.dynamic_slice_in_dim(x, slot, 1) for x in (cache.key, cache.value))
        return jaxflash.KVCache(key, value, held)

    def put(cache: Any, part: Any) -> Any:
        if isinstance(cache, jaxflash.PagedKVCache):
            return part.with_tables(cache.page_table, cache.lengths)
        key, value = (
            jax.lax.dynamic_update_slice_in_dim(x, y, slot, 0)
            for x, y in ((cache.key, part.key), (cache.value, part.value))
        )
        return jaxflash.KVCache(key, value, cache.lengths)

    model = nnx.merge(structure, parameters)
    found, parts = model.extend(tokens, tuple(map(take, caches)), count)
    logits = jax.lax.dynamic_update_slice_in_dim(logits, found, slot, 0)
    return logits, tuple(map(put, caches, parts))


def random_requests(
    count: int, vocabulary: int, prompts: tuple[int, int], tokens: tuple[int, int], seed: int = 0
) -> list[Request]:
    """Prompts and answers of lengths that are uniform in two ranges, ends included."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(0, vocabulary, rng.integers(*prompts, endpoint=True)).astype(np.int32),
            int(rng.integers(*tokens, endpoint=True)),
        )
        for _ in range(count)
    ]
