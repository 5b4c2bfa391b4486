"""The models of the bench: caches, training, and that attention by `jax.nn` gives the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.models import serving, training
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
from bench.models.packing import pack

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


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_changes_no_result(name: str) -> None:
    """Of many rows, and of one, whose products are sums."""

    def shifted(x: jax.Array) -> jax.Array:
        return x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)

    model = Decoder(_small(name), dtype=jnp.float32, rngs=nnx.Rngs(0))
    # Norms and biases are trivial at first.
    nnx.update(model, jax.tree.map(shifted, nnx.state(model, nnx.Param)))
    tokens = jax.random.randint(jax.random.key(0), (2, 20), 0, 61)
    inputs = tokens, tokens[:1, :1]
    want = [model(x) for x in inputs]
    pack(model)
    matrices = [x for x in jax.tree.leaves(nnx.state(model, nnx.Param)) if x.ndim > 1]
    assert len(matrices) <= 4 * 2 + 3  # of two layers, and embeddings and the head
    for x, logits in zip(inputs, want, strict=True):
        np.testing.assert_allclose(model(x), logits, atol=1e-5)


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
