"""Is the answer right? Every implementation is compared with float32 before it is timed.

The oracle is the design's: `err(kernel) <= 2 * err(jnp in the kernel's dtype) + eps`. The reference
is written here, apart from the library's own, so that the two cannot be wrong together.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.shapes import Direction, Shape

OUTPUTS: dict[Direction, tuple[str, ...]] = {
    "forward": ("out",),
    "forward+backward": ("out", "dquery", "dkey", "dvalue"),
}
_ROWS = 1024  # query rows of the reference at once: linear memory at any length
_TILE = 64  # rows an error is averaged over: one wrong tile must not hide among good ones
_HEADS = 2
_QUERY_OUTPUTS = ("out", "dquery")


class Parity(NamedTuple):
    """Relative errors by output, and the largest that each may have."""

    errors: dict[str, float]
    limits: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """One line for each output that is off; NaN is off."""
        return [
            f"{name}: relative error {error:.2e}, allowed {self.limits[name]:.2e}"
            for name, error in self.errors.items()
            if not error <= self.limits[name]
        ]

    @property
    def worst(self) -> float:
        return float(np.max(list(self.errors.values())))


class Oracle:
    """Reference and tolerance for one problem, on the first batch element and two key heads."""

    def __init__(self, shape: Shape, direction: Direction, inputs: tuple[jax.Array, ...]) -> None:
        self._shape = shape
        self._names = OUTPUTS[direction]
        sliced = [
            self._slice(name, x)
            for name, x in zip(("out", "dkey", "dvalue", "out"), inputs, strict=False)
        ]
        self._want = _plain(sliced, shape.is_causal, self._names, "float32", "highest")
        rounded = _plain(sliced, shape.is_causal, self._names, shape.dtype, None)
        eps = max(1e-5, float(jnp.finfo(shape.dtype).eps) / 8)
        self._limits = {
            name: 2 * tile_error(rounded[name], self._want[name]) + eps for name in self._names
        }

    def check(self, outputs: jax.Array | tuple[jax.Array, ...]) -> Parity:
        """Compares an implementation's outputs, named in the order of `OUTPUTS`."""
        arrays = outputs if isinstance(outputs, tuple) else (outputs,)
        errors = {
            name: tile_error(np.asarray(self._slice(name, x), np.float32), self._want[name])
            for name, x in zip(self._names, arrays, strict=True)
        }
        return Parity(errors, dict(self._limits))

    def _slice(self, name: str, x: jax.Array) -> jax.Array:
        heads = min(_HEADS, self._shape.kv_heads)
        if name in _QUERY_OUTPUTS:
            heads *= self._shape.query_heads // self._shape.kv_heads
        return x[:1, :, :heads]


def tile_error(got: np.ndarray, want: np.ndarray) -> float:
    """Worst ||got - want|| / ||want|| over tiles of 64 rows of one head of [B, T, N, H].

    The denominator is at least a tenth of the tiles' root mean square, so that a tile whose true
    value is almost zero (the first row's causal query gradient) does not decide alone.
    """
    norms = _tile_norms(want)
    floor = 0.1 * np.sqrt(np.mean(norms**2))
    if floor == 0:
        return 0.0 if not np.any(got) else float("inf")
    return float(np.max(_tile_norms(got - want) / np.maximum(norms, floor)))


def _tile_norms(x: np.ndarray) -> np.ndarray:
    starts = np.arange(0, x.shape[1], _TILE)
    return np.sqrt(np.add.reduceat(np.square(x, dtype=np.float64).sum(-1), starts, axis=1))


def _plain(
    inputs: list[jax.Array],
    is_causal: bool,
    names: tuple[str, ...],
    dtype: str,
    precision: str | None,
) -> Mapping[str, np.ndarray]:
    """Plain attention in one dtype, row block by row block; the result is float32 on the host."""
    query, key, value, *cotangent = (x.astype(dtype) for x in inputs)
    rows: list[list[np.ndarray]] = []
    for start in range(0, query.shape[1], _ROWS):
        block = slice(start, start + _ROWS)
        dout = cotangent[0][:, block] if cotangent else None
        results = _row_block(query[:, block], key, value, dout, start, is_causal, precision)
        rows.append([np.asarray(x, np.float32) for x in results])
    joined = {}
    for name, parts in zip(names, zip(*rows, strict=True), strict=True):
        whole = np.concatenate(parts, 1) if name in _QUERY_OUTPUTS else np.sum(parts, 0)
        joined[name] = np.asarray(jnp.asarray(whole).astype(dtype), np.float32)
    return joined


@functools.partial(jax.jit, static_argnames=("is_causal", "precision"))
def _row_block(
    query: jax.Array,  # [1, rows, N, H]
    key: jax.Array,  # [1, S, K, H]
    value: jax.Array,
    dout: jax.Array | None,
    start: int,
    is_causal: bool,
    precision: str | None,
) -> tuple[jax.Array, ...]:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
        einsum = functools.partial(
            jnp.einsum, precision=precision, preferred_element_type=jnp.float32
        )
        logits = einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
        if is_causal:
            position = start + jnp.arange(query.shape[1])[:, None]
            logits = jnp.where(jnp.arange(key.shape[1]) <= position, logits, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        return einsum("bnts,bsnh->btnh", weights, value).astype(query.dtype)

    if dout is None:
        return (attend(query, key, value),)
    out, pull_back = jax.vjp(attend, query, key, value)
    return (out, *pull_back(dout))
