"""The models of the bench: caches, training, and that attention by `jax.nn` gives the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.models import few_rows, one_token, serving, training
from bench.models.config import MODELS, Config
from bench.models.decoder import Attention, Decoder
from bench.models.generate import (
    contiguous_caches,
    decode,
    generate,
    paged_caches,
    prefill,
    random_model,
    sample,
    structure_of,
)
from pallas_kernels import mosaic
from tests.test_conformance import INTERPRETS

pytestmark = pytest.mark.bench


def _small(name: str) -> Config:
    """A model of a family, with all that distinguishes it, in small."""
    config = MODELS[name]
    rope = config.rope
    if rope is not None and rope.dims is not None:
        rope = dataclasses.replace(rope, dims=4)
    grouped = config.kv_heads is not None and config.kv_heads < config.heads
    return dataclasses.replace(
        config,
        vocabulary=61,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2 if grouped else None,
        hidden=48,
        positions=64 if config.positions else 0,
        rope=rope,
    )


FAMILIES = ("llama-2-70b", "gpt-2", "gpt-j-6b", "gpt-neox-20b")


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_are_the_published_ones(name: str) -> None:
    """Weights of the real model within 1%, of the small one exactly, but for norms and biases."""
    published = {"llama-2-70b": 69.0e9, "gpt-2": 124e6, "gpt-j-6b": 6.05e9, "gpt-neox-20b": 20.6e9}
    assert abs(MODELS[name].weights / published[name] - 1) < 0.01
    config = _small(name)
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    matrices = [x for x in jax.tree.leaves(state) if x.ndim > 1 and x.shape != (4, 8)]
    assert sum(x.size for x in matrices) == config.weights


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("attention", [None, "standard"])
def test_tokens_one_by_one_give_what_all_give(name: str, attention: Attention) -> None:
    config = _small(name)
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, config.vocabulary)
    structure, parameters = random_model(config, None, jnp.float32)
    want = nnx.merge(structure, parameters)(tokens)
    model = structure_of(config, attention, jnp.float32), parameters
    np.testing.assert_allclose(nnx.merge(*model)(tokens), want, atol=1e-4)
    contiguous = contiguous_caches(config, 2, 32, jnp.float32)
    paged = tuple(
        cache.with_tables([[3, 1], [0, 2]])  # type: ignore[union-attr]
        for cache in paged_caches(config, 2, 4, 2, page_size=16, dtype=jnp.float32)
    )
    counts = jnp.array([12, 7], jnp.int32)
    for caches in (contiguous, paged):
        logits, held = prefill(*model, caches, tokens[:, :12], counts)
        for step in range(6):
            at = (counts + step)[:, None]
            before = jnp.take_along_axis(want, at[..., None] - 1, axis=1)[:, 0]
            np.testing.assert_allclose(logits, before, atol=1e-4)
            token = jnp.take_along_axis(tokens, at, axis=1)
            logits, held = nnx.merge(*model).extend(token, held)
        assert held[-1].lengths.tolist() == [18, 13]


def test_sampling() -> None:
    """Temperature 0 takes the likeliest, 1 draws as probabilities say."""
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    keys = jax.random.split(jax.random.key(0), 3000)
    drawn = jax.vmap(lambda key: sample(logits[None], key, 1.0)[0])(keys)
    share = np.bincount(np.asarray(drawn), minlength=3) / len(keys)
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.04)
    assert sample(logits[None], keys[0], 0.0).tolist() == [0]


def test_decoding_in_parts_goes_on() -> None:
    config = _small("llama-2-70b")
    model = random_model(config, None, jnp.float32)
    prompts, counts = jnp.array([[5, 9, 2]]), jnp.array([3], jnp.int32)
    whole = generate(model, contiguous_caches(config, 1, 16, jnp.float32), prompts, counts, 8)
    caches = contiguous_caches(config, 1, 16, jnp.float32)
    logits, caches = prefill(*model, caches, prompts, counts)
    first, logits, caches = decode(*model, caches, logits, jax.random.key(1), 5)
    second, _, caches = decode(*model, caches, logits, jax.random.key(2), 3)
    np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), whole)
    assert caches[0].lengths.tolist() == [11]


def _gradients(config: Config, attention: Attention, tokens: jax.Array) -> Any:
    setup = training.trainer(config, attention, jnp.float32)
    parameters = training.initial(config, setup, jnp.float32).parameters
    return jax.value_and_grad(lambda p: training.loss(setup, p, tokens))(parameters)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_loss_is_the_models(name: str) -> None:
    """The loop over stacked blocks gives what the model gives, and gradients as jax.nn does."""
    config = _small(name)
    tokens = jax.random.randint(jax.random.key(0), (2, 17), 0, config.vocabulary)
    value, gradients = _gradients(config, "xla", tokens)
    standard, others = _gradients(config, "standard", tokens)
    np.testing.assert_allclose(value, standard, rtol=1e-5)
    for found, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5)
    setup = training.trainer(config, "xla", jnp.float32)
    ends, blocks = training.initial(config, setup, jnp.float32).parameters
    model = Decoder(config, attention="xla", dtype=jnp.float32, rngs=nnx.Rngs(0))
    nnx.update(model.ends, ends)
    for i, block in enumerate(model.blocks):
        nnx.update(block, jax.tree.map(lambda x, i=i: x[i], blocks))
    picked = jax.nn.log_softmax(model(tokens[:, :-1]))
    want = -jnp.take_along_axis(picked, tokens[:, 1:, None], axis=-1).mean()
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_training_steps_learn() -> None:
    config = _small("llama-2-70b")
    setup = training.trainer(config, None, jnp.float32, rate=3e-3)
    state = jax.jit(lambda: training.initial(config, setup, jnp.float32))()
    step = jax.jit(lambda s, t: training.step(setup, s, t), donate_argnums=0)
    tokens = jax.random.randint(jax.random.key(0), (4, 17), 0, config.vocabulary)
    losses = []
    for _ in range(40):
        state, value = step(state, tokens)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_training_keeps_attention_and_runs_it_once() -> None:
    """Of a block the input is kept, and attention's results: gradients run no forward again."""
    config = _small("llama-2-70b")
    setup = training.trainer(config, "xla", jnp.float32)
    parameters = jax.eval_shape(lambda: training.initial(config, setup, jnp.float32)).parameters
    tokens = jax.ShapeDtypeStruct((2, 17), jnp.int32)
    _, pull = jax.eval_shape(
        lambda p, t: jax.vjp(lambda p: training.loss(setup, p, t), p), parameters, tokens
    )
    kept = [x.shape for x in jax.tree.leaves(pull) if x.ndim > 1 and x.shape[0] == config.layers]
    of_tokens = sorted(shape for shape in kept if shape[1:3] == (2, 16))
    lse, out, inputs = (2, 2, 16, 4), (2, 2, 16, 4, 8), (2, 2, 16, 32)
    assert of_tokens == sorted([lse, out, inputs])


@pytest.mark.parametrize("pages", [None, 5])
def test_serving_answers_as_each_request_alone(pages: int | None) -> None:
    """More requests than slots, and than pages; chunks and rounds that end within answers."""
    config = _small("llama-2-70b")
    model = random_model(config, None, jnp.float32)
    requests = serving.random_requests(6, config.vocabulary, (3, 20), (1, 9))
    memory = serving.Memory(slots=3, capacity=32, pages=pages, page_size=16, dtype="float32")
    server = serving.Server(model, config, memory, chunk=8, steps=4)
    served = server.serve(requests)
    assert 1 < served.users <= 3
    for request, answer in zip(requests, served.answers, strict=True):
        caches = contiguous_caches(config, 1, 32, jnp.float32)
        counts = jnp.array([len(request.prompt)], jnp.int32)
        alone = generate(model, caches, jnp.asarray(request.prompt)[None], counts, 9)
        np.testing.assert_array_equal(answer, alone[0, : request.tokens])
    with pytest.raises(ValueError, match="exceeds the capacity"):
        server.serve([serving.Request(requests[0].prompt, 40)])


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRETS, reason="kernels are not interpreted with this JAX")
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "blocks"),
    [
        (1, 512, (256, 128), 3),  # units of shares, which blocks have several of
        (3, 384, (1024,), 3),
        (8, 256, (128, 128, 256), 5),
        (2, 128, (128,), 2),  # a block without work
    ],
)
def test_products_of_few_rows(
    rows: int, inputs: int, outputs: tuple[int, ...], blocks: int
) -> None:
    keys = jax.random.split(jax.random.key(0), 1 + len(outputs))
    x = jax.random.normal(keys[0], (rows, inputs), jnp.bfloat16)
    matrices = [
        jax.random.normal(key, (inputs, size), jnp.bfloat16)
        for key, size in zip(keys[1:], outputs, strict=True)
    ]
    with mosaic.interpreting():
        shares = few_rows.products(x, matrices, matrices[:1], blocks=blocks)
    want = _product(x, jnp.concatenate(matrices, axis=1))
    np.testing.assert_allclose(jnp.sum(shares, axis=0), want, atol=1e-3)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) @ matrix.astype(jnp.float32)


def test_lean_tokens_are_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels but the products, which the test above has; a full cache keeps its tokens."""

    def products(x: jax.Array, matrices: Any, following: Any) -> jax.Array:
        assert all(len(matrix) % 128 == 0 for matrix in following)
        return jnp.stack([_product(x, jnp.concatenate(matrices, axis=1)) * f for f in (0.25, 0.75)])

    monkeypatch.setattr(few_rows, "products", products)
    sizes = {"vocabulary": 256, "width": 384, "hidden": 512, "heads": 6, "kv_heads": 2}
    config = dataclasses.replace(MODELS["llama-2-7b"], layers=2, **sizes)
    model = random_model(config, None)
    prompts, counts = jnp.array([[5, 9, 2, 7], [8, 3, 1, 4]]), jnp.array([4, 2], jnp.int32)
    _, caches = prefill(*model, contiguous_caches(config, 2, 4), prompts, counts)
    assert not one_token.is_for(config, caches)  # there is no GPU for it

    @jax.jit
    def both(parameters: Any, caches: Any) -> Any:
        decoder, token = nnx.merge(model.structure, parameters), jnp.array([[11], [12]])
        return decoder.extend(token, caches), one_token.extend(decoder, token, caches)

    (want, filled), (found, own) = both(model.parameters, caches)
    np.testing.assert_allclose(found[1], want[1], atol=0.1)
    for ours, theirs in zip(own, filled, strict=True):
        assert ours.lengths.tolist() == theirs.lengths.tolist() == [4, 3]
        for x, y in ((ours.key, theirs.key), (ours.value, theirs.value)):
            np.testing.assert_allclose(*(z.astype(jnp.float32) for z in (x, y)), atol=0.05)
    with mosaic.interpreting():  # as if there were one
        assert one_token.is_for(config, caches)
        assert not one_token.is_for(dataclasses.replace(config, mlp_bias=True), caches)
        assert not one_token.is_for(MODELS["gpt-j-6b"], caches)
