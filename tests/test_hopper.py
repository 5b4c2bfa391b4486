"""The Hopper kernels where the cases of `test_conformance` do not reach."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflash
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper, mosaic
from pallas_kernels.hopper.config import Staging

ON_GPU = jax.default_backend() == "gpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a Hopper GPU")
# JAX 0.10.2's interpreter does not come to an end on persistent kernels.
runs = pytest.mark.skipif(
    not ON_GPU and jax.__version_info__ < (0, 11), reason="JAX 0.10.2 cannot interpret the kernels"
)


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """On a GPU, or interpreted."""
    with contextlib.nullcontext() if ON_GPU else mosaic.interpreting():
        yield


def _normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def _attention(*args: Any, **options: Any) -> jax.Array:
    return jaxflash.dot_product_attention(*args, **options, implementation="hopper")


@runs
def test_rows_that_see_nothing_ignore_nan() -> None:
    """Such rows share a tile, and thus a product with the values, with rows that see NaN."""
    q, k, v = (_normal(i, 1, 100, 1, 32) for i in range(3))
    with _running():
        out = _attention(q, k, v.at[:, 0].set(jnp.nan), is_causal=True, query_offset=-60)
    out = np.asarray(out, np.float32)
    assert np.array_equal(out[:, :60], np.zeros_like(out[:, :60]))
    assert np.isnan(out[:, 60:]).all()


@runs
@pytest.mark.parametrize(("T", "S", "H", "Hv"), [(67, 101, 72, 40), (3, 9, 136, 24)])
def test_sizes_that_no_tile_divides(T: int, S: int, H: int, Hv: int) -> None:
    q, k, v = _normal(0, 1, T, 2, H), _normal(1, 1, S, 2, H), _normal(2, 1, S, 2, Hv)
    with _running():
        out = _attention(q, k, v)
    truth = jaxflash.dot_product_attention(q, k, v, implementation="reference")
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(truth, np.float32), atol=0.02, rtol=0.02
    )


@runs
@pytest.mark.parametrize(
    ("H", "config"),
    [
        (32, hopper.Config(block_kv=96, ping_pong=True)),
        (16, hopper.Config(block_kv=176, consumers=3, ping_pong=True)),
        (32, hopper.Config(block_kv=80, consumers=4, stages=3, q_stages=1)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "query_offset": -70}])
def test_tiles_of_any_size(H: int, config: hopper.Config, options: dict[str, Any]) -> None:
    """Keys that nobody sees are NaN: the first rows of the last tile of a long V, for one."""
    q, k, v = (_normal(i, 1, 300, 2, H) for i in range(3))
    v = v.at[:, 230:].set(jnp.nan) if options else v
    with _running():
        out = hopper.forward(*canonicalize(q, k, v, **options), config)[0]
    truth = jaxflash.dot_product_attention(q, k, v, **options, implementation="reference")
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(truth, np.float32), atol=0.02, rtol=0.02
    )


@runs
@pytest.mark.parametrize("sinks", [False, True])
def test_gradients_under_vmap(sinks: bool) -> None:
    """Folded into the batch, or, where a gradient has no batch, one after the other."""
    q, k, v = _normal(0, 3, 1, 40, 2, 16), _normal(1, 1, 70, 1, 16), _normal(2, 1, 70, 1, 24)
    options: dict[str, Any] = {"sinks": jnp.ones(2)} if sinks else {}

    def gradients(implementation: str) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = jaxflash.dot_product_attention(
                q, k, v, is_causal=True, query_offset=30, implementation=implementation, **options
            )
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.vmap(jax.grad(loss, (0, 1, 2)), in_axes=(0, None, None))(q, k, v)

    with _running():
        actual = gradients("hopper")
    for a, b in zip(actual, gradients("xla"), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), atol=0.05, rtol=0.05
        )


def test_which_gradients_are_the_kernels() -> None:
    q, k = (jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16) for _ in range(2))
    wide = jax.ShapeDtypeStruct((1, 256, 2, 136), jnp.bfloat16)

    def reason(q: Any, k: Any, v: Any, **options: Any) -> str | None:
        found: list[str | None] = []

        def ask(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
            found.append(hopper.supports_backward(canonicalize(q, k, v, **options)[0]))

        jax.eval_shape(ask, q, k, v)
        return found[0]

    if jax.__version_info__ < (0, 11):
        assert reason(q, k, k) == "needs JAX 0.11 or newer"
        return
    assert reason(q, k, k, is_causal=True) is None
    assert "head dims up to 128" in str(reason(q, k, wide))
    assert "logits that are modified" in str(reason(q, k, k, logits_soft_cap=3.0))
    assert "logits that are modified" in str(reason(q, k, k, alibi_slopes=jnp.ones(2)))


@needs_gpu
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_fifty_runs_are_equal(H: int, is_causal: bool) -> None:
    """Each right behind the kernel that makes its input."""

    @jax.jit
    def run(x: jax.Array) -> jax.Array:
        q, k, v = (jnp.sin(x * (i + 1)).astype(jnp.bfloat16) for i in range(3))
        return _attention(q, k, v, is_causal=is_causal)

    x = jax.random.normal(jax.random.key(0), (2, 2001, 8, H))
    first = run(x)
    for _ in range(49):
        assert jnp.array_equal(run(x), first)


@needs_gpu
def test_more_than_two_to_the_31_elements() -> None:
    shape = (17, 16384, 64, 128)
    assert np.prod(shape) > 2**31
    last = [_normal(i, 1, *shape[1:]) for i in range(3)]
    q, k, v = (jnp.zeros(shape, jnp.bfloat16).at[-1:].set(x) for x in last)
    out = _attention(q, k, v, is_causal=True)
    assert jnp.array_equal(out[-1:], _attention(*last, is_causal=True))


@needs_gpu
def test_more_than_65535_heads_in_all() -> None:
    q, k, v = (_normal(i, 1100, 64, 64, 64) for i in range(3))
    out = _attention(q, k, v)
    assert jnp.array_equal(out[-1:], _attention(q[-1:], k[-1:], v[-1:]))


def test_staging_fills_each_place_in_turn() -> None:
    for columns in range(8, 257, 8):
        for staging in Staging.of(columns):
            groups, places = staging.groups(), staging.form.strips
            filled = [place for group in groups for place in group]
            assert len(filled) == staging.whole.strips
            assert all(group == sorted(set(group)) for group in groups)
            assert set(filled) == set(range(places))


@pytest.mark.parametrize("H", range(8, 257, 8))
def test_every_head_dim_fits(H: int) -> None:
    def check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        problem, _ = canonicalize(q, k, v)
        assert hopper.Config.default(problem).staging(problem.H, problem.Hv) is not None

    for Hv in (8, 72, 128, 184, 256):
        shapes = [jax.ShapeDtypeStruct((1, 256, 1, n), jnp.bfloat16) for n in (H, H, Hv)]
        jax.eval_shape(check, *shapes)


def test_config_refuses() -> None:
    with pytest.raises(ValueError, match=r"consumers must be one of \[2, 3, 4\]; got 5"):
        hopper.Config(consumers=5)
    with pytest.raises(ValueError, match="block_kv must be a multiple of 16 from 64 to 256"):
        hopper.Config(block_kv=32)
    with pytest.raises(ValueError, match="needs stages >= 2 and 1 or 2 q_stages"):
        hopper.Config(stages=1)
