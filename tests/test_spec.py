"""The shared language against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels import spec
from pallas_kernels.spec import softmax

# Compilation makes the first example slow; the machine decides how fast the others are.
settings.register_profile("jaxflash", deadline=None, max_examples=200, derandomize=True)
settings.load_profile("jaxflash")

_BOUND = st.none() | st.integers(-40, 40)


@st.composite
def bands(draw: st.DrawFn) -> spec.Band:
    lo, hi = draw(_BOUND), draw(_BOUND)
    if lo is not None and hi is not None and lo > hi:
        lo, hi = hi, lo
    return spec.Band(lo, hi)


def dense(band: spec.Band, rows: range, keys: int) -> np.ndarray:
    """The definition, pair by pair."""
    return np.array(
        [
            [
                (band.lo is None or band.lo <= k - q) and (band.hi is None or k - q <= band.hi)
                for k in range(keys)
            ]
            for q in rows
        ],
        bool,
    ).reshape(len(rows), keys)


@given(bands(), st.integers(-50, 50), st.integers(1, 30), st.integers(0, 40))
def test_ranges_are_exact(band: spec.Band, q0: int, count: int, size: int) -> None:
    seen = dense(band, range(q0, q0 + count), size)
    for (start, stop), truth in (
        (band.any_keys(q0, q0 + count, size), seen.any(0)),
        (band.all_keys(q0, q0 + count, size), seen.all(0)),
    ):
        assert 0 <= start <= stop <= size
        inside = (np.arange(size) >= start) & (np.arange(size) < stop)
        np.testing.assert_array_equal(inside, truth)


@given(bands(), st.integers(0, 40), st.integers(1, 30), st.integers(0, 40), st.integers(-30, 30))
def test_transposed_ranges_are_exact(
    band: spec.Band, k0: int, count: int, rows: int, offset: int
) -> None:
    """Which rows see a tile of keys, rows standing at row + offset."""
    seen = dense(band, range(offset, offset + rows), k0 + count)[:, k0:]
    of_keys = band.shift(offset).transpose()
    for (start, stop), truth in (
        (of_keys.any_keys(k0, k0 + count, rows), seen.any(1)),
        (of_keys.all_keys(k0, k0 + count, rows), seen.all(1)),
    ):
        inside = (np.arange(rows) >= start) & (np.arange(rows) < stop)
        np.testing.assert_array_equal(inside, truth)


@given(bands(), st.integers(-20, 20))
def test_allowed_and_its_transpose(band: spec.Band, offset: int) -> None:
    q, k = np.arange(offset, offset + 7)[:, None], np.arange(9)
    truth = dense(band, range(offset, offset + 7), 9)
    np.testing.assert_array_equal(np.broadcast_to(band.allowed(q, k), (7, 9)), truth)
    np.testing.assert_array_equal(np.broadcast_to(band.transpose().allowed(k, q), (7, 9)), truth)
    assert band.transpose().transpose() == band


@given(bands(), st.integers(0, 25), st.integers(0, 25))
def test_area(band: spec.Band, rows: int, keys: int) -> None:
    of_rows = dense(band, range(rows), keys).sum(axis=1)
    assert band.area(rows, keys) == of_rows.sum()
    assert max(of_rows, default=0) <= band.most_keys(keys) <= keys
    assert band.most_keys(keys) <= band.causal_keys(keys) <= keys


@given(st.booleans(), st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_band_of_options(is_causal: bool, window: tuple[int, int] | None) -> None:
    q, k = np.arange(20)[:, None], np.arange(20)
    truth = np.ones((20, 20), bool)
    if is_causal:
        truth &= k <= q
    if window is not None:
        truth &= (q - window[0] <= k) & (k <= q + window[1])
    band = spec.Band.of(is_causal, window)
    np.testing.assert_array_equal(np.broadcast_to(band.allowed(q, k), (20, 20)), truth)


def test_traced_ranges_equal_static_ones() -> None:
    band = spec.Band(-5, 3)

    @jax.jit
    def traced(q0: jax.Array, offset: jax.Array) -> object:
        shifted = band.shift(offset)
        return shifted.any_keys(q0, q0 + 4, 30), shifted.all_keys(q0, q0 + 4, 30)

    for q0, offset in ((0, 0), (7, -9), (20, 25)):
        shifted = band.shift(offset)
        static = shifted.any_keys(q0, q0 + 4, 30), shifted.all_keys(q0, q0 + 4, 30)
        assert jax.tree.map(int, traced(q0, offset)) == jax.tree.map(int, static)


def test_empty_band_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lo <= hi; got lo=3, hi=-1"):
        spec.Band(3, -1)


_SIZE, _BLOCK = st.integers(0, 40), st.integers(1, 16)


@given(bands(), _SIZE, _SIZE, _BLOCK, _BLOCK)
def test_visible_tiles(band: spec.Band, T: int, S: int, block_q: int, block_kv: int) -> None:
    seen = dense(band, range(T), S)
    partial, full = spec.visible_tiles(band, T, S, block_q, block_kv)
    listed = {
        pair: kind
        for kind, tiles in enumerate((partial, full))
        for pair in zip(tiles.q.tolist(), tiles.kv.tolist(), strict=True)
    }
    assert len(listed) == len(partial.q) + len(full.q)
    for i in range(-(-T // block_q)):
        for j in range(-(-S // block_kv)):
            tile = seen[i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
            whole = tile.shape == (block_q, block_kv) and tile.all()
            expected = int(whole) if tile.any() else None
            assert listed.get((i, j)) == expected


_LOGITS = hnp.arrays(np.float64, (4, 12), elements=st.just(-np.inf) | st.floats(-30, 30))
_VALUES = np.cos(np.arange(12.0))[:, None]


def _attend(pieces: list[slice], s: jax.Array, sink: jax.Array | None = None) -> object:
    state = softmax.start((4, 1), s.dtype)
    for piece in pieces:
        state, p = softmax.update(state, s[:, piece])
        state = state._replace(acc=state.acc + p @ _VALUES[piece])
    return softmax.finish(state, sink)


@jax.jit
def _in_pieces(s: jax.Array, sink: jax.Array) -> object:
    pieces = [slice(0, 5), slice(5, 6), slice(6, 12)]
    return _attend(pieces, s), _attend(pieces[::-1], s), _attend(pieces, s, sink)


@jax.jit
def _merged(s: jax.Array) -> object:
    return softmax.merge(*_attend([slice(0, 5)], s), *_attend([slice(5, 12)], s))


def _expected(s: np.ndarray, sink: float) -> tuple[np.ndarray, np.ndarray]:
    empty = np.isneginf(s).all(axis=1)
    total = np.exp(s).sum(axis=1) + np.exp(sink)
    with np.errstate(divide="ignore", invalid="ignore"):
        out = np.where(empty[:, None], 0, np.exp(s) @ _VALUES / total[:, None])
        return out, np.where(empty, -np.inf, np.log(total))


@given(_LOGITS, st.floats(-20, 20))
def test_online_softmax_in_any_order_and_merged(s: np.ndarray, sink: float) -> None:
    with jax.enable_x64(True):
        forward, reverse, with_sink = _in_pieces(s, sink)
        merged = _merged(s)
    plain = _expected(s, -np.inf)
    for actual, truth in (
        (forward, plain),
        (reverse, plain),
        (merged, plain),
        (with_sink, _expected(s, sink)),
    ):
        for x, y in zip(actual, truth, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def test_softmax_of_nothing_has_no_nan_in_derivatives() -> None:
    def weight(s: jax.Array) -> jax.Array:
        state, p = softmax.update(softmax.start((2, 1), jnp.float32), s)
        out, lse = softmax.finish(state._replace(acc=p.sum(-1, keepdims=True)))
        merged, merged_lse = softmax.merge(out, lse, out, lse)
        return jnp.sum(merged) + jnp.sum(jnp.where(jnp.isfinite(merged_lse), merged_lse, 0))

    s = jnp.array([[-jnp.inf, -jnp.inf], [1.0, -jnp.inf]])
    assert np.isfinite(jax.grad(weight)(s)).all()


def _problem(T: int, S: int, rate: float, offset: int = 0) -> tuple[spec.Problem, spec.Operands]:
    x = jnp.zeros((2, T, 3, 4)), jnp.zeros((2, S, 3, 4)), jnp.zeros((2, S, 3, 4))
    operands = spec.Operands(*x, dropout_seed=jnp.array([5, 9], jnp.uint32))
    device = spec.Device("cpu", "cpu")
    types = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    problem = spec.Problem(types, spec.Band(), 1.0, device, query_offset=offset, dropout_rate=rate)
    return problem, operands


def _kept(T: int, S: int, rate: float, offset: int = 0) -> np.ndarray:
    problem, operands = _problem(T, S, rate, offset)
    tile = spec.tile_of(problem, operands, (0, T), (0, S))
    return np.asarray(spec.dropout.keep(problem, tile, operands.dropout_seed))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_dropout_keeps_its_share_everywhere(rate: float) -> None:
    kept = _kept(256, 512, rate)
    spread = np.sqrt(rate * (1 - rate))
    for axes in ((2, 3), (0, 1, 2), (0, 1, 3), (0, 1, 2, 3)):
        share = kept.mean(axis=axes)
        size = kept.size // share.size
        assert np.abs(share - (1 - rate)).max() < 6 * spread / np.sqrt(size)


def test_dropout_is_uncorrelated() -> None:
    x = _kept(256, 512, 0.5).astype(float) - 0.5
    n = x[0, 0].size
    for a, b in (
        (x[0, 0], x[0, 1]),
        (x[0, 0], x[1, 0]),
        (x[0, 0, :-1], x[0, 0, 1:]),
        (x[0, 0, :, :-1], x[0, 0, :, 1:]),
        (x[0, 0, :-1, 1:], x[0, 0, 1:, :-1]),
    ):
        assert abs((a * b).mean()) < 6 * 0.25 / np.sqrt(n)


def test_dropout_may_be_one_mask_for_all() -> None:
    problem, operands = _problem(40, 60, 0.4)
    problem = dataclasses.replace(problem, broadcast_dropout=True)
    tile = spec.tile_of(problem, operands, (0, 40), (0, 60))
    kept = np.asarray(spec.dropout.keep(problem, tile, operands.dropout_seed))
    assert kept.size == 40 * 60
    assert abs(kept.mean() - 0.6) < 6 * np.sqrt(0.24 / kept.size)


def test_dropout_depends_on_position_alone() -> None:
    """A tile, and rows that stand elsewhere, agree with the whole."""
    whole = _kept(40, 60, 0.4)
    problem, operands = _problem(40, 60, 0.4)
    tile = spec.tile_of(problem, operands, (8, 16), (30, 20))
    part = spec.dropout.keep(problem, tile, operands.dropout_seed)
    np.testing.assert_array_equal(part, whole[:, :, 8:24, 30:50])
    np.testing.assert_array_equal(_kept(10, 60, 0.4, offset=30), whole[:, :, 30:])
