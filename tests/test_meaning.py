"""The reference against a second definition, in numpy and from DESIGN's words alone.

Every backend is tested against the reference and shares its functions of tiles; what is wrong in
those would cancel there.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflash
from pallas_kernels import spec
from tests import oracle
from tests.cases import CASES, Case


def naive(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    query_offset: Any = 0,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    kept: Any = True,
    dropout_rate: float = 0.0,
    **ignored: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse of one batch axis, [B, T, N, Hv] and [B, T, N], in float64."""
    del ignored
    (B, T, N, H), S = query.shape, key.shape[1]
    per_group = N // key.shape[2]
    b, h, row, j = np.ogrid[:B, :N, :T, :S]
    b, h, row, j = (x.astype(np.int32) for x in (b, h, row, j))
    i = row + np.broadcast_to(query_offset, B).astype(np.int32)[:, None, None, None]

    visible = np.ones((B, N, T, S), bool)
    if is_causal:
        visible &= j <= i
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        visible &= (i - left <= j) & (j <= i + right)
    if query_seq_lengths is not None:
        visible &= row < np.asarray(query_seq_lengths)[:, None, None, None]
    if key_value_seq_lengths is not None:
        visible &= j < np.asarray(key_value_seq_lengths)[:, None, None, None]
    if query_segment_ids is not None:
        visible &= (query_segment_ids[:, :, None] == key_value_segment_ids[:, None, :])[:, None]
    if mask is not None:
        visible &= mask
    if mask_mod is not None:
        visible &= _each(mask_mod, b, h, i, j)

    out, lse = np.zeros((B, T, N, value.shape[-1])), np.full((B, T, N), -np.inf)
    s = np.einsum("btnh,bsnh->bnts", query, key.repeat(per_group, 2))
    s = s * (1 / np.sqrt(H) if scale is None else scale)
    s = s + (0 if bias is None else bias)
    if logits_soft_cap is not None:
        s = logits_soft_cap * np.tanh(s / logits_soft_cap)
    if alibi_slopes is not None:
        s = s - np.asarray(alibi_slopes)[None, :, None, None] * abs(i - j)
    if score_mod is not None:
        s = _each(score_mod, s, b, h, i, j)
    for at in np.ndindex(B, T, N):
        seen = visible[at[0], at[2], at[1]] & (s[at[0], at[2], at[1]] > -np.inf)
        if not seen.any():
            continue
        weights = np.exp(s[at[0], at[2], at[1], seen])
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[at[2]]))
        lse[at] = np.log(total)
        keep = np.broadcast_to(kept, (B, N, T, S))[at[0], at[2], at[1], seen]
        p = weights / total * keep / (1 - dropout_rate)
        out[at] = p @ value[at[0], seen, at[2] // per_group]
    return out, lse


def _each(function: Any, *args: Any) -> np.ndarray:
    return np.asarray(jnp.vectorize(function)(*args))


def _shrunk(x: Any, case: Case) -> Any:
    """An array of a case with its rows and keys cut to a few."""
    for axis, size in enumerate(x.shape):
        if size > 30 and size in (case.T, case.S):
            few = 9 if size == case.T else 14
            x = x.take(np.arange(few) * (size // few), axis)
    return x


_CASES = [
    case
    for case in CASES
    if len(case.B) == 1 and case.dtype == "float32" and not case.name.startswith("nan_")
]


@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_reference_means_what_the_words_say(case: Case) -> None:
    arrays = {k: _shrunk(x, case) for k, x in case.arrays().items()}
    arrays = {k: x.astype(np.float64) if x.dtype.kind == "f" else x for k, x in arrays.items()}
    with jax.enable_x64(True):
        out, lse = case.call(_reference, arrays)
        options = {}
        if "dropout_rate" in case.options(arrays):
            options["kept"] = _kept(case, arrays)
        truth = case.call(lambda *qkv, **given: naive(*qkv, **given, **options), arrays)
    assert oracle.error(np.asarray(out), truth[0]) < 1e-12
    assert oracle.error(np.asarray(lse), truth[1]) < 1e-12


def _reference(*qkv: Any, **options: Any) -> Any:
    return jaxflash.dot_product_attention(
        *qkv, **options, implementation="reference", return_residual=True
    )


def _kept(case: Case, arrays: dict[str, Any]) -> np.ndarray:
    """Which elements dropout keeps; test_spec says that they are as many as they should be."""
    T, S = arrays["query"].shape[1], arrays["key"].shape[1]
    given = case.options(arrays)
    seed = jax.random.bits(jnp.asarray(given["dropout_key"]), (2,), jnp.uint32)
    query, key, value = (jnp.asarray(arrays[k]) for k in ("query", "key", "value"))
    offset = given.get("query_offset")
    operands = spec.Operands(query, key, value, query_offset=offset)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    device = spec.Device("cpu", "cpu")
    rate = given["dropout_rate"]
    problem = spec.Problem(
        types,
        spec.Band(),
        1.0,
        device,
        dropout_rate=rate,
        broadcast_dropout=given.get("broadcast_dropout", False),
    )
    tile = spec.tile_of(problem, operands, (0, T), (0, S))
    return np.asarray(spec.dropout.keep(problem, tile, seed))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_what_is_seen_and_not_finite_stays_so(implementation: str) -> None:
    x = np.random.default_rng(0).standard_normal((1, 6, 1, 4)).astype(np.float32)
    x = abs(x)  # so that a logit becomes +inf, and not -inf, which is no key seen
    for poison in (np.nan, np.inf):
        spoiled = x.copy()
        spoiled[0, 3] = poison
        out, lse = jaxflash.dot_product_attention(
            x, spoiled, x, is_causal=True, implementation=implementation, return_residual=True
        )
        assert np.isfinite(out[0, :3]).all()
        assert np.isnan(out[0, 3:]).all()
        assert not np.isfinite(lse[0, 3:]).any()
        assert not (np.asarray(lse) == -np.inf).any()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_query_that_is_nan_sees_keys(implementation: str) -> None:
    """So many that XLA on a CPU finds no largest logit of its row."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 200, 1, 8)), jnp.float32)
    out, lse = jaxflash.dot_product_attention(
        x.at[:, 70].set(jnp.nan),
        x,
        x,
        is_causal=True,
        implementation=implementation,
        return_residual=True,
    )
    is_nan = np.arange(200) == 70
    for found in (np.asarray(out)[0], np.asarray(lse)[0]):
        assert np.isnan(found[is_nan]).all()
        assert np.isfinite(found[~is_nan]).all()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_functions_see_what_they_capture_now(implementation: str) -> None:
    """Not what they captured when they were traced first: arrays, numbers, attributes."""
    x = jnp.ones((1, 4, 2, 8)) * jnp.arange(4.0)[None, :, None, None]
    captured = {"array": jnp.zeros(2), "number": 0.0}

    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + captured["array"][h] * k + captured["number"] * k

    def attend() -> jax.Array:
        return jaxflash.dot_product_attention(
            x, x, x, score_mod=score_mod, implementation=implementation
        )

    first = attend()
    captured["array"] = captured["array"] - 1
    second = attend()
    captured["number"] = -2.0
    third = attend()
    assert not np.allclose(first, second)
    assert not np.allclose(second, third)
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda w: _loss_of_captured(x, w)))(jnp.ones(2))


def _loss_of_captured(x: jax.Array, w: jax.Array) -> jax.Array:
    out = jaxflash.dot_product_attention(x, x, x, score_mod=lambda s, b, h, q, k: s * w[h])
    return jnp.sum(out)


def test_functions_are_not_asked_beyond_the_last_key() -> None:
    """log(S - k) is infinite in the padding of the last tile, and so would be the gradient."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 300, 1, 8)), jnp.float32) for _ in range(3))

    def loss(w: jax.Array, implementation: str) -> jax.Array:
        out = jaxflash.dot_product_attention(
            q,
            k,
            v,
            score_mod=lambda s, b, h, i, j: s + w * jnp.log(300.0 - j),
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(out))

    ours, truth = (jax.grad(loss)(0.5, name) for name in ("xla", "reference"))
    np.testing.assert_allclose(ours, truth, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("far", [2**29, 2**31 - 1, sys.maxsize])
@pytest.mark.parametrize("offset", [0, -3, 2**30 - 1, jnp.int32(2)])
def test_windows_without_end(implementation: Any, far: int, offset: Any) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))
    attend = functools.partial(
        jaxflash.dot_product_attention, x, x, x, query_offset=offset, implementation=implementation
    )
    np.testing.assert_array_equal(attend(local_window_size=far), attend())
    np.testing.assert_array_equal(attend(local_window_size=(far, 0)), attend(is_causal=True))


def test_cotangents_of_empty_rows_are_ignored() -> None:
    x = jnp.ones((1, 4, 1, 8))
    bias = jnp.where(jnp.arange(4)[:, None] == 2, -jnp.inf, 0.0)

    def loss(x: jax.Array) -> jax.Array:
        out, lse = jaxflash.dot_product_attention(x, x, x, bias, return_residual=True)
        return jnp.sum(jnp.where(jnp.isfinite(lse), lse**2, 0)) + jnp.sum(out)

    assert np.isfinite(jax.grad(loss)(x)).all()
