"""Prompts in, tokens out: prefill and decoding as compiled steps with caches that are donated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import jaxflash
from bench.models.config import Config
from bench.models.decoder import Attention, Cache, Decoder
from bench.models.packing import pack

Caches = tuple[Cache, ...]


class Model(NamedTuple):
    """A decoder as a value: its structure, known at trace time, and its arrays."""

    structure: Any
    parameters: Any


def random_model(
    config: Config, attention: Attention, dtype: Any = jnp.bfloat16, *, packed: bool = False
) -> Model:
    """With random weights, made on the device; ``packed``: see `packing`."""
    of_one = dataclasses.replace(config, layers=1)  # which compiles soon

    @jax.jit
    def make(seed: jax.Array) -> Any:
        rngs = nnx.Rngs(jax.random.key(seed, impl="rbg"))  # likewise
        return nnx.state(_decoder(of_one, attention, dtype, packed, rngs))

    parameters = make(0)
    for i in range(1, config.layers):
        parameters["blocks"][i] = make(i)["blocks"][0]
    return Model(structure_of(config, attention, dtype, packed=packed), parameters)


def structure_of(
    config: Config, attention: Attention, dtype: Any = jnp.bfloat16, *, packed: bool = False
) -> Any:
    """Of the same decoder; no array is made."""
    return nnx.graphdef(
        nnx.eval_shape(lambda: _decoder(config, attention, dtype, packed, nnx.Rngs(0)))
    )


def _decoder(
    config: Config, attention: Attention, dtype: Any, packed: bool, rngs: nnx.Rngs
) -> Decoder:
    model = Decoder(config, attention=attention, dtype=dtype, rngs=rngs)
    if packed:
        pack(model)
    return model


def contiguous_caches(
    config: Config, batch: int, capacity: int, dtype: Any = jnp.bfloat16
) -> Caches:
    """An empty cache for each layer."""
    return tuple(
        jaxflash.KVCache.zeros(
            batch, capacity, config.key_value_heads, config.head_dim, dtype=dtype
        )
        for _ in range(config.layers)
    )


def paged_caches(
    config: Config,
    batch: int,
    pages: int,
    max_pages: int,
    page_size: int = 64,
    dtype: Any = jnp.bfloat16,
) -> Caches:
    """The same in pages; all layers have one table."""
    return tuple(
        jaxflash.PagedKVCache.zeros(
            pages,
            page_size,
            config.key_value_heads,
            config.head_dim,
            batch=batch,
            max_pages=max_pages,
            dtype=dtype,
        )
        for _ in range(config.layers)
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    structure: Any, parameters: Any, caches: Caches, prompts: jax.Array, counts: jax.Array
) -> tuple[jax.Array, Caches]:
    """Logits [B, vocabulary] after prompts [B, T], of which ``counts`` [B] tokens each exist."""
    return nnx.merge(structure, parameters).extend(prompts, caches, counts)


_OPTIONS = {
    # So that the projections of one input, and the MLP's two, are one product each where they are
    # not packed: XLA merges matrices of up to 32 MB by default.
    "xla_gpu_dot_merger_threshold_mb": 1024,
    # So that kernels which do not depend on each other run at the same time.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2, compiler_options=_OPTIONS)
def decode(
    structure: Any,
    parameters: Any,
    caches: Caches,
    logits: jax.Array,
    key: jax.Array,
    steps: int,
    temperature: float | jax.Array = 0.0,
) -> tuple[jax.Array, jax.Array, Caches]:
    """So many tokens after logits [B, vocabulary].

    Returns:
      Tokens int32 [B, steps], the logits after them, and the caches.
    """
    model = nnx.merge(structure, parameters)

    def step(state: tuple[jax.Array, Caches], key: jax.Array) -> Any:
        logits, caches = state
        token = sample(logits, key, temperature)
        logits, caches = model.extend(token[:, None], caches)
        return (logits, _others_with(None, caches)), token

    # Lengths are alike, and `extend` reads those of the first: the others would be copied along.
    state = logits, _others_with(None, caches)
    (logits, caches), tokens = lax.scan(step, state, jax.random.split(key, steps))
    return tokens.T, logits, _others_with(caches[0].lengths, caches)


def _others_with(lengths: Any, caches: Caches) -> Caches:
    """The same, with these lengths in all but the first."""
    first, *others = caches
    return first, *(dataclasses.replace(cache, lengths=lengths) for cache in others)


def sample(logits: jax.Array, key: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """A token for each row, int32 [B]; the likeliest at temperature 0."""
    likeliest = jnp.argmax(logits, axis=-1)
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature == 0.0, likeliest, drawn).astype(jnp.int32)


def generate(
    model: Model,
    caches: Caches,
    prompts: jax.Array,
    counts: jax.Array,
    steps: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> jax.Array:
    """Tokens [B, steps] after prompts [B, T]; the caches are used up."""
    logits, caches = prefill(*model, caches, prompts, counts)
    key = jax.random.key(seed)
    tokens, _, _ = decode(*model, caches, logits, key, steps, temperature)
    return tokens
