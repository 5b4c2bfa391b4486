"""Drop-in: what jax.nn.dot_product_attention accepts gives the same values and gradients."""

import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflash
from tests.oracle import error

B, T, S, N, H = 2, 12, 18, 4, 8
BIAS = {None: None, "full": (B, N, T, S), "shared": (1, 1, T, S)}
MASK = {None: None, "full": (B, N, T, S), "heads": (B, 1, T, S)}
LENGTHS = (None, "keys", "both")
WINDOW = (None, (11, 9), 11)
_AXES = [BIAS, MASK, (False, True), LENGTHS, WINDOW, (None, 0.3), (4, 2, 1)]
_EVERY = list(itertools.product(*_AXES))


def _inputs(K: int, bias: Any, mask: Any, lengths: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    floating = {"query": normal(B, T, N, H), "key": normal(B, S, K, H), "value": normal(B, S, K, H)}
    if bias is not None:
        floating["bias"] = normal(*BIAS[bias])
    others: dict[str, Any] = {}
    if mask is not None:
        # Key 0 is visible to all, so that no row is empty: there jax.nn means something else.
        others["mask"] = jnp.asarray(rng.random(MASK[mask]) < 0.7).at[..., 0].set(True)
    if lengths is not None:
        others["key_value_seq_lengths"] = jnp.array([S, 7], jnp.int32)
    if lengths == "both":
        others["query_seq_lengths"] = jnp.array([5, T], jnp.int32)
    return floating, others


def _difference(floating: Any, others: Any, options: Any) -> float:
    def run(attention: Any) -> Any:
        def loss(floating: Any) -> Any:
            out = attention(**floating, **others, **options)
            return jnp.sum(jnp.sin(out)), out

        return jax.value_and_grad(loss, has_aux=True)(floating)

    ours, theirs = jax.jit(lambda: (run(jaxflash.dot_product_attention), run(_standard)))()
    return max(
        error(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def _standard(*args: Any, **options: Any) -> jax.Array:
    return jax.nn.dot_product_attention(*args, **options, implementation="xla")


# Every pair of values of two options meets in this sample of the product.
_SAMPLE = random.Random(0).sample(_EVERY, 60)


def test_sample_covers_every_pair() -> None:
    for (i, a), (j, b) in itertools.combinations(enumerate(_AXES), 2):
        seen = {(case[i], case[j]) for case in _SAMPLE}
        assert seen == set(itertools.product(a, b))


@pytest.mark.parametrize("case", _SAMPLE, ids=str)
def test_agrees_with_jax_nn(case: tuple[Any, ...]) -> None:
    bias, mask, is_causal, lengths, window, scale, K = case
    floating, others = _inputs(K, bias, mask, lengths)
    options = {"is_causal": is_causal, "local_window_size": window, "scale": scale}
    assert _difference(floating, others, options) < 5e-6


@pytest.mark.parametrize("is_causal", [False, True])
def test_unbatched(is_causal: bool) -> None:
    floating, others = _inputs(2, "shared", "heads", None)
    floating = {k: x[0] for k, x in floating.items()}
    others = {k: x[0] for k, x in others.items()}
    assert _difference(floating, others, {"is_causal": is_causal}) < 5e-6


def test_bfloat16() -> None:  # jax.nn refuses float16 on a CPU
    floating, others = _inputs(2, None, "full", "keys")
    floating = {k: x.astype(jnp.bfloat16) for k, x in floating.items()}
    assert _difference(floating, others, {}) < 4 * float(jnp.finfo(jnp.bfloat16).eps)


def test_residual() -> None:
    floating, _ = _inputs(2, None, None, None)
    ours = jaxflash.dot_product_attention(**floating, return_residual=True)
    theirs = _standard(**floating, return_residual=True)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        assert error(np.asarray(x), np.asarray(y)) < 2e-6


def test_numpy_arrays_and_lists_are_arrays() -> None:
    floating, _ = _inputs(2, None, None, None)
    as_numpy = {k: np.asarray(x) for k, x in floating.items()}
    lengths = {"key_value_seq_lengths": np.array([3, 4], np.int32)}
    assert _difference(as_numpy, lengths, {"is_causal": np.bool_(True)}) < 5e-6
    one = [[[1.0, 2.0]], [[0.5, 0.0]]]  # [T, N, H]
    np.testing.assert_allclose(
        jaxflash.dot_product_attention(one, one, one),
        jax.nn.dot_product_attention(*(np.float32(one),) * 3),
        rtol=1e-5,
    )


def test_empty_rows_are_where_we_differ() -> None:
    """As the README says: nothing seen gives zero here, the mean of the values in jax.nn."""
    floating, _ = _inputs(4, None, None, None)
    mask = jnp.zeros((1, 1, 1, S), bool)
    ours = jaxflash.dot_product_attention(**floating, mask=mask)
    np.testing.assert_array_equal(ours, jnp.zeros_like(ours))
    theirs = _standard(**floating, mask=mask)
    mean = jnp.broadcast_to(floating["value"].mean(1, keepdims=True), theirs.shape)
    np.testing.assert_allclose(theirs, mean, atol=1e-5)
