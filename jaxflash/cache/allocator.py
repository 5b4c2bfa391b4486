"""Which sequence owns which pages: a list of free pages and a reference count for each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jaxflash import checks


class OutOfPages(RuntimeError):
    """More pages are needed than are free; nothing was changed."""


@dataclass
class _Held:
    pages: list[int]
    tokens: int


class PageAllocator:
    """Hands out the pages of a ``PagedKVCache`` on the host.

    A page belongs to one sequence, or to several that share the tokens in it after ``fork``. It is
    handed out again when the last of them has been freed.

    Args:
      pages: pages P of the cache.
      page_size: tokens in a page: 16, 32, 64, 128 or 256.

    Raises:
      ValueError, TypeError: a size is wrong.

    Example:
      >>> from jaxflash.cache import PageAllocator
      >>> allocator = PageAllocator(pages=8, page_size=16)
      >>> prompt = allocator.allocate(20)
      >>> other = allocator.fork(prompt)
      >>> allocator.extend(other, 1)  # the second page is shared, and partly filled
      [(1, 2)]
      >>> allocator.table([prompt, other], max_pages=3)
      array([[ 0,  1, -1],
             [ 0,  2, -1]], dtype=int32)
      >>> allocator.lengths([prompt, other])
      array([20, 21], dtype=int32)
    """

    def __init__(self, pages: int, page_size: int) -> None:
        self._pages = checks.size("pages", pages)
        self._page_size = checks.page_size(page_size)
        self._free = list(reversed(range(self._pages)))
        self._owners: Counter[int] = Counter()
        self._held: dict[int, _Held] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds.

        Example:
          >>> PageAllocator(pages=8, page_size=16).free_pages
          8
        """
        return len(self._free)

    def allocate(self, tokens: int) -> int:
        """A new sequence with pages for some tokens.

        Args:
          tokens: how many; 0 takes no page.

        Returns:
          The number of the sequence; no number is used twice.

        Raises:
          OutOfPages: too few pages are free.
          ValueError, TypeError: ``tokens`` is negative, or no int.

        Example:
          >>> PageAllocator(pages=8, page_size=16).allocate(20)
          0
        """
        tokens = checks.count("tokens", tokens)
        return self._add(_Held(self._take(self._pages_for(tokens)), tokens))

    def extend(self, sequence: int, tokens: int) -> list[tuple[int, int]]:
        """Makes room for more tokens after those of a sequence.

        If they start in a page that is shared, the sequence gets its own copy of that page.

        Args:
          sequence: its number.
          tokens: how many more.

        Returns:
          Pairs (source, target) of pages, for ``PagedKVCache.copy_page`` before the next tokens
          are written. Empty unless a page that is partly filled was shared.

        Raises:
          OutOfPages: too few pages are free.
          ValueError, TypeError: the sequence is unknown, or ``tokens`` is negative or no int.

        Example:
          >>> allocator = PageAllocator(pages=8, page_size=16)
          >>> allocator.extend(allocator.allocate(16), 1)
          []
        """
        held, tokens = self._get(sequence), checks.count("tokens", tokens)
        filled = held.tokens % self._page_size
        must_copy = tokens > 0 and filled > 0 and self._owners[held.pages[-1]] > 1
        grown = self._pages_for(held.tokens + tokens) - len(held.pages)
        taken = self._take(grown + must_copy)
        held.tokens += tokens
        if not must_copy:
            held.pages += taken
            return []
        shared = held.pages.pop()
        self._release(shared)
        held.pages += taken
        return [(shared, taken[0])]

    def fork(self, sequence: int) -> int:
        """A new sequence that shares every page of another, and holds as many tokens.

        What the pages hold is shared when it is written before the fork: write the tokens that
        were made room for first.

        Args:
          sequence: its number.

        Returns:
          The number of the new sequence. It takes no page.

        Raises:
          ValueError: the sequence is unknown.

        Example:
          >>> allocator = PageAllocator(pages=8, page_size=16)
          >>> allocator.fork(allocator.allocate(20)), allocator.free_pages
          (1, 6)
        """
        held = self._get(sequence)
        self._owners.update(held.pages)
        return self._add(_Held(list(held.pages), held.tokens))

    def free(self, sequence: int) -> None:
        """Gives up a sequence; the pages that no other shares become free.

        Args:
          sequence: its number.

        Raises:
          ValueError: the sequence is unknown, or was freed already.

        Example:
          >>> allocator = PageAllocator(pages=8, page_size=16)
          >>> allocator.free(allocator.allocate(20))
          >>> allocator.free_pages
          8
        """
        for page in self._get(sequence).pages:
            self._release(page)
        del self._held[sequence]

    def table(self, sequences: Sequence[int], max_pages: int) -> Int32[np.ndarray, "B M"]:
        """The pages of some sequences, for ``PagedKVCache.with_tables``.

        Args:
          sequences: their numbers, B of them.
          max_pages: columns M.

        Returns:
          int32 ``[B, M]``; page m holds tokens from ``m * page_size`` on. -1 where there is none.

        Raises:
          ValueError, TypeError: a sequence is unknown or has more pages, or ``max_pages`` is no
            positive int.

        Example:
          >>> allocator = PageAllocator(pages=8, page_size=16)
          >>> allocator.table([allocator.allocate(20)], max_pages=4)
          array([[ 0,  1, -1, -1]], dtype=int32)
        """
        table = np.full((len(sequences), checks.size("max_pages", max_pages)), -1, np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            pages = self._get(sequence).pages
            if len(pages) > max_pages:
                raise ValueError(
                    f"sequence {sequence} has {len(pages)} pages, more than {max_pages=}; build "
                    "the cache with a larger max_pages"
                )
            row[: len(pages)] = pages
        return table

    def lengths(self, sequences: Sequence[int]) -> Int32[np.ndarray, "B"]:
        """How many tokens some sequences have room for, as allocated and extended.

        Args:
          sequences: their numbers, B of them.

        Returns:
          int32 ``[B]``.

        Raises:
          ValueError: a sequence is unknown.

        Example:
          >>> allocator = PageAllocator(pages=8, page_size=16)
          >>> allocator.lengths([allocator.allocate(20)])
          array([20], dtype=int32)
        """
        return np.array([self._get(sequence).tokens for sequence in sequences], np.int32)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPages(
                f"{count} pages of {self._page_size} tokens are needed, and {len(self._free)} of "
                f"{self._pages} are free; free a sequence, or build the cache and its allocator "
                "with more pages"
            )
        taken = [self._free.pop() for _ in range(count)]
        self._owners.update(taken)
        return taken

    def _release(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            del self._owners[page]
            self._free.append(page)

    def _add(self, held: _Held) -> int:
        sequence, self._next = self._next, self._next + 1
        self._held[sequence] = held
        return sequence

    def _get(self, sequence: int) -> _Held:
        if sequence not in self._held:
            raise ValueError(
                f"sequence {sequence!r} was freed or never allocated; {len(self._held)} sequences "
                "are held, pass a number that allocate or fork returned"
            )
        return self._held[sequence]
