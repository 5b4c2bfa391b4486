"""A training step: AdamW, 16-bit parameters, and blocks of which little is kept for the gradients.

The blocks' parameters are stacked, and a loop goes over them: one block is compiled, whatever the
number of layers. Of each block the input is kept, and attention's output and lse, so that the
gradients run everything again but attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import jaxflash
from bench.models.config import Config
from bench.models.decoder import Attention, Block, Ends


class Parameters(NamedTuple):
    """Of a decoder, for training."""

    ends: Any
    blocks: Any  # of each block, stacked


class Trainer(NamedTuple):
    """What is known before there are arrays."""

    ends: Any
    block: Any
    optimizer: optax.GradientTransformation


class State(NamedTuple):
    """What a step changes."""

    parameters: Parameters
    optimizer: Any


def trainer(
    config: Config, attention: Attention, dtype: Any = jnp.bfloat16, rate: float = 1e-4
) -> Trainer:
    """Structures and the optimizer, whose moments are of the parameters' dtype."""

    def structure(make: Any) -> Any:
        return nnx.graphdef(nnx.eval_shape(make))

    return Trainer(
        structure(lambda: Ends(config, dtype, nnx.Rngs(0))),
        structure(lambda: Block(config, attention, dtype, nnx.Rngs(0))),
        optax.adamw(rate, b2=0.95, weight_decay=0.1),
    )


def initial(config: Config, setup: Trainer, dtype: Any = jnp.bfloat16, seed: int = 0) -> State:
    """Random parameters, and an optimizer that has seen nothing; for `jax.jit`."""
    keys = jax.random.split(jax.random.key(seed), config.layers + 1)

    def block(key: jax.Array) -> Any:
        return nnx.state(Block(config, None, dtype, nnx.Rngs(key)))

    ends = nnx.state(Ends(config, dtype, nnx.Rngs(keys[0])))
    parameters = Parameters(ends, jax.vmap(block)(keys[1:]))
    return State(parameters, setup.optimizer.init(parameters))


def loss(setup: Trainer, parameters: Parameters, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy of each next token of [B, T + 1]."""
    ends = nnx.merge(setup.ends, parameters.ends)
    x = ends.embed(tokens[:, :-1], jnp.arange(tokens.shape[1] - 1))
    policy = jax.checkpoint_policies.save_only_these_names(*jaxflash.CHECKPOINT_NAMES)

    def one(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
        return nnx.merge(setup.block, block)(x)[0], None

    x, _ = lax.scan(jax.checkpoint(one, policy=policy, prevent_cse=False), x, parameters.blocks)
    losses = optax.softmax_cross_entropy_with_integer_labels(ends.logits(x), tokens[:, 1:])
    return jnp.mean(losses)


def step(setup: Trainer, state: State, tokens: jax.Array) -> tuple[State, jax.Array]:
    """One update; for `jax.jit` with the state donated."""
    value, gradients = jax.value_and_grad(lambda p: loss(setup, p, tokens))(state.parameters)
    updates, moments = setup.optimizer.update(gradients, state.optimizer, state.parameters)
    return State(optax.apply_updates(state.parameters, updates), moments), value
