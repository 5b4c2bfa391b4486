"""What is computed: attention shapes, their operation counts and their bytes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.spec import Band

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")

# The backward pass does five matrix products of the forward's two: 1 + 2.5.
FLOP_FACTOR: dict[Direction, float] = {"forward": 1.0, "forward+backward": 3.5}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention problem: query [B, T, N, H], key and value [B, S, K, H]."""

    batch: int
    query_length: int
    key_length: int
    query_heads: int
    kv_heads: int
    head_dim: int
    is_causal: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads must be a multiple of kv_heads; got {self.query_heads} and "
                f"{self.kv_heads}"
            )

    @property
    def label(self) -> str:
        """Short text that names the shape, as `B8 T512 N32/32 H64 full bfloat16`."""
        length = f"T{self.query_length}"
        if self.key_length != self.query_length:
            length += f" S{self.key_length}"
        heads = f"N{self.query_heads}/{self.kv_heads}"
        mask = "causal" if self.is_causal else "full"
        return f"B{self.batch} {length} {heads} H{self.head_dim} {mask} {self.dtype}"

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def structs(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Query, key and value without their contents."""
        query = (self.batch, self.query_length, self.query_heads, self.head_dim)
        key = (self.batch, self.key_length, self.kv_heads, self.head_dim)
        return (
            jax.ShapeDtypeStruct(query, self.dtype),
            jax.ShapeDtypeStruct(key, self.dtype),
            jax.ShapeDtypeStruct(key, self.dtype),
        )


def flops(shape: Shape, direction: Direction = "forward") -> float:
    """Matrix products' operations: 4*B*N*H for each visible pair, x3.5 with gradients."""
    pairs = Band.of(shape.is_causal, None).area(shape.query_length, shape.key_length)
    heads = shape.batch * shape.query_heads
    return 4.0 * heads * shape.head_dim * pairs * FLOP_FACTOR[direction]


def query_bytes(shape: Shape) -> int:
    """Bytes of the query; output, its cotangent and the query's gradient have as many."""
    return shape.batch * shape.query_length * shape.query_heads * shape.head_dim * shape.itemsize


def key_bytes(shape: Shape) -> int:
    """Bytes of the key; the value and both gradients have as many."""
    return shape.batch * shape.key_length * shape.kv_heads * shape.head_dim * shape.itemsize


def min_bytes(shape: Shape, direction: Direction = "forward") -> int:
    """Fewest bytes to move: each input read once, each output written once.

    Forward reads query, key, value and writes the output. With gradients the cotangent is read too
    and three gradients are written; what forward hands to backward is not counted.
    """
    forward = 2 * query_bytes(shape) + 2 * key_bytes(shape)
    if direction == "forward":
        return forward
    return forward + 2 * query_bytes(shape) + 2 * key_bytes(shape)


def score_matrix_bytes(shape: Shape) -> int:
    """Bytes of one B x N x T x S matrix of scores in the inputs' dtype."""
    return shape.batch * shape.query_heads * shape.query_length * shape.key_length * shape.itemsize


def random_inputs(
    shape: Shape, direction: Direction, seed: int = 0, sharding: jax.sharding.Sharding | None = None
) -> tuple[jax.Array, ...]:
    """Draws query, key, value and, for gradients, the output's cotangent from normal(0, 1)."""
    structs: list[jax.ShapeDtypeStruct] = list(shape.structs())
    if direction == "forward+backward":
        structs.append(structs[0])

    def draw() -> tuple[jax.Array, ...]:
        # "rbg" compiles several times faster than the default generator and does not split keys.
        # Drawn in float32: bfloat16 draws have 128 distinct values, whose errors in 8 bits have a
        # mean that sums over many tokens show.
        keys = [jax.random.key(seed + i, impl="rbg") for i in range(len(structs))]
        return tuple(
            jax.random.normal(key, struct.shape).astype(struct.dtype)
            for key, struct in zip(keys, structs, strict=True)
        )

    return jax.jit(draw, out_shardings=sharding)()


INPUT_DISTRIBUTION = "normal(0, 1), the same buffers in every repeat"
