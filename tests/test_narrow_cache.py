"""Pages of 8 bits hold what was appended, to the precision of their numbers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflash
from jaxflash import linen
from jaxflash.cache import PageAllocator, PagedKVCache
from pallas_kernels.spec import narrow
from tests.caches import HV, H, K, cut, joined, kv, paged

HELD = pytest.mark.parametrize("held", [jnp.float8_e4m3fn, jnp.int8], ids=["fp8", "int8"])
append = jax.jit(PagedKVCache.append, donate_argnums=0)


def _assert_holds(cache: PagedKVCache, sequences: list[tuple[Any, Any]]) -> None:
    """Each token to half a unit in its last place, or of what the page's scale grew from.

    Each page has the least scale for the largest of its tokens, those that are not finite apart.
    """
    assert [len(key) for key, _ in sequences] == cache.lengths.tolist()
    dtype, size = cache.key_pages.dtype, cache.page_size
    scales = cache.key_scale, cache.value_scale
    for held, of_pages, which in zip(cache.gather(), scales, (0, 1), strict=True):
        assert held.dtype == jnp.float32
        assert of_pages is not None
        for row, (table, tokens) in enumerate(zip(cache.page_table, sequences, strict=True)):
            want = tokens[which].astype(np.float32)
            assert not np.any(held[row, len(want) :])
            for first, page in zip(range(0, len(want), size), table, strict=False):
                part, found = want[first : first + size], held[row, first : first + size]
                least = narrow.scales_for(np.abs(part).max((0, 2)), dtype)
                np.testing.assert_array_equal(of_pages[page], least)
                off = np.abs(found[: len(part)] - part)
                assert (off <= _unit(dtype, part, np.asarray(least)[:, None])).all()


def _unit(dtype: Any, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The most by which rounding may be off: by steps of scale, or in proportion above them."""
    if dtype == jnp.int8:
        return scale
    return np.maximum(np.abs(x) * 2.0**-4, scale * 2.0**-9)


@HELD
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_prompt_chunk_and_tokens(held: Any, page_size: int, dtype: Any) -> None:
    """Of lengths of their own, in pages in any order; the pages of nobody stay as they were."""
    table = np.random.default_rng(page_size).permutation(10)[:6].reshape(2, 3).astype(np.int32)
    cache = paged(table, pages=10, page_size=page_size, dtype=held)
    T = 2 * page_size - 3
    new = [kv(2, n, dtype, seed=n) for n in (T, 5, 1, 1)]
    counts = (T, page_size - 2), (5, 4), (1, 0), (1, 1)
    before = jax.tree.map(np.array, cache)
    for tokens, count in zip(new, counts, strict=True):
        cache = append(cache, *tokens, jnp.array(count))
    _assert_holds(
        cache,
        [joined(*(cut(x, b, n[b]) for x, n in zip(new, counts, strict=True))) for b in range(2)],
    )
    others = np.setdiff1d(np.arange(10), [*table[0], *table[1, :2]])
    for name in ("key_pages", "value_pages", "key_scale", "value_scale"):
        kept, now = (np.asarray(getattr(x, name))[others] for x in (before, cache))
        assert kept.tobytes() == now.tobytes()


@HELD
def test_scales_are_the_least_powers_of_two(held: Any) -> None:
    most = narrow.largest(held)
    new = jnp.array([most, 1.0, 0.9 * most, 2.1 * most]).reshape(1, 1, 4, 1)
    cache = PagedKVCache.zeros(2, 16, 4, 1, batch=1, max_pages=1, dtype=held).with_tables([[1]])
    cache = append(cache, new, -new)
    assert cache.key_scale is not None
    least = 2.0 ** np.ceil(np.log2(1 / most))
    assert cache.key_scale[1].tolist() == [1.0, least, 1.0, 4.0]
    assert not cache.key_scale[0].any()
    np.testing.assert_array_equal(cache.key_scale, cache.value_scale)


@HELD
def test_a_scale_grows_and_what_the_page_holds_is_rounded_again(held: Any) -> None:
    cache = paged([[3]], dtype=held)
    tokens = [tuple(x * factor for x in kv(1, 1, seed=i)) for i, factor in enumerate((1, 50, 3))]
    for token in tokens:
        cache = append(cache, *token)
    _assert_holds(cache, [joined(*(cut(token, 0, 1) for token in tokens))])
    assert cache.key_scale is not None
    scales = [narrow.scales_for(jnp.abs(key).max((0, 1, 3)), held) for key, _ in tokens]
    np.testing.assert_array_equal(cache.key_scale[3], scales[1])
    assert (scales[1] > scales[0]).all()


@HELD
@pytest.mark.parametrize("nothing", [0, 1e-40, np.nan, -np.inf])
def test_a_token_of_nothing_costs_no_precision(held: Any, nothing: float) -> None:
    """After others, and before them."""
    some, none = kv(1, 3), tuple(jnp.full_like(x, nothing) for x in kv(1, 1))
    new = (some, none, some)
    cache = paged([[3]], dtype=held)
    for tokens in new:
        cache = append(cache, *tokens)
    clean = append(append(paged([[3]], dtype=held), *some), *some)
    np.testing.assert_array_equal(cache.key_scale, clean.key_scale)
    found, want = (np.asarray(x.gather()[0][0]) for x in (cache, clean))
    np.testing.assert_array_equal(np.delete(found, 3, axis=0)[:6], want[:6])
    first = append(paged([[3]], dtype=held), *none)
    assert first.key_scale is not None
    assert (first.key_scale[3] == narrow.LEAST).all()


@HELD
def test_a_page_that_is_taken_again_forgets_its_scale(held: Any) -> None:
    first, second = (tuple(x * s for x in kv(1, 20, seed=s)) for s in (1000, 1))
    cache = append(paged([[3, 1]], dtype=held), *first)
    cache = append(cache.with_tables([[1, 3]], [0]), *second)
    _assert_holds(cache, [cut(second, 0, 20)])


@HELD
def test_what_is_not_finite_leaves_others_alone(held: Any) -> None:
    key, value = kv(1, 5)
    spoiled = key.at[0, 1, 0, 2].set(np.nan).at[0, 2, 0, 1].set(-np.inf)
    clean, cache = (append(paged([[3]], dtype=held), x, value) for x in (key, spoiled))
    found, want = (np.array(x.gather()[0][0, :5]) for x in (cache, clean))
    assert np.isnan(found[1, 0, 2]) if held == jnp.float8_e4m3fn else found[1, 0, 2] == 0
    assert cache.key_scale is not None
    assert found[2, 0, 1] == -narrow.largest(held) * cache.key_scale[3, 0]
    for x in (found, want):
        x[1, 0, 2] = x[2, 0, 1] = 0
    np.testing.assert_array_equal(found, want)


@HELD
def test_what_has_no_page_or_no_room_is_dropped(held: Any) -> None:
    new = kv(2, 40)
    cache = append(paged([[3, -1, 4], [6, 1, 0]], dtype=held), *new)
    _assert_holds(cache, [cut(new, 0, 16), cut(new, 1, 40)])
    cache = append(cache, *new)
    _assert_holds(cache, [cut(new, 0, 16), joined(cut(new, 1, 40), cut(new, 1, 8))])
    assert cache.append(*kv(2, 0)).lengths.tolist() == [16, 48]


@HELD
def test_prefix_sharing(held: Any) -> None:
    """A page that is copied takes its scale along; shared ones stay as they are."""
    pool, prompt = PageAllocator(pages=8, page_size=16), kv(1, 40)
    answers = tuple(9 * x for x in kv(2, 9))
    first = pool.allocate(40)
    cache = append(paged(pool.table([first], 4), dtype=held), *prompt)
    sequences = [first, pool.fork(first)]
    copies = [pair for sequence in sequences for pair in pool.extend(sequence, 9)]
    shared = np.asarray(cache.key_pages[:2])
    cache = cache.copy_page(*zip(*copies, strict=True))
    cache = append(cache.with_tables(pool.table(sequences, 4), [40, 40]), *answers)
    _assert_holds(cache, [joined(cut(prompt, 0, 40), cut(answers, b, 9)) for b in range(2)])
    np.testing.assert_array_equal(cache.key_pages[:2], shared)


@HELD
def test_random_appends(held: Any) -> None:
    """Against lists: chunks of any size to any sequences, of sizes that grow."""
    rng = np.random.default_rng(0)
    cache, T = paged(rng.permutation(12).reshape(3, 4), pages=12, dtype=held), 9
    model: list[list[Any]] = [[] for _ in range(3)]
    while min(map(len, model)) < 6:
        new = tuple(x * rng.choice([1, 1, 4]) for x in kv(3, T, seed=int(rng.integers(2**31))))
        room = 64 - np.asarray(cache.lengths)
        counts = np.minimum(rng.integers(0, T + 1, 3), room)
        cache = append(cache, *new, jnp.asarray(counts, jnp.int32))
        for b, sequence in enumerate(model):
            sequence.append(cut(new, b, counts[b]))
    _assert_holds(cache, [joined(*sequence) for sequence in model])


@HELD
def test_donated_pages_are_updated_in_place(held: Any) -> None:
    cache = paged([[5, 2], [7, 0]], pages=512, dtype=held)
    compiled = append.lower(cache, *kv(2, 1)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 512 * 16 * K * (H + HV)
    before = cache.key_pages.unsafe_buffer_pointer()
    assert compiled(cache, *kv(2, 1)).key_pages.unsafe_buffer_pointer() == before


@HELD
def test_layers_keep_8_bits(held: Any) -> None:
    """The same layer over pages of 8 bits and of its own dtype."""
    layer, x = linen.MultiHeadAttention(num_heads=4, is_causal=True), kv(2, 20)[0]
    x = jnp.concatenate([x.reshape(2, 20, -1)] * 2, axis=-1)
    parameters = layer.init(jax.random.key(0), x)
    make = partial(jaxflash.PagedKVCache.zeros, 5, 16, 4, 4, batch=2, max_pages=2)
    found = []
    for dtype in (jnp.float32, held):
        cache = make(dtype=dtype).with_tables([[4, 0], [1, 3]])
        out, cache = layer.apply(parameters, x[:, :19], cache=cache)
        last, _ = layer.apply(parameters, x[:, 19:], cache=cache)
        found.append(np.concatenate([out, last], axis=1))
    assert 0 < np.abs(found[1] - found[0]).max() < 0.05 * np.abs(found[0]).max()


_Q, _PAGES = jnp.ones((1, 1, 2, 8)), jnp.ones((3, 16, 2, 8), jnp.int8)
_TABLE, _LENGTHS, _SCALE = np.array([[1]], np.int32), np.array([3], np.int32), jnp.ones((3, 2))


def test_wrong_scales_are_refused() -> None:
    attend = jaxflash.paged_attention
    held = _Q, _PAGES, _PAGES, _TABLE, _LENGTHS
    with pytest.raises(ValueError, match=r"pages of int8 need key_scale, float32 \[P, K\]"):
        attend(*held)
    with pytest.raises(ValueError, match=r"value_scale must have shape \[P, K\] = \(3, 2\)"):
        attend(*held, key_scale=_SCALE, value_scale=_SCALE[:2])
    with pytest.raises(TypeError, match="key_scale must be float32; got bfloat16"):
        attend(*held, key_scale=_SCALE.astype(jnp.bfloat16), value_scale=_SCALE)
    wide = _PAGES.astype(jnp.float32)
    with pytest.raises(ValueError, match="key_scale is for pages of 8 bits; got pages of float32"):
        attend(_Q, wide, wide, _TABLE, _LENGTHS, key_scale=_SCALE)
    with pytest.raises(TypeError, match="must share a dtype; got int8 and float32"):
        attend(_Q, _PAGES, wide, _TABLE, _LENGTHS, key_scale=_SCALE)
    other = _PAGES.astype(jnp.float8_e5m2)
    with pytest.raises(
        TypeError, match=r"key_pages must be .*float8_e4m3fn or int8; got float8_e5"
    ):
        attend(_Q, other, other, _TABLE, _LENGTHS, key_scale=_SCALE, value_scale=_SCALE)
    rounded = jaxflash.quantize(jnp.ones((3, 16, 2, 8)))
    with pytest.raises(TypeError, match="key_pages must be an array; a QuantizedArray is for"):
        attend(_Q, rounded, rounded, _TABLE, _LENGTHS)
