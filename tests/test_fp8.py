"""8-bit floating point: what quantising means, and attention of what it makes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxflash
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper
from pallas_kernels.spec import quantization as rules
from tests import oracle
from tests.test_conformance import INTERPRETS, ON_GPU, running

_RUNS_KERNELS = ON_GPU or INTERPRETS
_HOPPER = [pytest.param("hopper", marks=pytest.mark.kernel)] if _RUNS_KERNELS else []


def _random(*shape: int, seed: int = 0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


# ---------------------------------------------------------------------------- quantising


# Of a few sizes: each is compiled.
@given(
    tokens=st.sampled_from((1, 77, 128, 129, 256, 400)),
    columns=st.sampled_from((1, 5)),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_a_block_is_as_precise_as_its_largest_entry(tokens: int, columns: int, seed: int) -> None:
    x = _random(2, tokens, 3, 16 * columns, seed=seed)
    for turned in (False, True):
        scales = rules.scales_of(x)
        y = rules.dequantize(
            rules.quantize(x, scales, turned=turned), scales, tokens, turned=turned
        )
        blocks = -(-tokens // rules.SCALED)
        assert scales.shape == (2, blocks, 3)
        for i in range(blocks):
            part = np.s_[:, i * rules.SCALED : (i + 1) * rules.SCALED]
            a, b = (np.asarray(z[part].astype(jnp.float32)) for z in (x, y))
            largest = np.abs(a).max(axis=(1, 3), keepdims=True)
            # Half of the last bit, or half of the smallest step.
            allowed = np.maximum(np.abs(a) * 2**-4, largest / rules.LARGEST * 2**-10) * 1.001
            assert (np.abs(a - b) <= allowed).all()


@pytest.mark.parametrize("per", ["block", "head", "tensor"])
def test_scales_are_of_what_they_are_said_to_be(per: Any) -> None:
    x = _random(2, 300, 3, 32)
    x = x.at[1, 200, 2, 5].set(100)
    found = np.asarray(jaxflash.quantize(x, per=per).scales)
    usual = found.min()
    raised = {tuple(i) for i in np.argwhere(found > 10 * usual)}
    assert found.shape == (2, 3 if per == "block" else 1, 3)
    where = {"block": {(1, 1, 2)}, "head": {(1, 0, 2)}}
    assert raised == where.get(per, set())
    np.testing.assert_allclose(found.max(), 100 / rules.LARGEST, rtol=1e-6)


def test_order_of_operands() -> None:
    columns = rules.in_operand_order(np.arange(32))
    assert columns[:8].tolist() == [0, 1, 8, 9, 2, 3, 10, 11]
    np.testing.assert_array_equal(rules.from_operand_order(columns), np.arange(32))


@pytest.mark.parametrize("columns", [16, 48, 64, 80, 128, 256])
def test_rotation_keeps_products_and_spreads_what_is_large(columns: int) -> None:
    matrix = rules.hadamard(columns)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(columns), atol=1e-12)
    assert np.abs(matrix).max() <= 0.25


@pytest.mark.parametrize("options", [{}, {"is_value": True}, {"rotate": True}], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 300, 3, 64), (1, 128, 1, 128), (1, 5, 2, 192)] if _RUNS_KERNELS else [], ids=str
)
@pytest.mark.kernel
def test_kernel_quantises_as_jnp(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """But for what lies between two numbers to the last bit, which the rotation's sums decide."""
    x = _random(*shape)
    with running("hopper"):
        found = jaxflash.quantize(x, **options)
    with jax.ensure_compile_time_eval():
        want = jaxflash.quantize(x.astype(jnp.float32), **options)
    np.testing.assert_allclose(found.scales, want.scales, rtol=1e-6)
    a, b = (np.asarray(y.dequantize()) for y in (found, want))
    if options.get("rotate"):  # scales differ in the last bit, too
        assert np.mean(np.asarray(found.values) != np.asarray(want.values)) <= 0.001
    else:
        np.testing.assert_array_equal(a, b)
    step = float(jnp.max(want.scales)) * 2.0**-9  # of the smallest numbers
    np.testing.assert_allclose(a, b, rtol=0.13, atol=1.01 * step)


def test_quantized_array_is_a_pytree_that_looks_like_the_array() -> None:
    x = _random(2, 3, 100, 4, 32)
    q = jax.jit(functools.partial(jaxflash.quantize, is_value=True))(x)
    assert (q.shape, q.ndim, q.dtype) == (x.shape, x.ndim, jnp.bfloat16)
    assert q.values.shape == (2, 3, 32, 4, 128)
    assert jax.tree.structure(q) == jax.tree.structure(jax.tree.map(lambda y: y + 0, q))
    mapped = jax.vmap(functools.partial(jaxflash.quantize, is_value=True))(x)
    jax.tree.map(np.testing.assert_array_equal, q, mapped)


# ---------------------------------------------------------------------------- attention


def _attainable(
    query: jax.Array, key: jax.Array, value: jax.Array, options: dict[str, Any], backend: str
) -> jax.Array:
    """What rounding probabilities costs: the reference, with its weights rounded to e4m3.

    The largest of a row is 2^8; with `hopper` some number between 2^6 and 2^8.8, for they are
    relative to what was the largest before, as long as they fit.
    """
    eye = jnp.broadcast_to(jnp.eye(key.shape[1])[None, :, None], (*key.shape[:3], key.shape[1]))
    weights = _exact(query, key, eye, options)[0]  # [B, T, N, S]
    row = jnp.arange(query.shape[1])[:, None, None]
    largest = jnp.exp2(6 + 2.8 * (row * 0.618 % 1)) if backend == "hopper" else 256
    unit = jnp.max(weights, axis=3, keepdims=True) / largest
    unit = jnp.where(unit > 0, unit, 1)
    weights = (weights / unit).astype(rules.DTYPE).astype(jnp.float32) * unit
    value = jnp.repeat(value, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("btns,bsnh->btnh", weights, value, precision="highest")


def _exact(query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
    return jaxflash.dot_product_attention(
        query, key, value, **options, implementation="reference", return_residual=True
    )


_LENGTHS = jnp.array([150, 40], jnp.int32)
_IDS = jnp.repeat(jnp.arange(5, dtype=jnp.int32)[None], 2, 0).repeat(54, 1)
_CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "full": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "window": ({}, {"is_causal": True, "local_window_size": (70, 0)}),
    "grouped": ({"K": 1}, {"is_causal": True}),
    "wide": ({"H": 128, "Hv": 192}, {}),
    "narrow": ({"H": 16, "Hv": 48}, {"is_causal": True}),
    "lengths": ({}, {"key_value_seq_lengths": _LENGTHS, "query_seq_lengths": _LENGTHS - 15}),
    "documents": (
        {"T": 270},
        {"query_segment_ids": _IDS, "key_value_segment_ids": _IDS, "is_causal": True},
    ),
    "soft cap": ({}, {"logits_soft_cap": 2.0, "is_causal": True}),
    "sinks": ({}, {"sinks": jnp.array([1.0, -1.0]), "is_causal": True, "query_offset": -20}),
    "alibi": ({}, {"alibi_slopes": jnp.array([0.5, 0.1]), "is_causal": True}),
    "score_mod": ({}, {"score_mod": lambda s, b, h, q, k: s * 0.5 + h}),
    "negative scale": ({}, {"scale": -0.3}),
}


# Interpreted are those that differ most; all run on a GPU.
_INTERPRETED = ("full", "causal", "lengths", "documents", "soft cap", "wide")
_OF_HOPPER = _CASES if ON_GPU else _INTERPRETED if INTERPRETS else ()


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *(pytest.param("hopper", case, marks=pytest.mark.kernel) for case in _OF_HOPPER),
        *((backend, case) for backend in ("xla", "reference") for case in _CASES),
    ],
)
def test_out_and_lse(backend: Any, case: str) -> None:
    """Against the reference of what the quantised arrays stand for."""
    sizes, options = _CASES[case]
    at = {"T": 150, "S": 270, "K": 2, "H": 64, "Hv": 64} | sizes
    query, key, value = (
        _random(*shape, seed=i)
        for i, shape in enumerate(
            [
                (2, at["T"], 2, at["H"]),
                (2, at["S"], at["K"], at["H"]),
                (2, at["S"], at["K"], at["Hv"]),
            ]
        )
    )
    value = value.at[:, 128:].multiply(16)  # blocks of values have scales of their own
    given = [
        jaxflash.quantize(x, is_value=is_value)
        for x, is_value in ((query, False), (key, False), (value, True))
    ]
    with running(backend):
        out, lse = jaxflash.dot_product_attention(
            *given, **options, implementation=backend, return_residual=True
        )
    assert out.dtype == jnp.bfloat16
    _check(out, lse, [x.dequantize() for x in given], options, backend)


def _check(
    out: jax.Array, lse: jax.Array, wide: list[jax.Array], options: dict[str, Any], backend: str
) -> None:
    """Against the reference of what was multiplied."""
    with oracle.on_a_cpu():
        truth, lse_of_truth = _exact(*wide, options)
        attained = _attainable(*wide, options, backend)
    oracle.check_array(
        "out", *(np.asarray(x, np.float32) for x in (out, attained, truth)), jnp.bfloat16
    )
    by_tensor_cores = backend == "hopper" and ON_GPU
    error = 1e-4 + (_error_of_logits(wide[0], wide[1], options) if by_tensor_cores else 0)
    np.testing.assert_allclose(lse, lse_of_truth, rtol=1e-4, atol=error)


_ROUNDED: dict[str, tuple[int, Any, dict[str, Any], hopper.Config | None]] = {
    "64": (64, jnp.bfloat16, {"is_causal": True}, None),
    "128": (128, jnp.bfloat16, {}, None),
    "128 float16": (128, jnp.float16, {"is_causal": True}, None),
    "192": (192, jnp.bfloat16, {}, None),
    "256": (256, jnp.bfloat16, {"is_causal": True}, None),
    "lengths": (64, jnp.bfloat16, _CASES["lengths"][1], None),
    "overlapped": (128, jnp.bfloat16, {"is_causal": True}, hopper.Config(stages=4)),
    "apart": (
        64,
        jnp.bfloat16,
        {},
        hopper.Config(consumers=3, ping_pong=True, overlaps=False, parts=2),
    ),
}


@pytest.mark.kernel
@pytest.mark.skipif(not _RUNS_KERNELS, reason="this JAX cannot interpret the kernels")
@pytest.mark.parametrize("name", _ROUNDED if ON_GPU else ["64", "lengths", "overlapped", "apart"])
def test_queries_that_the_kernel_rounds(name: str) -> None:
    """Each 64 have a scale; those that are hidden may be NaN."""
    H, dtype, options, config = _ROUNDED[name]
    query, key, value = (_random(2, 470, 2, H, seed=i, dtype=dtype) for i in range(3))
    query *= jnp.exp2(jnp.arange(470) // 50 - 4.0).astype(dtype)[:, None, None]
    key, value = jaxflash.quantize(key), jaxflash.quantize(value, is_value=True)
    lengths = options.get("query_seq_lengths", jnp.full(2, 470))
    seen = (jnp.arange(470) < lengths[:, None])[..., None, None]
    problem, x = canonicalize(jaxflash.quantize(query), key, value, **options)
    x = x._replace(query=jnp.where(seen, query, jnp.nan), query_scale=None)
    problem = problem.of(x)
    assert hopper.rounds_queries(problem)
    with running("hopper"):
        out, lse = hopper.forward(problem, x, config, 3)  # blocks, with several tiles each
    assert out.dtype == dtype
    wide = [_in_blocks_of_64(jnp.where(seen, query, 0)), key.dequantize(), value.dequantize()]
    _check(out, lse, wide, options, "hopper")


def _in_blocks_of_64(x: jax.Array) -> jax.Array:
    """What rounding leaves of [B, T, N, H], float32."""
    B, T, N, H = x.shape
    blocks = jnp.pad(x, ((0, 0), (0, -T % 64), (0, 0), (0, 0))).reshape(-1, 64, N, H)
    scales = rules.scales_of(blocks, "head")
    rounded = rules.dequantize(rules.quantize(blocks, scales), scales, 64)
    return rounded.reshape(B, -1, N, H)[:, :T]


@pytest.mark.kernel
@pytest.mark.skipif(not _RUNS_KERNELS, reason="this JAX cannot interpret the kernels")
@pytest.mark.parametrize(
    "config",
    [
        hopper.Config(block_kv=192),
        hopper.Config(consumers=3, block_kv=96),
        hopper.Config(consumers=3, stages=3, ping_pong=True, overlaps=False, parts=2),
        hopper.Config(block_kv=192, q_stages=1, overlaps=False, parts=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"logits_soft_cap": 2.0}], ids=str)
def test_tiles_that_blocks_with_scales_cut(config: hopper.Config, options: Any) -> None:
    query, key, value = (_random(1, 290, 2, 64, seed=i) for i in range(3))
    factors = jnp.repeat(jnp.array([1.0, 8.0, 0.5], jnp.bfloat16), 128)[:290, None, None]
    rounded = [
        jaxflash.quantize(x * by, is_value=is_value)
        for x, by, is_value in ((query, 1, False), (key, factors, False), (value, factors, True))
    ]
    with running("hopper"):
        out, lse = hopper.forward(*canonicalize(*rounded, **options), config)
    _check(out, lse, [x.dequantize() for x in rounded], options, "hopper")


@pytest.mark.kernel
@pytest.mark.skipif(not _RUNS_KERNELS, reason="this JAX cannot interpret the kernels")
@pytest.mark.parametrize(
    "steps", [(0.09, -0.03, 0), (3, -1, 0), (30, -10, 0), (-10, -8, -40)], ids=str
)
def test_logits_that_grow_with_each_tile(steps: tuple[float, float, float]) -> None:
    """Keys are visited from the last to the first: of each block logits are larger, or negative."""
    first, of_block, of_odd = steps
    query, key, value = (_random(1, n, 1, 64, seed=i) for i, n in enumerate((130, 600, 600)))
    j = jnp.arange(600)
    logits = first + of_block * (j // 128) + of_odd * (j % 2)
    key = (key * 0.1).at[..., 0].set(logits[:, None].astype(key.dtype))
    query = (query * 0.1).at[..., 0].set(jnp.linspace(4, 8, 130)[:, None].astype(query.dtype))
    rounded = [jaxflash.quantize(x, is_value=i == 2) for i, x in enumerate((query, key, value))]
    config = hopper.Config(consumers=3, stages=3, ping_pong=True, overlaps=False, parts=2)
    with running("hopper"):
        out, lse = hopper.forward(*canonicalize(*rounded), config)
    _check(out, lse, [x.dequantize() for x in rounded], {}, "hopper")


def _error_of_logits(query: jax.Array, key: jax.Array, options: dict[str, Any]) -> float:
    """The most that tensor cores lose, which keep some 13 bits when they add products of 8 bits."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    sizes = jnp.einsum("btnh,bsnh->bnts", jnp.abs(query), jnp.abs(key), precision="highest")
    scale = options.get("scale", query.shape[-1] ** -0.5)
    return float(2.0**-13 * abs(scale) * jnp.max(sizes))


@pytest.mark.parametrize("backend", [*_HOPPER, "xla", "reference"])
def test_zeros(backend: Any) -> None:
    """Blocks of zeros have scales whose product is no zero: -inf * 0 of a hidden key is NaN."""
    zeros = jnp.zeros((1, 150, 1, 64), jnp.bfloat16)
    value = _random(1, 150, 1, 64)
    given = [jaxflash.quantize(x, is_value=i == 2) for i, x in enumerate((zeros, zeros, value))]
    with running(backend):
        out = jaxflash.dot_product_attention(*given, is_causal=True, implementation=backend)
    count = np.arange(1, 151)[:, None, None]
    mean = np.cumsum(np.asarray(given[2].dequantize(), np.float32), axis=1) / count
    np.testing.assert_allclose(np.asarray(out, np.float32), mean, atol=0.05)


@pytest.mark.parametrize("backend", [*_HOPPER, "xla"])
def test_small_values_beside_large_ones(backend: Any) -> None:
    """Rows that see only a block whose values are tiny lose them beside those of the largest."""
    query, key, value = _random(1, 256, 1, 64), _random(1, 256, 1, 64), _random(1, 256, 1, 64)
    value = value.at[:, :128].multiply(1e-3).at[:, 128:].multiply(1e3)
    given = [jaxflash.quantize(x, is_value=i == 2) for i, x in enumerate((query, key, value))]
    with running(backend):
        out = jaxflash.dot_product_attention(*given, is_causal=True, implementation=backend)
    want, _ = _exact(*(x.dequantize() for x in given), {"is_causal": True})
    out, want = (np.asarray(x, np.float32) for x in (out, want))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, 160:], want[:, 160:], atol=0.1 * np.abs(want).max())
    assert np.abs(out[:, :128]).max() <= 2 * np.abs(want[:, :128]).max()


@pytest.mark.parametrize("backend", [*_HOPPER, "xla", "reference"])
def test_precision_fp8_trains_straight_through(backend: Any) -> None:
    query, key, value = (_random(1, 150, 2, 64, seed=i) for i in range(3))

    def loss(precision: Any, implementation: Any, *x: jax.Array) -> jax.Array:
        out = jaxflash.dot_product_attention(
            *x, is_causal=True, precision=precision, implementation=implementation
        )
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    exact = jax.grad(functools.partial(loss, None, "reference"), (0, 1, 2))(query, key, value)
    with running(backend):
        found = jax.jit(jax.grad(functools.partial(loss, "fp8", backend), (0, 1, 2)))(
            query, key, value
        )
    assert all(x.dtype == jnp.bfloat16 for x in found)
    for pair in zip(found, exact, strict=True):
        got, want = (np.asarray(x, np.float32) for x in pair)
        assert np.linalg.norm(got - want) <= 0.15 * np.linalg.norm(want)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_precision_fp8_of_float64(backend: Any) -> None:
    """Results have the types they always have; gradients with operands that have none."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 40, 2, 32)))
        attend = functools.partial(
            jaxflash.dot_product_attention, precision="fp8", implementation=backend,
            key_value_seq_lengths=jnp.array([30], jnp.int32), return_residual=True,
        )  # fmt: skip
        found = attend(x, x, x)
        gradients = jax.grad(lambda *given: sum(map(jnp.sum, attend(*given))), (0, 1, 2))(x, x, x)
    assert [y.dtype for y in (*found, *gradients)] == [jnp.float64] * 5
    assert all(np.isfinite(y).all() for y in gradients)


def test_precision_fp8_is_quantising_by_block() -> None:
    query, key, value = (_random(1, 150, 2, 32, seed=i) for i in range(3))
    given = [jaxflash.quantize(x, is_value=i == 2) for i, x in enumerate((query, key, value))]
    np.testing.assert_array_equal(
        jaxflash.dot_product_attention(query, key, value, precision="fp8"),
        jaxflash.dot_product_attention(*given),
    )
    np.testing.assert_array_equal(  # which asks for nothing more
        jaxflash.dot_product_attention(*given, precision="fp8"),
        jaxflash.dot_product_attention(*given),
    )


def test_what_lengths_hide_may_be_nan() -> None:
    lengths = jnp.array([100], jnp.int32)
    query, key, value = (_random(1, 150, 2, 32, seed=i) for i in range(3))
    attend = functools.partial(
        jaxflash.dot_product_attention, key_value_seq_lengths=lengths, precision="fp8"
    )
    spoiled = attend(query, key.at[:, 100:].set(jnp.nan), value.at[:, 100:].set(jnp.inf))
    clean = attend(query, key.at[:, 100:].set(0), value.at[:, 100:].set(0))
    np.testing.assert_array_equal(spoiled, clean)


def test_what_a_band_hides_from_all_may_be_nan() -> None:
    query = _random(1, 100, 2, 32)
    key, value = (_random(1, 150, 2, 32, seed=i) for i in (1, 2))
    attend = functools.partial(jaxflash.dot_product_attention, is_causal=True, precision="fp8")
    spoiled = attend(query, key.at[:, 100:].set(jnp.nan), value.at[:, 100:].set(jnp.inf))
    clean = attend(query, key.at[:, 100:].set(0), value.at[:, 100:].set(0))
    np.testing.assert_array_equal(spoiled, clean)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)], ids=str)
def test_nothing_is_quantised(shape: tuple[int, ...]) -> None:
    x = jnp.ones(shape)
    for per in ("block", "head", "tensor"):
        found = jaxflash.quantize(x, per=per, is_value=True)  # type: ignore[arg-type]
        assert found.dequantize().shape == shape
        assert found.scales.shape[::2] == shape[::2]
    for backend in ("xla", "reference"):
        attend = functools.partial(jaxflash.dot_product_attention, implementation=backend)
        assert attend(x, x, x, precision="fp8").shape == shape


def test_refusals() -> None:
    x = _random(1, 64, 2, 32)
    q, v = jaxflash.quantize(x), jaxflash.quantize(x, is_value=True)
    attend = jaxflash.dot_product_attention
    with pytest.raises(TypeError, match="quantised all or none"):
        attend(q, x, x)
    with pytest.raises(TypeError, match="quantised all or none"):
        attend(q, *[x.astype(jnp.float32)] * 2)
    with pytest.raises(ValueError, match="with is_value=True"):
        attend(q, q, q)
    with pytest.raises(ValueError, match="rotated both or none"):
        attend(jaxflash.quantize(x, rotate=True), q, v)
    with pytest.raises(ValueError, match="values are not rotated"):
        jaxflash.quantize(x, is_value=True, rotate=True)
    with pytest.raises(ValueError, match="per must be one of"):
        jaxflash.quantize(x, per="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least three axes"):
        jaxflash.quantize(x[0, 0])
    with pytest.raises(TypeError, match="quantised arrays have no gradients"):
        jax.grad(lambda sinks: jnp.sum(attend(q, q, v, sinks=sinks).astype(jnp.float32)))(
            jnp.zeros(2)
        )
    problem, _ = canonicalize(x, x, x, precision="fp8")
    assert problem.is_in_8_bits
    reasons = jaxflash.explain(x, x, x, precision="fp8").refusals
    assert reasons["xla"] is None
