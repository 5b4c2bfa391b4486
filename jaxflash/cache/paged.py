"""A cache in pages that sequences take as they grow, and may share."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Float32, Int32

from jaxflash import checks
from jaxflash.cache import pages, rounding, tokens
from jaxflash.cache.rules import enforce, integers

_REMEDY = "give page_table more columns (max_pages)"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class PagedKVCache:
    """Keys and values of B sequences in P pages that any of them may use; a pytree.

    Token t of sequence b lies in page ``page_table[b, t // page_size]``, at ``t % page_size``. Who
    owns which page is for ``PageAllocator`` to say; two sequences may share a page that neither
    writes. Negative entries of the table, and those past the last page, mean no page.

    Pages of 8 bits, float8_e4m3fn or int8, hold numbers to be multiplied with the scale that their
    page has for their head. ``append`` finds it, a power of two: where a new token is too large for
    it, it grows, and what the page holds is rounded again. Infinities are as large as the page's
    largest number then; NaN stays, but int8 has none and holds 0.

    Args:
      key_pages: ``[P, page_size, K, H]``; bfloat16, float16, float32, float64, float8_e4m3fn or
        int8; pages of 16, 32, 64, 128 or 256 tokens.
      value_pages: ``[P, page_size, K, Hv]``.
      page_table: int32 ``[B, M]``. Entries that hold none of a sequence's tokens may be anything;
        -1 by convention.
      lengths: int32 ``[B]``; the tokens that each sequence holds.
      key_scale: float32 ``[P, K]``, of pages of 8 bits; None of others.
      value_scale: likewise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxflash.cache import PageAllocator, PagedKVCache
      >>> append = jax.jit(PagedKVCache.append, donate_argnums=0)
      >>> cache = PagedKVCache.zeros(8, 16, 4, 16, batch=2, max_pages=3, dtype=jnp.float32)
      >>> allocator = PageAllocator(pages=8, page_size=16)
      >>> sequences = [allocator.allocate(20), allocator.allocate(20)]
      >>> prompt = jnp.ones((2, 20, 4, 16))
      >>> cache = append(cache.with_tables(allocator.table(sequences, 3)), prompt, prompt)
      >>> copies = [pair for s in sequences for pair in allocator.extend(s, 1)]
      >>> copies  # to be made with copy_page; there are some after allocator.fork
      []
      >>> token = jnp.ones((2, 1, 4, 16))
      >>> append(cache.with_tables(allocator.table(sequences, 3)), token, token).lengths
      Array([21, 21], dtype=int32)

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention" (2023), section 4.
    """

    key_pages: Float[Array, "P page_size K H"]
    value_pages: Float[Array, "P page_size K Hv"]
    page_table: Int32[Array, "B M"]
    lengths: Int32[Array, "B"]
    key_scale: Float32[Array, "P K"] | None = None
    value_scale: Float32[Array, "P K"] | None = None

    @classmethod
    def zeros(
        cls,
        pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        batch: int,
        max_pages: int,
        value_dim: int | None = None,
        dtype: Any,
    ) -> "PagedKVCache":
        """An empty cache in which no sequence has a page.

        Args:
          pages: pages P, of all sequences together.
          page_size: tokens in a page: 16, 32, 64, 128 or 256.
          kv_heads: as for ``KVCache.zeros``, like ``head_dim`` and ``value_dim``.
          head_dim: likewise.
          batch: sequences B.
          max_pages: pages M that one sequence may use.
          value_dim: likewise.
          dtype: of keys and values; bfloat16, float16, float32, float64, float8_e4m3fn or int8.

        Returns:
          A cache of zeros, every length 0, every entry of the table -1.

        Raises:
          ValueError, TypeError: a size is no positive int or no page size, or the dtype is
            another.

        Example:
          >>> PagedKVCache.zeros(
          ...     8, 16, 4, 16, batch=2, max_pages=3, dtype=jnp.bfloat16
          ... ).key_pages.shape
          (8, 16, 4, 16)
        """
        rows = checks.size("pages", pages), checks.page_size(page_size)
        K, H = checks.size("kv_heads", kv_heads), checks.size("head_dim", head_dim)
        Hv = H if value_dim is None else checks.size("value_dim", value_dim)
        B, M = checks.size("batch", batch), checks.size("max_pages", max_pages)
        dtype = checks.page_dtype("dtype", dtype)

        def scale() -> Array | None:
            return jnp.zeros((rows[0], K), jnp.float32) if dtype in checks.NARROW else None

        return cls(
            key_pages=jnp.zeros((*rows, K, H), dtype),
            value_pages=jnp.zeros((*rows, K, Hv), dtype),
            page_table=jnp.full((B, M), -1, jnp.int32),
            lengths=jnp.zeros(B, jnp.int32),
            key_scale=scale(),
            value_scale=scale(),
        )

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.key_pages.shape[1]

    @property
    def capacity(self) -> int:
        """Tokens that one sequence has room for in the table, M * page_size."""
        return self.page_table.shape[1] * self.page_size

    def append(
        self,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int32[ArrayLike, "B"] | None = None,
        *,
        debug_checks: bool = False,
    ) -> "PagedKVCache":
        """The cache with new tokens after those it holds: a prompt, a chunk, or one token.

        Under jit with the cache donated, the new tokens are written in place. Nothing else is, but
        the rest of their pages where those have 8 bits: a token without a page, and those of its
        sequence after it, are dropped and not counted.

        Args:
          key: ``[B, T, K, H]`` in the cache's dtype; for one of 8 bits in any floating dtype.
          value: ``[B, T, K, Hv]`` likewise.
          counts: int32 ``[B]``; sequence b gets the first ``counts[b]`` of its T tokens; all of
            them by default.
          debug_checks: check at run time that counts lie in [0, T] and that each token has a page.

        Returns:
          The new cache, with the lengths grown by the tokens written.

        Raises:
          ValueError, TypeError, jax.errors.JaxRuntimeError: as ``KVCache.append``.

        Example:
          >>> cache = PagedKVCache.zeros(8, 16, 1, 8, batch=1, max_pages=3, dtype=jnp.float32)
          >>> x = jnp.ones((1, 40, 1, 8))
          >>> cache.with_tables([[6, 2, -1]]).append(x, x).lengths
          Array([32], dtype=int32)
        """
        checks.flag("debug_checks", debug_checks)
        self._check()
        held = self.key_pages, self.value_pages
        B = len(self.lengths)
        new = tokens.new_tokens(key, value, B, held)
        T = new[0].shape[1]
        wanted = tokens.counted(counts, B, T, self.capacity, _REMEDY)
        rules = tokens.count_rules(self.lengths, wanted, T, self.capacity, _REMEDY)
        lengths = enforce(self.lengths, *rules, debug_checks=debug_checks)
        steps = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        count = tokens.fitting(lengths, wanted, T, self.capacity)  # [B]
        position = lengths[:, None] + steps  # [B, T]
        page, exists = pages.find(self.page_table, position, len(held[0]), self.page_size)
        rule = pages.has_page(steps < count[:, None], exists, position)
        exists = enforce(exists, rule, debug_checks=debug_checks)
        hole = jnp.min(steps, axis=1, where=~exists, initial=T)  # first without a page
        count = jnp.minimum(count, hole)
        sequences = self.page_table, lengths + count
        if self.key_scale is None or self.value_scale is None:
            is_written = steps < count[:, None]
            held = pages.write(held, new, page, position % self.page_size, is_written)
            return PagedKVCache(*held, *sequences)
        where = self.page_table, lengths, count
        key_pages, key_scale = rounding.append(held[0], self.key_scale, new[0], *where)
        value_pages, value_scale = rounding.append(held[1], self.value_scale, new[1], *where)
        return PagedKVCache(key_pages, value_pages, *sequences, key_scale, value_scale)

    def gather(
        self, *, debug_checks: bool = False
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Each sequence's tokens in one run of memory, S = M * page_size.

        Args:
          debug_checks: check at run time that every token held has a page.

        Returns:
          Key ``[B, S, K, H]`` and value ``[B, S, K, Hv]``, zero from each length on and where
          there is no page; of pages of 8 bits what they stand for, in float32.

        Raises:
          ValueError, TypeError, jax.errors.JaxRuntimeError: as ``KVCache.append``.

        Example:
          >>> cache = PagedKVCache.zeros(8, 16, 1, 8, batch=2, max_pages=3, dtype=jnp.float32)
          >>> key, value = cache.gather()
          >>> key.shape
          (2, 48, 1, 8)
        """
        checks.flag("debug_checks", debug_checks)
        self._check()
        rules = self._table_rules(self.page_table, self.lengths)
        lengths = enforce(self.lengths, *rules, debug_checks=debug_checks)
        held = (self.key_pages, self.key_scale), (self.value_pages, self.value_scale)
        key, value = (pages.contiguous(x, self.page_table, lengths, scale) for x, scale in held)
        return key, value

    def with_tables(
        self,
        page_table: Int32[ArrayLike, "B M"],
        lengths: Int32[ArrayLike, "B"] | None = None,
        *,
        debug_checks: bool = False,
    ) -> "PagedKVCache":
        """The same pages under another table, which may have another B and M.

        Args:
          page_table: int32 ``[B, M]``, as ``PageAllocator.table`` returns it.
          lengths: int32 ``[B]``, the tokens that each sequence holds; unchanged by default. (The
            allocator's lengths count tokens that are still to be appended, too.)
          debug_checks: check at run time that lengths fit the table, and that every token held
            has a page.

        Returns:
          The cache with that table.

        Raises:
          ValueError, TypeError, jax.errors.JaxRuntimeError: as ``KVCache.append``. Arrays that
            are no JAX arrays are always checked.

        Example:
          >>> cache = PagedKVCache.zeros(8, 16, 1, 8, batch=2, max_pages=3, dtype=jnp.float32)
          >>> cache.with_tables([[5, 2], [5, 7]], lengths=[32, 20]).capacity
          32
        """
        checks.flag("debug_checks", debug_checks)
        self._check()
        table = integers("page_table", page_table)
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(
                f"page_table must have shape [B, M], not empty; got shape {table.shape}"
            )
        held = self.lengths if lengths is None else integers("lengths", lengths)
        checks.shaped("lengths", held, table.shape[:1], "[B] of page_table")
        held = enforce(held, *self._table_rules(table, held), debug_checks=debug_checks)
        # Copies, so that donating the cache takes nothing from the caller.
        return replace(self, page_table=jnp.array(table), lengths=jnp.array(held))

    def copy_page(
        self,
        source: Int32[ArrayLike, "C"],
        target: Int32[ArrayLike, "C"],
        *,
        debug_checks: bool = False,
    ) -> "PagedKVCache":
        """Copies whole pages, one after the other; in place under jit with the cache donated.

        Args:
          source: int32 ``[C]``, the pages to copy.
          target: int32 ``[C]``, where to; a pair of two -1 is skipped, for fixed shapes under jit.
          debug_checks: check at run time that the pages exist. A pair with one that does not is
            skipped otherwise.

        Returns:
          The cache with those pages copied.

        Raises:
          ValueError, TypeError, jax.errors.JaxRuntimeError: as ``KVCache.append``. Arrays that
            are no JAX arrays are always checked.

        Example:
          >>> cache = PagedKVCache.zeros(8, 16, 1, 8, batch=2, max_pages=3, dtype=jnp.float32)
          >>> copies = [(1, 2), (4, 5)]  # from PageAllocator.extend
          >>> cache = cache.copy_page(*zip(*copies))
        """
        checks.flag("debug_checks", debug_checks)
        self._check()
        pair = integers("source", source), integers("target", target)
        if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
            raise ValueError(
                "source and target must have one shape [C]; got "
                f"{pair[0].shape} and {pair[1].shape}"
            )
        P = len(self.key_pages)
        exists = (pair[0] >= 0) & (pair[0] < P) & (pair[1] >= 0) & (pair[1] < P)
        rule = pages.copy_rule(*pair, exists, P)
        exists = enforce(exists, rule, debug_checks=debug_checks)
        names = ["key_pages", "value_pages", "key_scale", "value_scale"]
        held = {name: getattr(self, name) for name in names[: 2 if self.key_scale is None else 4]}
        copied = pages.copy(tuple(held.values()), *pair, exists)
        return replace(self, **dict(zip(held, copied, strict=True)))

    def _table_rules(self, page_table: Any, lengths: Any) -> Any:
        return pages.table_rules(page_table, lengths, len(self.key_pages), self.page_size, _REMEDY)

    def _check(self) -> None:
        axes = "[P, page_size, K, H]", "[P, page_size, K, Hv]"
        tokens.check_held("_pages", self.key_pages, self.value_pages, axes, checks.page_dtype)
        checks.scales(self.key_pages, self.value_pages, self.key_scale, self.value_scale)
        checks.page_size(self.page_size)
        checks.int32("page_table", self.page_table)
        checks.int32("lengths", self.lengths)
        if self.page_table.ndim != 2 or self.page_table.shape[:1] != self.lengths.shape:
            raise ValueError(
                "page_table and lengths must have shapes [B, M] and [B]; got "
                f"{self.page_table.shape} and {self.lengths.shape}"
            )
