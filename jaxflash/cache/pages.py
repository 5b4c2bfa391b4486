"""What a paged cache does on arrays: find the page of a token, write, gather and copy pages."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxflash.cache import tokens
from jaxflash.cache.rules import Rule
from pallas_kernels.spec import narrow

Pages = tuple[Any, ...]  # of arrays [P, page_size, K, _], or [P, K]


def find(
    page_table: Int32[Array, "B M"], position: Int32[Array, "B T"], pages: int, page_size: int
) -> tuple[Int32[Array, "B T"], Bool[Array, "B T"]]:
    """The page of the token at each position, and whether it is one of the pages there are."""
    page = jnp.take_along_axis(page_table, position // page_size, axis=1)
    return page, (page >= 0) & (page < pages)


def write(
    held: Pages,
    new: tuple[Float[Array, "B T K _"], ...],
    page: Int32[Array, "B T"],
    slot: Int32[Array, "B T"],
    is_written: Bool[Array, "B T"],
) -> Pages:
    """Pages with new tokens, each at a slot of a page."""
    # Page P is past the end: a token there is dropped.
    return tokens.write(held, new, jnp.where(is_written, page, len(held[0])), slot)


def contiguous(
    pages: Float[Array, "P page_size K H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, "B"],
    scales: Float32[Array, "P K"] | None = None,
) -> Float[Array, "B S K H"]:
    """Each sequence's tokens, zero from its length on and where there is no page.

    With scales, what 8-bit numbers stand for, in float32.
    """
    P, page_size, K, H = pages.shape
    B, M = page_table.shape
    page = jnp.where(page_table < 0, P, page_table)  # a negative index would count from the end
    x = pages.at[page].get(mode="fill", fill_value=0)  # [B, M, page_size, K, H]
    if scales is not None:
        of_pages = scales.at[page].get(mode="fill", fill_value=0)  # [B, M, K]
        x = narrow.widen(x, of_pages)
    is_held = jnp.arange(M * page_size, dtype=jnp.int32) < lengths[:, None]  # [B, S]
    return jnp.where(is_held[..., None, None], x.reshape(B, M * page_size, K, H), 0)


def copy(
    held: Pages, source: Int32[Array, "C"], target: Int32[Array, "C"], exists: Bool[Array, "C"]
) -> Pages:
    """Pages copied one after the other: a later pair may start from where an earlier one ended.

    That costs 7 us a page (2 x 128 KiB, H100). All at once, 64 pages took 100 us in place of 470,
    but what a chain of copies gives, or two copies to one page, would depend on the split of calls.
    """
    target = jnp.where(exists, target, len(held[0]))
    source = jnp.where(exists, source, 0)

    def step(held: Pages, pair: tuple[Array, Array]) -> tuple[Pages, None]:
        page, into = pair
        return tuple(x.at[into].set(x[page], mode="drop") for x in held), None

    return lax.scan(step, held, (source, target))[0]


def has_page(is_wanted: Any, exists: Any, position: Any) -> Rule:
    """There is a page for each token [B, T] to be written."""
    return Rule(
        ~is_wanted | exists,
        "token {} of sequence {} has no page; make room with PageAllocator.extend and install it "
        "with with_tables before append",
        (position, np.arange(len(is_wanted))[:, None]),
    )


def table_rules(
    page_table: Any, lengths: Any, pages: int, page_size: int, remedy: str
) -> tuple[Rule, Rule]:
    """Lengths [B] fit the table [B, M], and every token held has a page."""
    B, M = page_table.shape
    row, column = np.arange(B), np.arange(M)
    is_used = column * page_size < lengths[:, None]
    return (
        Rule(
            (lengths >= 0) & (lengths <= M * page_size),
            f"lengths must lie in [0, M * page_size] = [0, {M * page_size}]; got {{}} for sequence "
            f"{{}}; {remedy}",
            (lengths, row),
        ),
        Rule(
            ~is_used | ((page_table >= 0) & (page_table < pages)),
            f"page_table must hold pages in [0, {pages}) where a sequence holds tokens; got {{}} "
            "at [{}, {}]",
            (page_table, row[:, None], column),
        ),
    )


def copy_rule(source: Any, target: Any, exists: Any, pages: int) -> Rule:
    """Pages exist, or both are -1."""
    return Rule(
        exists | ((source == -1) & (target == -1)),
        f"source and target must be pages in [0, {pages}), or both -1; got a copy of page {{}} to "
        "page {}",
        (source, target),
    )
