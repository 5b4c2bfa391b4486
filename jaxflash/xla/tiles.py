"""Tiles of the logits: which there are, what each holds, and how the walk over them goes.

Arrays have heads before rows: query [B, K, G, T, H], key [B, K, S, H], logits
[B, N, block_q, block_kv]. Rows and keys are padded to whole tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import spec

_Carry = TypeVar("_Carry")

# Logits of all batches and heads at once: on a CPU what stays in its cache (the best of
# 2^18..2^21, bench/LOG.md), elsewhere enough to fill the device.
_LOGITS_AT_ONCE = {"cpu": 2**20}
_LOGITS_AT_ONCE_ELSEWHERE = 2**24


class Axes(NamedTuple):
    """Which axes of an array run over rows and keys."""

    row: int | None = None
    key: int | None = None


QUERY, KEY = Axes(row=3), Axes(key=2)


class Part(NamedTuple):
    """A tile with the rows of query and the keys and values that it needs."""

    tile: spec.Tile
    allowed: Any  # broadcastable to [B, N, block_q, block_kv]; None if all is visible
    q: Any  # [B, K, G, block_q, H]
    k: Any  # [B, K, block_kv, H]
    v: Any  # [B, K, block_kv, Hv]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A problem cut into tiles."""

    problem: spec.Problem
    operands: spec.Operands  # padded
    block_q: int
    block_kv: int

    @classmethod
    def of(cls, problem: spec.Problem, operands: spec.Operands) -> "Tiling":
        """The largest tiles whose logits, over all batches and heads, stay within the limit.

        And a quarter of the matrix at most, without which a short sequence would save nothing,
        unless the matrix is no larger than its operands.
        """
        limit = _LOGITS_AT_ONCE.get(problem.device.platform, _LOGITS_AT_ONCE_ELSEWHERE)
        limit = min(limit, problem.B * problem.N * max(128 * 128, problem.T * problem.S // 4))
        q, kv = 1024, 1024
        while problem.B * problem.N * q * kv > limit and q > 64:
            q, kv = (q, kv // 2) if kv > q else (q // 2, kv)
        unpadded = cls(problem, operands, max(1, min(q, problem.T)), max(1, min(kv, problem.S)))
        return dataclasses.replace(unpadded, operands=unpadded._padded())

    @functools.cached_property
    def qkv(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value with heads before rows."""
        x = self.operands
        return by_group(self.problem, x.query), x.key.swapaxes(1, 2), x.value.swapaxes(1, 2)

    def walk(self, visit: Callable[[_Carry, Any, bool], _Carry], carry: _Carry) -> _Carry:
        """Scans ``visit(carry, block, masked)`` over the tiles that may be seen."""
        problem = self.problem
        band = problem.static_band or spec.Band()
        blocks = (self.block_q, self.block_kv)
        partial, full = spec.visible_tiles(band, problem.T, problem.S, *blocks)
        if problem.masks_by_data:
            partial, full = (
                spec.Tiles(*map(np.append, full, partial)),
                full.select(np.array([], int)),
            )
        for tiles, masked in ((full, False), (partial, True)):
            step = functools.partial(_step, visit, masked)
            if len(tiles.q) > 0:
                carry, _ = lax.scan(step, carry, jax.tree.map(jnp.asarray, tiles))
        return carry

    def part(self, block: spec.Tiles, masked: bool) -> Part:
        """What a tile needs; unseen rows and keys are zero in a masked one."""
        problem = self.problem
        rows = (block.q * self.block_q, self.block_q)
        keys = (block.kv * self.block_kv, self.block_kv)
        tile = spec.tile_of(problem, self.operands, rows, keys)
        axes = (QUERY, KEY, KEY)
        q, k, v = (self.take(x, a, block) for x, a in zip(self.qkv, axes, strict=True))
        if not masked:
            return Part(tile, None, q, k, v)
        allowed = spec.mask.allowed(problem, tile)
        if problem.T % self.block_q or problem.S % self.block_kv:
            inside = spec.mask.inside(problem, tile)
            allowed = inside if allowed is None else allowed & inside
        # What nobody sees may hold NaN, and 0 * NaN would spread it.
        q = jnp.where(any_key(problem, allowed)[..., None], q, 0)
        seen = jnp.any(_split_heads(problem, allowed), axis=(2, 3))[..., None]
        return Part(tile, allowed, q, jnp.where(seen, k, 0), jnp.where(seen, v, 0))

    def take(self, x: jax.Array, axes: Axes, block: spec.Tiles) -> jax.Array:
        """The part of ``x`` that belongs to a tile."""
        sizes = list(x.shape)
        for axis, size in zip(axes, (self.block_q, self.block_kv), strict=True):
            if axis is not None:
                sizes[axis] = size
        return lax.dynamic_slice(x, self._starts(x, axes, block), sizes)

    def put(self, x: jax.Array, part: jax.Array, axes: Axes, block: spec.Tiles) -> jax.Array:
        """``x`` with the part that belongs to a tile replaced."""
        return lax.dynamic_update_slice(x, part, self._starts(x, axes, block))

    def pad_rows(self, x: Any, axis: int) -> Any:
        """Pads a row axis to whole tiles; an axis of another size is broadcast, and left alone."""
        return _pad(x, axis, self.problem.T, self.block_q)

    def pad_keys(self, x: Any, axis: int) -> Any:
        """Pads a key axis likewise."""
        return _pad(x, axis, self.problem.S, self.block_kv)

    def _starts(self, x: jax.Array, axes: Axes, block: spec.Tiles) -> list[Any]:
        starts: list[Any] = [jnp.int32(0)] * x.ndim
        for axis, start in zip(
            axes, (block.q * self.block_q, block.kv * self.block_kv), strict=True
        ):
            if axis is not None:
                starts[axis] = start
        return starts

    def _padded(self) -> spec.Operands:
        x = self.operands
        return x._replace(
            query=self.pad_rows(x.query, 1),
            key=self.pad_keys(x.key, 1),
            value=self.pad_keys(x.value, 1),
            bias=self.pad_keys(self.pad_rows(x.bias, 2), 3),
            mask=self.pad_keys(self.pad_rows(x.mask, 2), 3),
            query_segment_ids=self.pad_rows(x.query_segment_ids, 1),
            key_value_segment_ids=self.pad_keys(x.key_value_segment_ids, 1),
        )


def logits(
    problem: spec.Problem, part: Part, modify: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The tile's logits [B, N, block_q, block_kv], -inf where nothing is to be seen."""
    s = dot(problem, "bkgqh,bksh->bkgqs", part.q, part.k) * problem.scale
    s = modify(s.reshape(problem.B, problem.N, *s.shape[3:]))
    return s if part.allowed is None else jnp.where(part.allowed, s, -jnp.inf)


def dropped(problem: spec.Problem, seed: Any, part: Part, p: jax.Array) -> jax.Array:
    """Dropout of ``p`` [B, K, G, block_q, block_kv]."""
    if problem.dropout_rate == 0.0:
        return p
    by_head = p.reshape(problem.B, problem.N, *p.shape[3:])
    return spec.dropout.apply(problem, part.tile, seed, by_head).reshape(p.shape)


def if_seen(
    problem: spec.Problem, part: Part, function: Callable[[_Carry], _Carry], x: _Carry
) -> _Carry:
    """``function(x)``, or ``x`` where data says that nobody sees anything of the tile."""
    if not problem.masks_by_data:
        return function(x)
    return lax.cond(jnp.any(part.allowed), function, lambda x: x, x)


def any_key(problem: spec.Problem, allowed: jax.Array) -> jax.Array:
    """Which rows see a key of the tile, broadcastable to [B, K, G, block_q]."""
    return jnp.any(_split_heads(problem, allowed), axis=4)


def dot(problem: spec.Problem, subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product accumulated in the compute dtype."""
    dtype = problem.compute_dtype
    return jnp.einsum(subscripts, x, y, precision=problem.precision, preferred_element_type=dtype)


def by_group(problem: spec.Problem, x: jax.Array) -> jax.Array:
    """[B, T, N, ...] as [B, K, G, T, ...]."""
    return _split_heads(problem, x.swapaxes(1, 2))


def rows_first(problem: spec.Problem, x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] as [B, T, N, ...]."""
    return x.reshape(x.shape[0], problem.N, *x.shape[3:]).swapaxes(1, 2)


def _split_heads(problem: spec.Problem, x: jax.Array) -> jax.Array:
    """[B, N|1, ...] as [B, K|1, G|1, ...]."""
    heads = (1, 1) if x.shape[1] == 1 else (problem.K, problem.G)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _step(visit: Callable[..., _Carry], masked: bool, carry: _Carry, block: Any) -> Any:
    return visit(carry, block, masked), None


def _pad(x: Any, axis: int, size: int, block: int) -> Any:
    if x is None or x.shape[axis] != size or size % block == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -size % block)
    return jnp.pad(x, widths)
