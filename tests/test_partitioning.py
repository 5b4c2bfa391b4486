"""Kernels under jit over a mesh: no gather, and gradients that devices share are summed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxflash
from jaxflash import xla
from jaxflash.arguments import canonicalize
from jaxflash.gathering import gathering
from jaxflash.partitioning import partitioned
from pallas_kernels.spec import narrow

_IDS = np.repeat(np.array([[0, 1, 2, 3]] * 4, np.int32), 6, axis=1)
_ROWS = {"query_segment_ids": _IDS, "key_value_segment_ids": _IDS}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "lengths": {"key_value_seq_lengths": np.array([24, 0, 3, 20], np.int32)},
    "documents": {"is_causal": True} | _ROWS,
    "slopes and sinks": {
        "alibi_slopes": np.linspace(0.1, 0.5, 8, dtype=np.float32),
        "sinks": np.linspace(-1, 2, 8, dtype=np.float32),
    },
    "bias of all": {"bias": np.linspace(-1, 1, 24 * 24, dtype=np.float32).reshape(1, 1, 24, 24)},
    "bias of heads": {"bias": np.linspace(-1, 1, 8 * 24, dtype=np.float32).reshape(1, 8, 1, 24)},
}
FLOATING = ("bias", "alibi_slopes", "sinks")


def _arrays(K: int = 4) -> dict[str, jax.Array]:
    sizes = {"query": (4, 24, 8, 16), "key": (4, 24, K, 16), "value": (4, 24, K, 16)}
    return {
        name: jax.random.normal(jax.random.key(i), size)
        for i, (name, size) in enumerate(sizes.items())
    }


def _with_gradients(is_partitioned: bool, options: dict[str, Any], arrays: dict[str, Any]) -> Any:
    forward, backward = (
        partitioned(f) if is_partitioned else f for f in (xla.forward, xla.backward)
    )
    problem, operands = canonicalize(**arrays, **options)
    out, lse = forward(problem, operands)
    return out, backward(problem, operands, out, lse, jnp.cos(out), jnp.sin(lse))


def _mesh() -> Any:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("name", OPTIONS)
def test_batch_and_heads_stay_where_they_are(name: str) -> None:
    options = OPTIONS[name]
    given = _arrays() | {n: options[n] for n in FLOATING if n in options}
    static = {n: x for n, x in options.items() if n not in FLOATING}
    by_head = NamedSharding(_mesh(), P("data", None, "model"))
    sharded = {
        n: jax.device_put(x, by_head) if np.ndim(x) == 4 and n != "bias" else x
        for n, x in given.items()
    }
    run = jax.jit(functools.partial(_with_gradients, True, static)).lower(sharded).compile()
    text = run.as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    # Only what has no axis of batch or heads is summed over devices.
    assert ("all-reduce" in text) == any(n in options for n in FLOATING)
    out, gradients = run(sharded)
    assert out.sharding.is_equivalent_to(by_head, out.ndim)
    assert gradients.key.sharding.is_equivalent_to(by_head, out.ndim)
    expected = _with_gradients(False, static, given)
    for mine, right in zip(
        jax.tree.leaves((out, gradients)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(mine, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["rows", "few key heads", "one key head", "function"])
def test_any_other_sharding_gives_the_same(case: str) -> None:
    """What cannot be divided is gathered."""
    spec = P("data", "model") if case == "rows" else P("data", None, "model")
    arrays = _arrays({"few key heads": 2, "one key head": 1}.get(case, 4))
    options: dict[str, Any] = {"is_causal": True}
    if case == "function":
        options["score_mod"] = lambda s, b, h, q, k: s + 0.1 * b - 0.2 * h * (q - k)
    mesh = _mesh()
    placed = {
        n: jax.device_put(x, NamedSharding(mesh, spec if x.shape[2] % 4 == 0 else P("data")))
        for n, x in arrays.items()
    }
    found = jax.jit(functools.partial(_with_gradients, True, options))(placed)
    expected = _with_gradients(False, options, arrays)
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    "by", [P("data", None, "model"), P("data", "model")], ids=["heads", "rows"]
)
def test_explicit_axes(implementation: Any, by: P) -> None:
    """Types say how arrays are sharded: every backend works on each device's part."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    slopes = jnp.linspace(0.1, 0.5, 8)

    def loss(arrays: dict[str, jax.Array], slopes: jax.Array) -> jax.Array:
        out = jaxflash.dot_product_attention(
            **arrays, is_causal=True, alibi_slopes=slopes, implementation=implementation
        )
        return jnp.sum(jnp.sin(out))

    expected = jax.grad(loss, (0, 1))(_arrays(), slopes)
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(x, NamedSharding(mesh, by)) for n, x in _arrays().items()}
        run = jax.jit(jax.grad(loss, (0, 1))).lower(placed, slopes).compile()
        found = run(placed, slopes)
    assert ("all-gather" in run.as_text()) == (by == P("data", "model"))
    for mine, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, right, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("manual", [{"data"}, {"data", "model"}], ids=["some", "all"])
def test_inside_shard_map(manual: set[str]) -> None:
    """Over some axes or over all."""
    mesh, arrays = _mesh(), _arrays()
    by = P("data", None, "model" if "model" in manual else None)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        problem, operands = canonicalize(q, k, v, is_causal=True)
        return partitioned(xla.forward)(problem, operands)[0]

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=by, out_specs=by, axis_names=manual)
    found = jax.jit(sharded)(*arrays.values())
    np.testing.assert_allclose(found, attend(*arrays.values()), atol=2e-5)


@pytest.mark.parametrize("checks", [True, False])
def test_inside_shard_map_without_jit(checks: bool) -> None:
    mesh, arrays, by = _mesh(), _arrays(), P("data", None, "model")
    attend = functools.partial(jaxflash.dot_product_attention, is_causal=True)
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=by, out_specs=by, check_vma=checks)
    np.testing.assert_allclose(
        sharded(*arrays.values()), attend(*arrays.values()), atol=2e-5, rtol=1e-4
    )


def test_explicit_axes_without_jit() -> None:
    attend = functools.partial(jaxflash.dot_product_attention, is_causal=True)
    expected = attend(**_arrays())
    with jax.set_mesh(
        jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    ):
        by = NamedSharding(jax.sharding.get_mesh(), P("data", None, "model"))
        found = attend(**{n: jax.device_put(x, by) for n, x in _arrays().items()})
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("by", [P(None, "model"), P(None, None, "model")], ids=["tokens", "heads"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_one_token_is_appended_where_its_place_is(by: P, axis_type: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    token = jnp.ones((1, 1, 8, 16))
    with jax.set_mesh(mesh):
        held = jax.device_put(jnp.zeros((1, 64, 8, 16)), NamedSharding(mesh, by))
        lengths = jax.device_put(jnp.array([20], jnp.int32), NamedSharding(mesh, P()))
        cache = jaxflash.KVCache(held, held, lengths)
        run = jax.jit(jaxflash.KVCache.append).lower(cache, token, token).compile()
        assert "all-gather" not in run.as_text()
        after = run(cache, token, token)
    assert after.lengths.tolist() == [21]
    assert np.flatnonzero(np.asarray(after.key).any(axis=(0, 2, 3))).tolist() == [20]


_TABLE = np.array([[5, 2], [7, 1], [0, 3], [4, 6]], np.int32)
_HELD = np.array([24, 9, 32, 17], np.int32)


def _of_cache(kind: str) -> tuple[tuple[Any, ...], tuple[P, ...]]:
    """What attention to a cache takes, and how a mesh of batch and heads divides it."""
    query, *caches = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(4, 2, 8, 16), *[(8, 16, 4, 16)] * 2])
    )
    by_head = P("data", None, "model")
    if kind == "contiguous":
        whole = [x.reshape(4, 32, 4, 16) for x in caches]
        return (query, *whole, jnp.asarray(_HELD)), (by_head, by_head, by_head, P("data"))
    of_pages, of_scales = P(None, None, "model"), P(None, "model")
    places = (by_head, of_pages, of_pages, P("data"), P("data"))
    sequences = jnp.asarray(_TABLE), jnp.asarray(_HELD)
    if kind == "pages":
        return (query, *caches, *sequences), places
    pages, scales = zip(*(narrow.of_pages(x, jnp.int8) for x in caches), strict=True)
    return (query, *pages, *sequences, *scales), (*places, of_scales, of_scales)


def _attend(*arrays: Any) -> Any:
    query, key, value, *sequences = arrays
    if len(sequences) == 1:
        return jaxflash.decode_attention(*arrays)
    table, lengths, *scales = sequences
    named = dict(zip(("key_scale", "value_scale"), scales, strict=False))
    return jaxflash.paged_attention(query, key, value, table, lengths, **named)


@pytest.mark.parametrize("kind", ["contiguous", "pages", "pages-of-8-bits"])
def test_explicit_axes_of_caches(kind: str) -> None:
    arrays, places = _of_cache(kind)
    expected = _attend(*arrays)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, by)) for x, by in zip(arrays, places, strict=True)
        ]
        run = jax.jit(_attend).lower(*placed).compile()
        found = run(*placed)
    assert "all-gather" not in run.as_text()
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["pages", "pages-of-8-bits"])
def test_pages_stay_where_they_are(kind: str) -> None:
    """Under jit alone: pages are divided by heads, sequences by the batch."""
    arrays, places = _of_cache(kind)

    def attend(query: Any, key: Any, value: Any, table: Any, lengths: Any, *scales: Any) -> Any:
        problem, x = canonicalize(
            query,
            *(jnp.zeros((4, 0, 4, 16)),) * 2,
            is_causal=True,
            query_offset=lengths - 2,
            key_value_seq_lengths=lengths,
        )
        named = dict(zip(("key_scale", "value_scale"), scales, strict=False))
        x = x._replace(key=key, value=value, page_table=table, **named)
        return partitioned(gathering(xla.forward))(problem.of(x), x)[0]

    placed = [
        jax.device_put(x, NamedSharding(_mesh(), by)) for x, by in zip(arrays, places, strict=True)
    ]
    run = jax.jit(attend).lower(*placed).compile()
    assert "all-gather" not in run.as_text()
    np.testing.assert_allclose(run(*placed), _attend(*arrays), atol=2e-5)


def test_explain_tells_what_is_gathered() -> None:
    mesh = _mesh()

    def told(by: P, K: int = 4, **options: Any) -> str | None:
        q, k = (
            jax.ShapeDtypeStruct((4, 24, n, 16), jnp.float32, sharding=NamedSharding(mesh, by))
            for n in (8, K)
        )
        return jaxflash.explain(q, k, k, **options).sharding

    by_head = P("data", None, "model")
    assert told(by_head) == "divided: batch over data, heads over model"
    assert told(by_head, 2) == "divided: batch over data; gathered: heads over model"
    assert told(by_head, 1) == told(by_head)
    assert told(P(None, ("data", "model"))) == "gathered: tokens over data and model"
    everything = "gathered: batch over data, heads over model"
    assert told(by_head, score_mod=lambda s, b, h, q, k: s * h) == everything
    assert told(P()) is None
    x = jax.ShapeDtypeStruct((4, 24, 8, 16), jnp.float32)
    assert jaxflash.explain(x, x, x).sharding is None
