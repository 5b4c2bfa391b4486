"""A model's matrices as decoding reads them: turned, and those of one input in one.

Decoding one sequence reads every matrix for one row. Of a matrix [inputs, outputs] XLA makes a
product in parts and a kernel that adds them up. With a matrix [outputs, inputs] it can be written
as a sum along rows, which needs no such kernel and reads faster; of several matrices only if they
are one array. Prefill of long prompts becomes slower by some percent (bench/LOG.md).

An RMS norm before a matrix scales columns, which the matrix can do beforehand, and rows, which can
be done to what the product gives: the product then waits for no norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from bench.models.decoder import Decoder


class Projection(nnx.Module):
    """Some rows of a matrix that projections of one input share.

    XLA computes the same product of several of them once.
    """

    def __init__(
        self,
        matrix: nnx.Param,  # [outputs of all, inputs]
        bias: nnx.Param | None,  # [outputs of all]
        epsilon: float | None,  # of the RMS norm of the input, of which the matrix has the scale
        axes: int,  # of the input
        first: int,
        shape: tuple[int, ...],  # of the output
    ) -> None:
        self.matrix = matrix
        self.bias = nnx.data(bias)
        self.epsilon = epsilon
        self.axes = axes
        self.first = first
        self.shape = shape

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., *inputs] to [..., *shape], in the same type."""
        x = x.reshape(*x.shape[: -self.axes], -1)
        rows = slice(self.first, self.first + math.prod(self.shape))
        y = _product(x, self.matrix[...])[..., rows].astype(jnp.float32)
        if self.epsilon is not None:
            mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
            y = y * lax.rsqrt(mean + self.epsilon)
        if self.bias is not None:
            y = y + self.bias[rows]
        return y.astype(x.dtype).reshape(*x.shape[:-1], *self.shape)


class Same(nnx.Module):
    """What is left of a norm that projections have taken over."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def pack(model: Decoder) -> None:
    """Replaces the projections of a model, and RMS norms of which they are all that follows."""
    for block in model.blocks:
        has_own_norms = block.mlp_norm is not None
        norm = _take_norm(block, "attention_norm") if has_own_norms else None
        _replace(block.attention, ("query", "key", "value"), norm)
        _replace(block.attention, ("out",))
        norm = _take_norm(block, "mlp_norm") if has_own_norms else None
        _replace(block.mlp, ("up",) if block.mlp.gate is None else ("gate", "up"), norm)
        _replace(block.mlp, ("down",))
    if model.ends.head is not None:
        _replace(model.ends, ("head",), _take_norm(model.ends, "norm"))


def _take_norm(owner: Any, name: str) -> nnx.RMSNorm | None:
    """A norm whose work projections can do; nothing is done in its place."""
    norm = getattr(owner, name)
    if not isinstance(norm, nnx.RMSNorm):
        return None
    setattr(owner, name, Same())
    return norm


def _replace(owner: Any, names: Sequence[str], norm: nnx.RMSNorm | None = None) -> None:
    """Linear layers of one input, by projections with one matrix."""
    layers: list[Any] = [getattr(owner, name) for name in names]
    inputs, shapes = _axes(layers[0].in_features), [_axes(x.out_features) for x in layers]
    kernels = [layer.kernel[...].reshape(math.prod(inputs), -1) for layer in layers]
    turned = jnp.concatenate(kernels, axis=1).T
    if norm is not None:
        assert norm.scale is not None
        turned = (turned * norm.scale[...].astype(jnp.float32)).astype(turned.dtype)
    matrix = nnx.Param(turned)
    biases = [layer.bias[...].reshape(-1) for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "all layers of one input have a bias, or none"
    bias = nnx.Param(jnp.concatenate(biases)) if biases else None
    epsilon = None if norm is None else norm.epsilon
    first = 0
    for name, shape in zip(names, shapes, strict=True):
        setattr(owner, name, Projection(matrix, bias, epsilon, len(inputs), first, shape))
        first += math.prod(shape)


def _axes(features: int | Sequence[int]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """[..., inputs] to [..., outputs]; of one row in float32, as it is summed."""
    if x.size == x.shape[-1]:  # one row
        products = x.reshape(-1).astype(jnp.float32) * matrix.astype(jnp.float32)
        return jnp.sum(products, axis=-1).reshape(*x.shape[:-1], -1)
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())))
