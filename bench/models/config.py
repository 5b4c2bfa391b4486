"""Sizes of the models, and what distinguishes their families."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxflash import Rope


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder: embeddings, blocks of attention and MLP, a head."""

    name: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int  # of the MLP
    kv_heads: int | None = None  # None: as many as heads
    rope: Rope | None = None  # None: positions are learned
    positions: int = 0  # that are learned
    norm: Literal["rms", "layer"] = "layer"
    epsilon: float = 1e-5
    is_gated: bool = False  # the MLP multiplies silu(gate) with up; else it has gelu (tanh)
    # Attention and MLP one after the other, or both of the block's input, by norms of their own or
    # by one.
    residual: Literal["serial", "parallel", "parallel, one norm"] = "serial"
    attention_bias: bool = True
    mlp_bias: bool = True
    head_bias: bool = False
    is_tied: bool = False  # the head is the embedding

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def kv_bytes_per_token(self) -> int:
        """Of keys and values in 16 bits, all layers."""
        return 2 * 2 * self.layers * self.key_value_heads * self.head_dim

    @property
    def block_weights(self) -> int:
        """Elements of the matrices of one block."""
        attention = self.width * self.head_dim * 2 * (self.heads + self.key_value_heads)
        return attention + self.width * self.hidden * (3 if self.is_gated else 2)

    @property
    def weights(self) -> int:
        """Elements of all matrices, embeddings too."""
        ends = self.vocabulary * self.width * (1 if self.is_tied else 2)
        return self.layers * self.block_weights + ends + self.positions * self.width

    def flops(self, batch: int, length: int, *, with_gradients: bool) -> float:
        """Of matrix products, for a batch of strings; attention counts what is visible."""
        per_token = 2 * (self.layers * self.block_weights + self.vocabulary * self.width)
        pairs = length * (length + 1) / 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        forward = batch * (length * per_token + attention)
        # The gradient of a product is two of them; of attention's two products, five.
        return forward + batch * (2 * length * per_token + 2.5 * attention) * with_gradients


def _llama(name: str, width: int, layers: int, heads: int, hidden: int, kv_heads: int) -> Config:
    return Config(
        name=name,
        vocabulary=32000,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        rope=Rope(),
        norm="rms",
        is_gated=True,
        attention_bias=False,
        mlp_bias=False,
    )


# From the papers and the published configurations.
MODELS = {
    config.name: config
    for config in (
        _llama("llama-2-7b", 4096, 32, 32, 11008, 32),
        _llama("llama-2-13b", 5120, 40, 40, 13824, 40),
        _llama("llama-2-70b", 8192, 80, 64, 28672, 8),
        Config("gpt-2", 50257, 768, 12, 12, 3072, positions=1024, is_tied=True),
        Config(
            "gpt-j-6b",
            50400,
            4096,
            28,
            16,
            16384,
            rope=Rope(dims=64, interleaved=True),
            residual="parallel, one norm",
            attention_bias=False,
            head_bias=True,
        ),
        Config(
            "gpt-neox-20b",
            50432,
            6144,
            44,
            64,
            24576,
            rope=Rope(dims=24),
            residual="parallel",
        ),
    )
}
