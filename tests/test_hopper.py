"""The Hopper kernels where the cases of `test_conformance` do not reach."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflash
from jaxflash import xla
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper, mosaic
from pallas_kernels.hopper.config import P_BUFFERS, Sizes, Staging

pytestmark = pytest.mark.kernel

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


def _check_backward(
    problem: Any,
    operands: Any,
    dout: jax.Array,
    config: hopper.BackwardConfig | None,
    blocks: int | None = None,
) -> None:
    """The kernel's gradients against those of XLA."""
    out, lse = xla.forward(problem, operands)
    rest = (out, lse, dout, lse * 0.1)
    with _running():
        actual = hopper.backward(problem, operands, *rest, config, blocks)
    want = xla.backward(problem, operands, *rest)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
        assert np.abs(difference).max() <= 0.02 * np.abs(np.asarray(b, np.float32)).max()


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
        (16, hopper.Config(block_kv=64, consumers=3, ping_pong=True, overlaps=False)),
        (32, hopper.Config(block_kv=144, consumers=2, q_stages=1, overlaps=False)),
        (64, hopper.Config(block_kv=128, q_stages=1, overlaps=False, parts=2)),
        (72, hopper.Config(block_kv=96, consumers=4, ping_pong=True, overlaps=False, parts=3)),
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
@pytest.mark.parametrize("steps", [(0, 0.02), (330, -1.0), (-5, -0.02), (-100, -1.0)], ids=str)
@pytest.mark.parametrize(
    ("H", "config"),
    [
        (144, hopper.Config(block_kv=64, q_stages=1)),
        (64, hopper.Config(block_kv=64)),
        (64, hopper.Config(block_kv=64, ping_pong=True, overlaps=False, parts=2)),
    ],
    ids=str,
)
def test_logits_that_grow(H: int, config: hopper.Config, steps: tuple[float, float]) -> None:
    """Sums stay relative to an older maximum until a row outgrows it by far.

    Keys are visited from the last to the first. Logits are those of the first, and of each next one
    so much more: they grow by much, by little, and where all are negative.
    """
    first, step = steps
    q, k, v = _normal(0, 1, 70, 2, H), _normal(1, 1, 330, 1, H), _normal(2, 1, 330, 1, H)
    logits = first + step * jnp.arange(330)
    k = (k * 0.1).at[..., 0].set(logits[:, None].astype(k.dtype))
    q = (q * 0.1).at[..., 0].set(jnp.linspace(2, 4, 70)[:, None].astype(q.dtype))
    q, k, v = (x.astype(jnp.float16) for x in (q, k, v))  # of which 2^16 is too much
    options: dict[str, Any] = {"is_causal": True, "query_offset": 260, "scale": 0.1}
    if first >= 0:  # they would be all that is left of negative logits
        options["sinks"] = jnp.array([3.0, -2.0])
    with _running():
        out, lse = hopper.forward(*canonicalize(q, k, v, **options), config)
    truth, lse_of_truth = jaxflash.dot_product_attention(
        q, k, v, **options, implementation="reference", return_residual=True
    )
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(truth, np.float32), atol=0.02, rtol=0.02
    )
    np.testing.assert_allclose(lse, lse_of_truth, rtol=1e-3, atol=1e-3)


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


@runs
@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_of_a_bias_under_vmap(axis: int | None) -> None:
    """Shared by what is mapped over, and by the batch within."""
    q, k, v = (_normal(i, 2, 2, 64, 2, 16) for i in range(3))
    bias = _normal(3, *(() if axis is None else (2,)), 2, 64, 64)

    def gradient(implementation: str) -> jax.Array:
        attend = functools.partial(jaxflash.dot_product_attention, implementation=implementation)

        def loss(bias: jax.Array) -> jax.Array:
            out = jax.vmap(attend, (0, 0, 0, axis))(q, k, v, bias)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss)(bias)

    with _running():
        found = gradient("hopper")
    want = gradient("xla")
    assert found.shape == want.shape
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(want, np.float32), atol=0.05, rtol=0.05
    )


def test_which_gradients_are_the_kernels() -> None:
    q, v = (jax.ShapeDtypeStruct((1, 256, 2, n), jnp.bfloat16) for n in (64, 136))

    def reason(constant: tuple[str, ...] = (), **options: Any) -> str | None:
        found: list[str | None] = []

        def ask(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
            problem, _ = canonicalize(q, k, v, **options)
            problem = dataclasses.replace(problem, constant=frozenset(constant))
            found.append(hopper.supports_backward(problem))

        jax.eval_shape(ask, q, q, v)
        return found[0]

    if jax.__version_info__ < (0, 11):
        assert reason() == "needs JAX 0.11 or newer"
        return
    table, bias = jnp.ones(256), jnp.ones((1, 2, 256, 1))
    assert reason(is_causal=True, logits_soft_cap=3.0, alibi_slopes=None) is None
    assert reason(alibi_slopes=jnp.ones(2), bias=bias.mT) is None
    assert "slopes" in str(reason(alibi_slopes=jnp.ones(2), logits_soft_cap=3.0))
    assert "rows, but not keys" in str(reason(bias=bias))
    assert reason(("bias",), bias=bias) is None
    captured: dict[str, Any] = {"score_mod": lambda s, b, h, q, k: jnp.tanh(s) + table[k]}
    assert "score_mod captures" in str(reason(**captured))
    assert reason(("score_consts",), **captured) is None


@runs
@pytest.mark.parametrize(
    ("H", "Hv", "config"),
    [
        (32, 40, None),
        (40, 136, None),
        (24, 24, hopper.BackwardConfig(by_columns=True, stages=3)),
    ],
)
def test_gradients_of_what_modifies_logits(
    H: int, Hv: int, config: hopper.BackwardConfig | None
) -> None:
    """A bias of matrices that heads share, or do not, one by keys, slopes; a cap and a function."""
    if not mosaic.Sums.exist():
        pytest.skip("JAX 0.10.2 passes no mutable arrays to kernels")
    q, k, v = _normal(0, 2, 70, 4, H), _normal(1, 2, 150, 2, H), _normal(2, 2, 150, 2, Hv)
    dout, slopes = _normal(3, 2, 70, 4, Hv), jnp.linspace(0.1, 0.4, 4)
    all_of_them: list[dict[str, Any]] = [
        {"bias": _normal(4, 2, 1, 70, 150), "is_causal": True, "query_offset": 60},
        {"bias": _normal(4, 2, 4, 70, 150), "is_causal": True, "query_offset": 10},
        {"bias": _normal(4, 1, 4, 1, 150), "alibi_slopes": slopes, "is_causal": True},
        {
            "logits_soft_cap": 2.0,
            "score_mod": lambda s, b, h, q, k: jnp.where(q % 3 == 0, s * s, jnp.tanh(s)),
        },
    ]
    for options in all_of_them:
        problem, operands = canonicalize(q, k, v, **options)
        assert hopper.supports_backward(problem) is None
        _check_backward(problem, operands, dout, config)


@runs
@pytest.mark.parametrize(("H", "Hv"), [(24, 40), (136, 24)])
def test_heads_of_a_group_may_be_for_blocks_of_their_own(H: int, Hv: int) -> None:
    """They then add up the gradients of the keys that they share."""
    if not mosaic.Sums.exist():
        pytest.skip("JAX 0.10.2 passes no mutable arrays to kernels")
    q, k, v = _normal(0, 2, 70, 6, H), _normal(1, 2, 90, 2, H), _normal(2, 2, 90, 2, Hv)
    dout, slopes = _normal(3, 2, 70, 6, Hv), jnp.linspace(0.1, 0.4, 6)
    problem, operands = canonicalize(q, k, v, is_causal=True, query_offset=15, alibi_slopes=slopes)
    config = dataclasses.replace(hopper.BackwardConfig.default(problem), divides_groups=True)
    _check_backward(problem, operands, dout, config)


@runs
def test_keys_that_do_not_exist_take_no_part_in_gradients() -> None:
    """Their logits, 0, are so far above those of the others that exp of the difference overflows.

    The last tile of keys is half empty, and nobody's mask hides it.
    """
    if not mosaic.Sums.exist():
        pytest.skip("JAX 0.10.2 passes no mutable arrays to kernels")
    q, k, v = _normal(0, 1, 64, 1, 16), _normal(1, 1, 192, 1, 16), _normal(2, 1, 192, 1, 16)

    def gradients(implementation: str) -> Any:
        def loss(*qkv: jax.Array) -> jax.Array:
            bias = jnp.full((1, 1, 1, 192), -300.0)
            out = jaxflash.dot_product_attention(*qkv, bias, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    with _running():
        actual = gradients("hopper")
    for a, b in zip(actual, gradients("xla"), strict=True):
        difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
        assert np.abs(difference).max() <= 0.02 * np.abs(np.asarray(b, np.float32)).max()


@runs
@pytest.mark.parametrize("H", [24, 136])
def test_deterministic_gradients_are_right_where_keys_are_hidden(H: int) -> None:
    """Sums of integers: what a NaN that nobody sees must not touch, nor one row another."""
    if not mosaic.Sums.exist():
        pytest.skip("JAX 0.10.2 passes no mutable arrays to kernels")
    q, k, v, dout = (_normal(i, 1, 90, 2, H) for i in range(4))
    k, v = k.at[:, 80:].set(jnp.nan), v.at[:, 80:].set(jnp.nan)
    dout = dout.at[:, 3].multiply(1000)

    def gradients(implementation: str) -> Any:
        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jaxflash.dot_product_attention(
                q, k, v, is_causal=True, query_offset=-11, deterministic=True,
                implementation=implementation,
            )  # fmt: skip

        return jax.vjp(attention, q, k, v)[1](dout)

    with _running():
        actual = gradients("hopper")
    for found, expected in zip(actual, gradients("xla"), strict=True):
        a, b = np.asarray(found, np.float32), np.asarray(expected, np.float32)
        scale = np.abs(b).max(axis=-1, keepdims=True) + 1e-3 * np.abs(b).max()
        assert (np.abs(a - b) <= 0.05 * scale).all()


@needs_gpu
@pytest.mark.parametrize("H", [64, 128, 256])
def test_deterministic_gradients_are_equal_in_twenty_runs(H: int) -> None:
    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, pull = jax.vjp(
            functools.partial(_attention, is_causal=True, deterministic=True), q, k, v
        )
        return pull(jnp.sin(out))

    operands = [_normal(i, 2, 2001, 8, H) for i in range(3)]
    first = run(*operands)
    for _ in range(19):
        assert all(map(jnp.array_equal, run(*operands), first))


@runs
@pytest.mark.parametrize("H", [64, 136])
def test_deterministic_gradients_that_are_nan(H: int) -> None:
    """They are summed in integers, and no integer is NaN."""
    q, k, v = (_normal(i, 1, 200, 1, H) for i in range(3))
    with _running():
        out, pull = jax.vjp(
            functools.partial(_attention, is_causal=True, deterministic=True), q, k, v
        )
        dq = np.asarray(pull(jnp.ones_like(out).at[:, 70].set(jnp.nan))[0], np.float32)
    is_nan = np.arange(200) == 70
    assert np.isnan(dq[:, is_nan]).all()
    assert np.isfinite(dq[:, ~is_nan]).all()


@needs_gpu
@pytest.mark.parametrize("blocks", [20, 132])
@pytest.mark.parametrize("H", [64, 100, 128, 256])
@pytest.mark.parametrize(
    ("N", "K", "options"),
    [
        (8, 8, {}),
        (8, 8, {"is_causal": True}),
        (8, 2, {"is_causal": True, "local_window_size": (200, 0)}),
        (8, 4, {"is_causal": True, "deterministic": True}),
    ],
)
def test_kernel_that_rounds_dq(
    H: int, N: int, K: int, options: dict[str, Any], blocks: int
) -> None:
    """Lengths that no tile divides; few blocks begin to round before they have had all tiles.

    A block that reads too early is found.
    """
    q, k, v = (_normal(i, 4, 1001, heads, H) for i, heads in enumerate((N, K, K)))
    problem, operands = canonicalize(q, k, v, **options)
    config = dataclasses.replace(hopper.BackwardConfig.default(problem), rounds=True)
    for seed in range(10):
        _check_backward(problem, operands, _normal(seed, 4, 1001, N, H), config, blocks)


def test_backward_config_refuses() -> None:
    with pytest.raises(ValueError, match=r"block_q must be one of \(64, 128\); got 96"):
        hopper.BackwardConfig(block_q=96)
    with pytest.raises(ValueError, match=r"block_q must be one of \(64,\); got 128"):
        hopper.BackwardConfig(block_q=128, by_columns=True)
    with pytest.raises(ValueError, match="needs stages >= 2 and 1 or 2 key_stages"):
        hopper.BackwardConfig(stages=1)


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
    few = slice(-33, None)  # as many tiles as choose the same configuration
    assert jnp.array_equal(out[few], _attention(q[few], k[few], v[few]))


def test_staging_fills_each_place_in_turn() -> None:
    for columns in range(8, 257, 8):
        for staging in Staging.of(64, columns):
            groups, places = staging.groups(), staging.form.strips
            filled = [place for group in groups for place in group]
            assert len(filled) == staging.whole.strips
            assert all(group == sorted(set(group)) for group in groups)
            assert set(filled) == set(range(places))


@pytest.mark.parametrize("rows", [8, 16])
def test_few_rows_fit_as_they_are_laid_out(rows: int) -> None:
    """Each buffer starts at a multiple of 1024 bytes, two hold a number, barriers follow."""
    sizes = itertools.product(range(8, 257, 8), (64, 128, 192, 256), (64, 128), range(2, 7))
    for H, Hv, block_kv, stages in sizes:
        c = hopper.Config(1, block_kv, stages, q_stages=1, rows=rows, turned=True)
        staging = c.staging(H, Hv)
        if staging is None:
            continue
        k, v = mosaic.Form.of(block_kv, H), c.values(Hv, Sizes(2, 2, 2))
        forms = (mosaic.Form.of(rows, H), 1), (k, stages), (v, stages), (staging.form, 1)
        buffers = [2 * n * math.prod(piece) for form, n in forms for piece in form.pieces]
        buffers += [2 * P_BUFFERS * rows * block_kv, c.scratch_bytes, 4, 4]
        barriers = 8 * (4 * stages + 2 * 1 + 2)
        assert sum(-(-size // 1024) for size in buffers) * 1024 + barriers <= 227 * 1024


@pytest.mark.parametrize("H", range(8, 257, 8))
def test_every_head_dim_fits(H: int) -> None:
    def check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        problem, _ = canonicalize(q, k, v)
        assert hopper.Config.default(problem).staging(problem.H, problem.Hv) is not None

    for Hv in (8, 72, 128, 184, 256):
        shapes = [jax.ShapeDtypeStruct((1, 256, 1, n), jnp.bfloat16) for n in (H, H, Hv)]
        jax.eval_shape(check, *shapes)


def test_config_refuses() -> None:
    with pytest.raises(ValueError, match=r"consumers must be one of \[1, 2, 3, 4\]; got 5"):
        hopper.Config(consumers=5)
    with pytest.raises(ValueError, match="block_kv must be a multiple of 16 from 64 to 256"):
        hopper.Config(block_kv=32)
    with pytest.raises(ValueError, match="parts are multiples of 32 keys of visits one by one"):
        hopper.Config(block_kv=96, overlaps=False, parts=2)
    with pytest.raises(ValueError, match="needs stages >= 2 and 1 or 2 q_stages"):
        hopper.Config(stages=1)
