"""A small causal transformer language model whose attention is jaxflash's, and its training.

The task is induction: a random string, then the same string again. Nothing before the repetition
tells its next token, so only a model that attends back to the first copy can predict it: the loss
on the second half falls from ln(vocabulary) only if attention and its gradients work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jaxflash


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model, the task and the training."""

    vocabulary: int = 32
    length: int = 32  # of the string that is repeated; the model sees it twice, less one token
    width: int = 64
    heads: int = 4
    layers: int = 2
    batch: int = 32
    steps: int = 180
    learning_rate: float = 3e-3
    implementation: Any = None  # of attention, by name
    attention_dtype: str = "float32"
    nudge: int = 0  # unless 0, seed of changes to the first parameters as small as bfloat16's eps


class Block(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        width = config.width
        self.heads, self.dtype = config.heads, config.attention_dtype
        self.implementation = config.implementation
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.query_key_value = nnx.Linear(width, 3 * width, rngs=rngs)
        self.project = nnx.Linear(width, width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, width]
        batch, length, width = x.shape
        heads = (batch, length, self.heads, width // self.heads)
        packed = self.query_key_value(self.attention_norm(x)).astype(self.dtype)
        query, key, value = (part.reshape(heads) for part in jnp.split(packed, 3, axis=-1))
        attended = jaxflash.dot_product_attention(
            query, key, value, is_causal=True, implementation=self.implementation
        )
        x = x + self.project(attended.astype(x.dtype).reshape(batch, length, width))
        return x + self.contract(nnx.gelu(self.expand(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Token and position embeddings, blocks, and a head that gives logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(config.vocabulary, config.width, rngs=rngs)
        self.positions = nnx.Embed(2 * config.length, config.width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(config, rngs) for _ in range(config.layers)))
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> [B, T, vocabulary]
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Report(NamedTuple):
    """Loss and accuracy on the repeated half of fresh strings."""

    step: int
    loss: float
    accuracy: float


class Adam(NamedTuple):
    """First and second moments of the gradients."""

    mean: Any
    square: Any


def repeated_strings(key: jax.Array, config: Config) -> jax.Array:
    """A batch of random strings, each written twice: int32 [B, 2 * length]."""
    first = jax.random.randint(key, (config.batch, config.length), 0, config.vocabulary)
    return jnp.concatenate([first, first], axis=1)


def train(config: Config, report_every: int = 20, seed: int = 0) -> Iterator[Report]:
    """Trains, yielding a report before the first step and after every `report_every`-th."""
    structure, parameters, moments = initial(config, seed)
    key = jax.random.key(seed + 1)
    evaluate = jax.jit(functools.partial(_loss, structure, config))
    step_once = jax.jit(functools.partial(_train_step, structure, config))
    held_out = repeated_strings(jax.random.key(seed + 2), config)
    for step in range(config.steps + 1):
        if step % report_every == 0:
            loss, accuracy = evaluate(parameters, held_out)
            yield Report(step, float(loss), float(accuracy))
        if step < config.steps:
            parameters, moments = step_once(parameters, moments, key, step)


def initial(config: Config, seed: int) -> tuple[Any, Any, Adam]:
    """The model's structure, its first parameters, and an optimizer that has seen nothing."""

    def make() -> tuple[Any, Adam]:
        parameters = nnx.state(LanguageModel(config, nnx.Rngs(seed)))
        if config.nudge:
            parameters = _nudged(parameters, jax.random.key(config.nudge))
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        return parameters, Adam(zeros, zeros)

    structure = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(seed))))
    # One program: run eagerly, every shape of every layer would be compiled by itself.
    return structure, *jax.jit(make)()


def _nudged(parameters: Any, key: jax.Array) -> Any:
    """Each number times 1 + x, x being at most bfloat16's eps."""
    leaves, tree = jax.tree.flatten(parameters)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    keys = jax.random.split(key, len(leaves))
    changed = [
        x * (1 + jax.random.uniform(k, x.shape, x.dtype, -eps, eps))
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, changed)


def _loss(
    structure: Any, config: Config, parameters: Any, strings: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy and accuracy over the repeated half."""
    logits = nnx.merge(structure, parameters)(strings[:, :-1])
    logits = logits[:, config.length - 1 :]
    targets = strings[:, config.length :]
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -log_likelihood.mean(), (logits.argmax(-1) == targets).mean()


def _train_step(
    structure: Any, config: Config, parameters: Any, moments: Adam, key: jax.Array, step: jax.Array
) -> tuple[Any, Adam]:
    """One Adam step on a fresh batch; Adam is spelled out, since optax is no dependency."""
    strings = repeated_strings(jax.random.fold_in(key, step), config)
    loss = functools.partial(_loss, structure, config)
    gradients = jax.grad(lambda p: loss(p, strings)[0])(parameters)
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments.mean, gradients)
    square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g**2, moments.square, gradients)
    count = step + 1.0
    rate = config.learning_rate * jnp.minimum(1.0, count / 20)  # warm-up

    def update(p: jax.Array, m: jax.Array, s: jax.Array) -> jax.Array:
        return p - rate * (m / (1 - 0.9**count)) / (jnp.sqrt(s / (1 - 0.99**count)) + 1e-8)

    return jax.tree.map(update, parameters, mean, square), Adam(mean, square)
