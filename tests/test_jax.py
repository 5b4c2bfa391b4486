"""jaxflash as a citizen of JAX: transformations, sharding, export."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxflash
from tests.oracle import error
from tests.test_conformance import INTERPRETS, KERNELS, running

B, T, S, N, K, H = 4, 40, 56, 4, 4, 8


def _arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "query": normal(B, T, N, H),
        "key": normal(B, S, K, H),
        "value": normal(B, S, K, H),
        "bias": normal(N, T, S),
        "mask": jnp.asarray(rng.random((B, 1, T, S)) < 0.8),
        "query_seq_lengths": jnp.asarray([40, 3, 0, 17], jnp.int32),
        "key_value_seq_lengths": jnp.asarray([56, 56, 9, 30], jnp.int32),
        "query_offset": jnp.asarray([16, 0, 5, -3], jnp.int32),
        "query_segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (B, T))), jnp.int32),
        "key_value_segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (B, S))), jnp.int32),
        "alibi_slopes": jnp.abs(normal(N)),
        "sinks": normal(N),
        "captured": normal(N),
        "dropout_key": jax.random.key_data(jax.random.key(3)),
    }


def _attend(arrays: dict[str, Any], implementation: str = "xla") -> jax.Array:
    options = dict(arrays)
    captured = options.pop("captured")
    return jaxflash.dot_product_attention(
        **options,
        is_causal=True,
        logits_soft_cap=4.0,
        score_mod=lambda s, b, h, q, k: s * captured[h],
        dropout_rate=0.2,
        implementation=implementation,
    )


def _loss(arrays: dict[str, Any], implementation: str = "xla") -> jax.Array:
    return jnp.sum(jnp.sin(_attend(arrays, implementation)))


def _split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    floating = {k: x for k, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return floating, {k: x for k, x in arrays.items() if k not in floating}


# Two float32 computations are compared; how exact each is, test_conformance tells.
def _assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda x, y: _assert_near(np.asarray(x), np.asarray(y), tolerance), a, b)


def _assert_near(x: np.ndarray, y: np.ndarray, tolerance: float) -> None:
    assert error(x, y) <= tolerance


@pytest.mark.parametrize(
    "transform", [jax.grad, jax.value_and_grad, jax.jacrev], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_reverse_mode(transform: Callable[..., Any], jit: bool) -> None:
    floating, others = _split(_arrays())
    wrap = jax.jit if jit else lambda f: f
    actual = wrap(transform(lambda f: _loss({**f, **others})))(floating)
    truth = transform(lambda f: _loss({**f, **others}, "reference"))(floating)
    _assert_close(actual, truth)


@pytest.mark.parametrize("name", _arrays())
def test_vmap_over_one_argument(name: str) -> None:
    arrays = _arrays()
    stacked = jnp.stack([arrays[name], jnp.roll(arrays[name], 1, axis=0)])

    def run(x: jax.Array) -> jax.Array:
        return _attend({**arrays, name: x})

    _assert_close(jax.vmap(run)(stacked), jnp.stack([run(x) for x in stacked]))


def test_vmap_over_all_arguments_and_gradients() -> None:
    stacked = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 1, 0), x]), _arrays())
    floating, others = _split(stacked)
    run = jax.grad(lambda f, o: _loss({**f, **o}))
    loop = [run(*jax.tree.map(lambda x, i=i: x[i], (floating, others))) for i in range(3)]
    expected = jax.tree.map(lambda *xs: jnp.stack(xs), *loop)
    _assert_close(jax.vmap(run)(floating, others), expected)


def test_vmap_over_inner_and_nested_axes() -> None:
    arrays = _arrays()
    q, k, v = arrays["query"], arrays["key"], arrays["value"]
    whole = jaxflash.dot_product_attention(q, k, v)
    over_heads = jax.vmap(
        lambda q, k, v: jaxflash.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None]),
        in_axes=2,
        out_axes=2,
    )
    _assert_close(over_heads(q, k, v)[:, :, :, 0], whole)
    nested = jax.vmap(jax.vmap(jaxflash.dot_product_attention, in_axes=0), in_axes=(None, 0, 0))
    shared = nested(q, jnp.stack([k, 2 * k]), jnp.stack([v, v]))
    _assert_close(shared[1], jaxflash.dot_product_attention(q, 2 * k, v))


def _calls(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """How often a program runs the forward and the backward."""
    text = str(jax.make_jaxpr(function)(*args))
    return text.count("name=forward"), text.count("name=backward")


def test_checkpoint_policy_saves_the_forward() -> None:
    arrays = _arrays()

    def block(q: jax.Array) -> jax.Array:
        out = jaxflash.dot_product_attention(jnp.sin(q), arrays["key"], arrays["value"])
        return jnp.sum(jnp.cos(out))

    policy = jax.checkpoint_policies.save_only_these_names(*jaxflash.CHECKPOINT_NAMES)
    saving = jax.grad(jax.checkpoint(block, policy=policy))
    assert _calls(saving, arrays["query"]) == (1, 1)
    assert _calls(jax.grad(jax.checkpoint(block)), arrays["query"]) == (2, 1)
    expected = jax.grad(block)(arrays["query"])
    _assert_close(saving(arrays["query"]), expected)
    _assert_close(jax.grad(jax.checkpoint(block))(arrays["query"]), expected)


def test_dropout_survives_rematerialisation() -> None:
    floating, others = _split(_arrays())

    def loss(f: dict[str, Any]) -> jax.Array:
        return _loss({**f, **others})

    _assert_close(jax.grad(jax.checkpoint(loss))(floating), jax.grad(loss)(floating))


def test_dropout_keys() -> None:
    x = _arrays()["query"]

    def drop(key: jax.Array) -> jax.Array:
        return jaxflash.dot_product_attention(x, x, x, dropout_rate=0.5, dropout_key=key)

    typed, raw = jax.random.key(1), jax.random.PRNGKey(1)
    np.testing.assert_array_equal(drop(typed), drop(raw))
    assert not np.array_equal(drop(typed), drop(jax.random.key(2)))


def test_hessian() -> None:
    arrays = _arrays()
    k, v = arrays["key"][:1, :6, :1], arrays["value"][:1, :6, :1]

    def hessian(implementation: str) -> jax.Array:
        def loss(q: jax.Array) -> jax.Array:
            out = jaxflash.dot_product_attention(
                q, k, v, is_causal=True, logits_soft_cap=2.0, implementation=implementation
            )
            return jnp.sum(jnp.sin(out))

        return jax.hessian(loss)(arrays["query"][:1, :6, :1])

    _assert_close(hessian("xla"), hessian("reference"))


def test_forward_over_reverse() -> None:
    floating, others = _split(_arrays())

    def hessian_vector(implementation: str) -> Any:
        gradient = jax.grad(lambda f: _loss({**f, **others}, implementation))
        return jax.jvp(gradient, (floating,), (jax.tree.map(jnp.cos, floating),))[1]

    _assert_close(hessian_vector("xla"), hessian_vector("reference"))


def _mesh() -> Mesh:
    assert len(jax.devices()) == 8, "tests/conftest.py asks for eight CPU devices"
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("batch", "head"))


_BY_BATCH_AND_HEAD = P("batch", None, "head")


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool) -> None:
    """Gradients too, of operands that are sharded and of ones that are replicated."""
    arrays = _arrays()
    names = ("query", "key", "value", "key_value_seq_lengths", "sinks", "alibi_slopes", "bias")
    given = {k: arrays[k] for k in names}
    specs = dict.fromkeys(("query", "key", "value"), _BY_BATCH_AND_HEAD)
    specs |= {"key_value_seq_lengths": P("batch"), "bias": P("head")}
    specs |= {"sinks": P("head"), "alibi_slopes": P("head")}
    lengths = given.pop("key_value_seq_lengths")

    def attend(given: dict[str, Any], lengths: jax.Array, implementation: str) -> jax.Array:
        return jaxflash.dot_product_attention(
            **given, key_value_seq_lengths=lengths, is_causal=True, implementation=implementation
        )

    sharded = jax.shard_map(
        lambda g, lengths: attend(g, lengths, "xla"),
        mesh=_mesh(),
        in_specs=({k: specs[k] for k in given}, specs["key_value_seq_lengths"]),
        out_specs=_BY_BATCH_AND_HEAD,
        check_vma=check_vma,
    )
    actual = jax.jit(jax.grad(lambda g: jnp.sum(jnp.sin(sharded(g, lengths)))))(given)
    truth = jax.grad(lambda g: jnp.sum(jnp.sin(attend(g, lengths, "reference"))))(given)
    _assert_close(actual, truth)


@pytest.mark.parametrize("backend", ["xla", *(KERNELS if INTERPRETS else ())])
def test_results_vary_over_the_axes_of_operands(backend: Any) -> None:
    """Of a result typed as the same on all devices, cotangents would be summed over them."""
    x, cache = (jnp.zeros((B, n, 2, 64), jnp.bfloat16) for n in (64, 128))
    found: list[jax.Array] = []

    def local(x: jax.Array, cache: jax.Array) -> jax.Array:
        options = {"implementation": backend, "return_residual": True}

        def attend(x: jax.Array) -> Any:
            return jaxflash.dot_product_attention(x, x, x, **options)

        results, pull = jax.vjp(attend, x)
        lengths = jnp.full(len(x), 100, jnp.int32)
        decoded = jaxflash.decode_attention(x[:, :1], cache, cache, lengths, **options)
        quantized = jaxflash.quantize(x)
        found.extend(jax.tree.leaves((results, pull(results), decoded, quantized)))
        return results[0]

    sharded = jax.shard_map(local, mesh=_mesh(), in_specs=P("batch"), out_specs=P("batch"))
    with running(backend):
        jax.make_jaxpr(sharded)(x, cache)
    assert len(found) == 7
    assert {jax.typeof(y).manual_axis_type.varying for y in found} == {frozenset({"batch"})}


def test_shard_map_with_functions_of_elements() -> None:
    """Their captured arrays are summed over devices; with check_vma the refusal says what to do."""
    arrays = _arrays()
    qkv = tuple(arrays[k] for k in ("query", "key", "value"))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return jaxflash.dot_product_attention(
            q, k, v, score_mod=lambda s, b, h, i, j: s + w * (i - j) / 50, is_causal=True
        )

    def loss(w: jax.Array, check_vma: bool) -> jax.Array:
        specs = (*(_BY_BATCH_AND_HEAD,) * 3, P())
        sharded = jax.shard_map(
            attend, mesh=_mesh(), in_specs=specs, out_specs=specs[0], check_vma=check_vma
        )
        return jnp.sum(jnp.sin(sharded(*qkv, w)))

    actual = jax.jit(jax.grad(lambda w: loss(w, False)))(0.3)
    _assert_close(actual, jax.grad(lambda w: jnp.sum(jnp.sin(attend(*qkv, w))))(0.3))
    with pytest.raises(ValueError, match=r"score_mod inside jax\.shard_map needs check_vma=False"):
        loss(jnp.float32(0.3), True)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_sharded_batch_and_heads_need_no_gather(with_lengths: bool) -> None:
    mesh = _mesh()
    arrays = _arrays()
    sharding = NamedSharding(mesh, _BY_BATCH_AND_HEAD)
    qkv = tuple(jax.device_put(arrays[k], sharding) for k in ("query", "key", "value"))
    lengths = jax.device_put(arrays["key_value_seq_lengths"], NamedSharding(mesh, P("batch")))
    options = {"key_value_seq_lengths": lengths} if with_lengths else {}

    def gradient(implementation: str) -> Callable[..., Any]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = jaxflash.dot_product_attention(
                q, k, v, is_causal=True, implementation=implementation, **options
            )
            return jnp.sum(jnp.sin(out))

        return jax.grad(loss, (0, 1, 2))

    compiled = jax.jit(gradient("xla")).lower(*qkv).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    actual = compiled(*qkv)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in actual)
    _assert_close(actual, gradient("reference")(*(arrays[k] for k in ("query", "key", "value"))))


def test_export_round_trip() -> None:
    floating, others = _split(_arrays())
    function = jax.jit(jax.grad(lambda f, o: _loss({**f, **o})))
    exported = jax.export.export(function)(floating, others)
    restored = jax.export.deserialize(exported.serialize())
    _assert_close(restored.call(floating, others), function(floating, others), 0.0)


def test_eval_shape() -> None:
    x = jax.ShapeDtypeStruct((3, 2, 16, 6, 8), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((3, 2, 20, 2, 8), jnp.bfloat16)
    v = jax.ShapeDtypeStruct((3, 2, 20, 2, 10), jnp.bfloat16)

    def attend(*qkv: jax.Array) -> Any:
        return jaxflash.dot_product_attention(*qkv, return_residual=True)

    out, lse = jax.eval_shape(attend, x, kv, v)
    assert (out.shape, out.dtype) == ((3, 2, 16, 6, 10), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((3, 2, 16, 6), jnp.float32)


def test_lse_cotangent_alone() -> None:
    arrays = _arrays()

    def lse(q: jax.Array, implementation: str) -> jax.Array:
        options = {"return_residual": True, "implementation": implementation}
        result = jaxflash.dot_product_attention(q, arrays["key"], arrays["value"], **options)
        return jnp.sum(jnp.sin(result[1]))

    _assert_close(
        jax.grad(lse)(arrays["query"], "xla"), jax.grad(lse)(arrays["query"], "reference")
    )


def test_memory_is_linear_in_the_sequence() -> None:
    """Twice the tokens need about twice the temporary memory, forward and backward."""

    def temporary_bytes(length: int, implementation: str) -> int:
        x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)

        def loss(*qkv: jax.Array) -> jax.Array:
            return jnp.sum(jaxflash.dot_product_attention(*qkv, implementation=implementation))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = [temporary_bytes(length, "xla") for length in (2048, 4096, 8192)]
    assert ours[1] < 2.2 * ours[0]
    assert ours[2] < 2.2 * ours[1]
    matrix = 4 * 8192 * 8192 * 4
    assert ours[2] < matrix / 10
    assert temporary_bytes(8192, "reference") > matrix


def _scan_lengths(jaxpr: Any) -> list[int]:
    """Lengths of all scans of a program, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found.append(equation.params["length"])
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                found += _scan_lengths(inner)
    return found


@pytest.mark.parametrize(
    ("options", "visible"),
    [
        ({}, 16 * 16),
        ({"is_causal": True}, 16 * 17 // 2),
        ({"local_window_size": (0, 0)}, 16),
        ({"local_window_size": (1, 0)}, 16 + 15),
        ({"is_causal": True, "query_offset": -1024}, 8 * 9 // 2),
    ],
)
def test_tiles_that_nobody_sees_are_not_visited(options: dict[str, Any], visible: int) -> None:
    """2048 x 2048 with 64 heads of all batches is cut into 16 x 16 tiles of 128 x 128 for a CPU."""
    x = jax.ShapeDtypeStruct((4, 2048, 16, 8), jnp.float32)

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(jaxflash.dot_product_attention(*qkv, **options))

    for program, walks in ((loss, 1), (jax.grad(loss), 2)):
        assert sum(_scan_lengths(jax.make_jaxpr(program)(x, x, x).jaxpr)) == walks * visible
