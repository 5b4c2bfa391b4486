"""Flax's own modules with the drop-in, and the modules of both APIs, against plain computations."""

from __future__ import annotations

import doctest
import functools
import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxflash
import jaxflash.linen
import jaxflash.nnx
from jaxflash.modules import rope as rope_module

DROP_INS = {"linen": jaxflash.linen, "nnx": jaxflash.nnx}
FLAX = {"linen": nn, "nnx": nnx}


def _normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


class Situation(NamedTuple):
    """What Flax's function is called with."""

    query: tuple[int, ...] = (2, 12, 4, 8)
    keys: int = 12
    kv_heads: int = 4
    value_dim: int = 8
    dtype: Any = jnp.float32
    bias: tuple[int, ...] | None = None
    mask: Any = None
    options: tuple[tuple[str, Any], ...] = ()


_CAUSAL = nn.make_causal_mask(jnp.ones((2, 12)))  # float32
_PADDED = jnp.arange(12) < jnp.array([[12], [5]])
SITUATIONS = {
    "plain": Situation(),
    "no batch": Situation(query=(12, 4, 8)),
    "two batch axes": Situation(query=(2, 3, 12, 4, 8)),
    "cross attention": Situation(query=(2, 5, 4, 8)),
    "value dim": Situation(value_dim=6),
    "bfloat16": Situation(dtype=jnp.bfloat16),
    "computed in bfloat16": Situation(options=(("dtype", jnp.bfloat16),)),
    "causal mask of numbers": Situation(mask=_CAUSAL),
    "combined masks": Situation(
        mask=nn.combine_masks(_CAUSAL, nn.make_attention_mask(_PADDED | True, _PADDED))
    ),
    "boolean mask": Situation(mask=nn.make_causal_mask(jnp.ones((2, 12)), dtype=bool)),
    "mask of two axes": Situation(mask=jnp.tril(jnp.ones((12, 12), bool))),
    "bias": Situation(bias=(2, 4, 12, 12)),
    "bias of heads, with a mask": Situation(bias=(1, 4, 1, 12), mask=_CAUSAL),
    "dropout that is off": Situation(options=(("dropout_rate", 0.5), ("deterministic", True))),
}


# nnx's function calls jax.nn's, which wants a batch axis and values as wide as keys.
@pytest.mark.parametrize(
    ("api", "name"),
    [("linen", name) for name in SITUATIONS]
    + [("nnx", name) for name in SITUATIONS if name not in ("no batch", "value dim")],
)
def test_drop_in_gives_what_flax_gives(api: str, name: str) -> None:
    """The result and every gradient; in bfloat16 half as near to float32 as Flax, or nearer."""
    case = SITUATIONS[name]
    query, key = _normal(0, *case.query), (*case.query[:-3], case.keys, case.kv_heads, 8)
    arrays = {
        "query": query,
        "key": _normal(1, *key),
        "value": _normal(2, *key[:-1], case.value_dim),
        "bias": None if case.bias is None else _normal(3, *case.bias),
    }
    cotangent = _normal(4, *case.query[:-1], case.value_dim)

    def results(function: Any, dtype: Any, options: dict[str, Any]) -> list[np.ndarray]:
        given = jax.tree.map(lambda x: x.astype(dtype), arrays)
        out, pull = jax.vjp(lambda x: function(**x, mask=case.mask, **options), given)
        found = [out, *jax.tree.leaves(pull(cotangent.astype(out.dtype)))]
        return [np.asarray(x, np.float32) for x in found]

    flax = FLAX[api].dot_product_attention
    options = dict(case.options)
    exact = {k: x for k, x in options.items() if k != "dtype"}
    truth = results(flax, jnp.float32, exact)
    theirs = results(flax, case.dtype, options)
    ours = results(DROP_INS[api].dot_product_attention, case.dtype, options)
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert mine.shape == true.shape
        assert np.abs(mine - true).max() <= 2 * np.abs(other - true).max() + 2e-5


@pytest.mark.parametrize("api", FLAX)
def test_drop_in_names_what_flax_passes(api: str) -> None:
    """Linen leaves out what a signature does not name, the mask too."""
    ours, flax = (
        inspect.signature(f.dot_product_attention).parameters for f in (DROP_INS[api], FLAX[api])
    )
    assert list(flax) == [name for name in ours if name in flax]
    for name, parameter in flax.items():
        assert ours[name].default == parameter.default, name


@pytest.mark.parametrize("api", FLAX)
def test_drop_in_shares_dropout_as_flax_does(api: str) -> None:
    attention = functools.partial(
        DROP_INS[api].dot_product_attention, dropout_rng=jax.random.key(0), dropout_rate=0.5
    )
    query = jnp.zeros((2, 64, 3, 8))  # all weights are equal: the result tells what was kept
    value = jnp.broadcast_to(jnp.eye(64)[:, None], (2, 64, 3, 64))
    shared, own = (
        attention(query, query, value, broadcast_dropout=is_shared) > 0
        for is_shared in (True, False)
    )
    for kept in (shared, own):
        assert abs(float(kept.mean()) - 0.5) < 0.05
    assert bool((shared == shared[:1, :, :1]).all())
    for other in (own[1, :, 0], own[0, :, 1]):
        assert abs(float((own[0, :, 0] == other).mean()) - 0.5) < 0.05
    again = attention(query, query, value, broadcast_dropout=True, deterministic=True)
    np.testing.assert_allclose(again, 1 / 64, rtol=1e-5)


@pytest.mark.parametrize("api", FLAX)
def test_drop_in_refuses_what_it_cannot_do(api: str) -> None:
    x = jnp.ones((1, 4, 2, 8))
    attention = functools.partial(DROP_INS[api].dot_product_attention, x, x, x)
    with pytest.raises(ValueError, match="none to sow"):
        attention(module=nn.Dense(1))
    with pytest.raises(ValueError, match="one precision for both operands"):
        attention(precision=("default", "highest"))
    with pytest.raises(ValueError, match="needs a dropout_rng"):
        attention(dropout_rate=0.1)
    with pytest.raises(ValueError, match="see the first of 4 keys only"):
        DROP_INS[api].dot_product_attention(x[:, :1], x, x, is_causal=True)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        attention(no_such_option=1)
    if api == "linen":
        with pytest.raises(ValueError, match="takes no qk_attn_weights_einsum"):
            attention(qk_attn_weights_einsum=jnp.einsum)


def test_linen_module_with_the_drop_in() -> None:
    """Mask, dropout, decode mode: as the module does with Flax's function."""
    x = _normal(0, 2, 6, 16)
    make = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4, normalize_qk=True)
    flax = make()
    ours = make(attention_fn=jaxflash.linen.dot_product_attention)
    variables = flax.init(jax.random.key(1), x)
    for mask in (None, nn.make_causal_mask(x[..., 0])):
        np.testing.assert_allclose(
            ours.apply(variables, x, mask=mask), flax.apply(variables, x, mask=mask), atol=1e-5
        )
    dropping = make(attention_fn=jaxflash.linen.dot_product_attention, dropout_rate=0.5)
    kept = dropping.apply(variables, x, deterministic=True)
    np.testing.assert_allclose(kept, flax.apply(variables, x), atol=1e-5)
    dropped = [
        dropping.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(i)})
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert float(jnp.abs(dropped[0] - dropped[2]).max()) > 0.01
    with pytest.raises(ValueError, match="none to sow"):
        ours.apply(variables, x, sow_weights=True, mutable=["intermediates"])


def test_linen_decode_mode_with_the_drop_in() -> None:
    x = _normal(0, 2, 6, 16)
    make = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4, decode=True)
    outputs = []
    for layer in (make(), make(attention_fn=jaxflash.linen.dot_product_attention)):
        variables = layer.init(jax.random.key(1), x)
        cache, found = variables["cache"], []
        for t in range(6):
            given = {"params": variables["params"], "cache": cache}
            out, changed = layer.apply(given, x[:, t : t + 1], mutable=["cache"])
            cache = changed["cache"]
            found.append(out)
        outputs.append(jnp.concatenate(found, axis=1))
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    whole = nn.MultiHeadDotProductAttention(num_heads=4)
    want = whole.apply({"params": variables["params"]}, x, mask=nn.make_causal_mask(x[..., 0]))
    np.testing.assert_allclose(outputs[1], want, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_nnx_module_with_the_drop_in(num_kv_heads: int) -> None:
    """Mask, causality, dropout, decode mode: as the module does with Flax's function."""
    x = _normal(0, 2, 6, 16)
    make = functools.partial(nnx.MultiHeadAttention, 4, 16, num_kv_heads=num_kv_heads)
    ours_fn = jaxflash.nnx.dot_product_attention
    flax = make(decode=False, rngs=nnx.Rngs(0))
    ours = make(decode=False, attention_fn=ours_fn, rngs=nnx.Rngs(0))
    for options in ({}, {"is_causal": True}, {"mask": nn.make_causal_mask(x[..., 0])}):
        np.testing.assert_allclose(ours(x, **options), flax(x, **options), atol=1e-5)
    dropping = make(decode=False, attention_fn=ours_fn, dropout_rate=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(dropping(x, deterministic=True), flax(x), atol=1e-5)
    first, second = (dropping(x, deterministic=False) for _ in range(2))
    assert float(jnp.abs(first - second).max()) > 0.01
    with pytest.raises(ValueError, match="none to sow"):
        ours(x, sow_weights=True)
    want = flax(x, is_causal=True)
    decoder = make(decode=True, attention_fn=ours_fn, rngs=nnx.Rngs(0))
    decoder.init_cache(x.shape)
    found = jnp.concatenate([decoder(x[:, t : t + 1]) for t in range(6)], axis=1)
    np.testing.assert_allclose(found, want, atol=1e-5)


# The modules of jaxflash, of both APIs.


class Layer:
    """One of the two modules, with its parameters: called alike."""

    def __init__(self, api: str, features: int, **options: Any) -> None:
        if api == "nnx":
            module: Any = jaxflash.nnx.MultiHeadAttention(
                in_features=features, **options, rngs=nnx.Rngs(0)
            )
            self.parameters = nnx.to_pure_dict(nnx.state(module, nnx.Param))
            self._call = module
            return
        linen: Any = jaxflash.linen.MultiHeadAttention(**options)
        example = jnp.zeros((1, 2, features))
        variables = linen.init(jax.random.key(0), example, deterministic=True)
        self.parameters = variables["params"]
        self._call = functools.partial(self._apply, linen, variables)

    @staticmethod
    def _apply(linen: Any, variables: Any, *args: Any, **options: Any) -> Any:
        return linen.apply(variables, *args, **options, rngs={"dropout": jax.random.key(5)})

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._call(*args, **options)


def _expected(parameters: Any, x: jax.Array, rope: Any, options: dict[str, Any]) -> jax.Array:
    """The layer spelled out."""

    def project(name: str) -> jax.Array:
        p = parameters[name]
        return jnp.einsum("btd,dnh->btnh", x, p["kernel"]) + p["bias"]

    query, key, value = map(project, ("query", "key", "value"))
    if "query_norm" in parameters:
        query, key = (
            y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6) * parameters[name]["scale"]
            for name, y in (("query_norm", query), ("key_norm", key))
        )
    if rope is not None:
        positions = jnp.arange(x.shape[1])
        query, key = rope(query, positions), rope(key, positions)
    attended = jaxflash.dot_product_attention(
        query, key, value, sinks=parameters.get("sinks"), implementation="reference", **options
    )
    out = parameters["out"]
    return jnp.einsum("btnh,nhd->btd", attended, out["kernel"]) + out["bias"]


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2, "is_causal": True},
    "rope": {"is_causal": True, "rope": jaxflash.Rope()},
    "everything": {
        "num_kv_heads": 1,
        "is_causal": True,
        "rope": jaxflash.Rope(base=500.0, dims=4, interleaved=True, scale=2.0),
        "normalize_qk": True,
        "local_window_size": (3, 0),
        "logits_soft_cap": 5.0,
        "scale": 0.3,
        "use_sinks": True,
        "head_dim": 8,
    },
}


@pytest.mark.parametrize("api", FLAX)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_what_it_says(api: str, name: str) -> None:
    given = LAYERS[name]
    x = _normal(0, 2, 9, 16)
    layer = Layer(api, 16, num_heads=4, **given)
    of_attention = ("is_causal", "local_window_size", "logits_soft_cap", "scale")
    options = {k: given[k] for k in of_attention if k in given}
    want = _expected(layer.parameters, x, given.get("rope"), options)
    np.testing.assert_allclose(layer(x), want, atol=1e-5)


@pytest.mark.parametrize("api", FLAX)
@pytest.mark.parametrize("name", ["grouped", "everything"])
@pytest.mark.parametrize("is_paged", [False, True])
def test_tokens_one_by_one_give_what_all_give(api: str, name: str, is_paged: bool) -> None:
    """A prompt of a length of its own for each sequence, then tokens, against no cache."""
    given = LAYERS[name]
    x = _normal(0, 2, 20, 16)
    layer = Layer(api, 16, num_heads=4, **given)
    want = layer(x)
    heads, head_dim = given.get("num_kv_heads", 4), given.get("head_dim", 4)
    cache: Any
    if is_paged:
        cache = jaxflash.PagedKVCache.zeros(
            5, 16, heads, head_dim, batch=2, max_pages=2, dtype=jnp.float32
        ).with_tables([[4, 0], [1, 3]])
    else:
        cache = jaxflash.KVCache.zeros(2, 32, heads, head_dim, dtype=jnp.float32)
    prompts = jnp.array([7, 12])
    out, cache = layer(x[:, :12], cache=cache, counts=prompts)
    for b, count in enumerate(prompts):
        np.testing.assert_allclose(out[b, :count], want[b, :count], atol=1e-5)
    for step in range(8):
        at = prompts + step
        token = jnp.take_along_axis(x, at[:, None, None], axis=1)
        out, cache = layer(token, cache=cache)
        np.testing.assert_array_equal(cache.lengths, at + 1)
        there = jnp.take_along_axis(want, at[:, None, None], axis=1)
        np.testing.assert_allclose(out, there, atol=1e-5)


@pytest.mark.parametrize("api", FLAX)
def test_layer_of_other_inputs(api: str) -> None:
    """Masks, documents, positions, keys of another sequence."""
    x, other = _normal(0, 2, 9, 16), _normal(1, 2, 5, 16)
    layer = Layer(api, 16, num_heads=4)
    crossed = layer(x, other)
    assert crossed.shape == x.shape
    first = layer(x, other[:, :3])
    np.testing.assert_allclose(layer(x, other, mask=jnp.arange(5) < 3), first, atol=1e-5)
    causal = Layer(api, 16, num_heads=4, is_causal=True, rope=jaxflash.Rope())
    documents = jnp.array([[0] * 4 + [1] * 5] * 2, jnp.int32)
    positions = jnp.array([*range(4), *range(5)], jnp.int32)
    apart = jnp.concatenate([causal(x[:, :4]), causal(x[:, 4:])], axis=1)
    packed = causal(x, segment_ids=documents, positions=positions)
    np.testing.assert_allclose(packed, apart, atol=1e-5)


@pytest.mark.parametrize("api", FLAX)
def test_layer_drops(api: str) -> None:
    x = _normal(0, 2, 9, 16)
    layer = Layer(api, 16, num_heads=4, dropout_rate=0.5)
    kept, dropped = layer(x, deterministic=True), layer(x, deterministic=False)
    np.testing.assert_allclose(kept, _expected(layer.parameters, x, None, {}), atol=1e-5)
    assert float(jnp.abs(kept - dropped).max()) > 0.01
    with pytest.raises(ValueError, match="pass deterministic"):
        layer(x)


@pytest.mark.parametrize("api", FLAX)
def test_layer_errors(api: str) -> None:
    x = jnp.ones((2, 3, 16))
    cache = jaxflash.KVCache.zeros(2, 8, 4, 4, dtype=jnp.float32)
    layer = Layer(api, 16, num_heads=4)
    with pytest.raises(ValueError, match="attention to a cache is causal"):
        layer(x, cache=cache)
    with pytest.raises(ValueError, match="counts are of tokens for a cache"):
        layer(x, counts=jnp.array([1, 2]))
    with pytest.raises(ValueError, match="positions are for rope"):
        layer(x, positions=jnp.arange(3))
    causal = Layer(api, 16, num_heads=4, is_causal=True, rope=jaxflash.Rope())
    with pytest.raises(ValueError, match="mask cannot be combined with a cache"):
        causal(x, cache=cache, mask=jnp.ones((3, 3), bool))
    with pytest.raises(ValueError, match="inputs_kv cannot be combined with a cache"):
        causal(x, x, cache=cache)
    with pytest.raises(ValueError, match="exceed the capacity of 8"):
        causal(jnp.ones((2, 6, 16)), cache=causal(x, cache=cache)[1], debug_checks=True)
    with pytest.raises(ValueError, match="rope needs queries and keys of the same tokens"):
        causal(x, x[:, :2])
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads"):
        Layer(api, 16, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="set head_dim"):
        Layer(api, 18, num_heads=4)


def test_nnx_layer_in_a_training_step() -> None:
    """`nnx.jit`, `nnx.grad` and dropout's state, over a few steps."""
    x = _normal(0, 4, 8, 16)
    layer = jaxflash.nnx.MultiHeadAttention(
        4, 16, is_causal=True, use_sinks=True, dropout_rate=0.1, rngs=nnx.Rngs(0)
    )
    layer.train()

    @nnx.jit
    def step(layer: Any) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda layer: jnp.mean((layer(x) - x) ** 2))(layer)
        state = nnx.state(layer, nnx.Param)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.5 * g, state, gradients))
        return loss

    losses = [float(step(layer)) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert float(jnp.abs(layer.sinks[...]).max()) > 0
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))


def test_rope() -> None:
    """Against complex numbers; logits depend on distances alone."""
    x = np.asarray(_normal(0, 3, 4, 2, 8), np.float64)
    positions = np.array([5, 0, 2, 9])
    for interleaved in (False, True):
        rope = jaxflash.Rope(base=100.0, dims=6, interleaved=interleaved, scale=2.0)
        first, second = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
        angles = positions[:, None, None] / 2.0 * 100.0 ** (-np.arange(3) / 3)
        turned = (first + 1j * second) * np.exp(1j * angles)
        pairs = [turned.real, turned.imag]
        want = np.stack(pairs, -1).reshape(3, 4, 2, 6) if interleaved else np.concatenate(pairs, -1)
        found = rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions))
        np.testing.assert_allclose(found[..., :6], want, atol=1e-5)
        np.testing.assert_allclose(found[..., 6:], x[..., 6:], atol=1e-6)
    query, key = _normal(1, 1, 1, 8), _normal(2, 1, 1, 8)
    rope = jaxflash.Rope()
    near, far = (
        jnp.vdot(rope(query, jnp.array([p + 3])), rope(key, jnp.array([p]))) for p in (0, 1000)
    )
    np.testing.assert_allclose(near, far, rtol=1e-3)
    with pytest.raises(ValueError, match="dims must be even"):
        jaxflash.Rope(dims=3)
    with pytest.raises(ValueError, match="base must be positive"):
        jaxflash.Rope(base=-1.0)
    with pytest.raises(ValueError, match="cannot rotate 8 of 6 elements"):
        jaxflash.Rope(dims=8)(jnp.ones((1, 1, 6)), jnp.arange(1))


@pytest.mark.parametrize("module", [jaxflash.linen, jaxflash.nnx, rope_module])
def test_examples_in_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 3
    assert result.failed == 0
