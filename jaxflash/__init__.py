"""Attention for JAX: exact, with memory linear in the sequence, every option differentiable."""

import importlib
from typing import Any

from jaxflash.api import dot_product_attention, explain, merge, quantize
from jaxflash.cache import KVCache, OutOfPages, PageAllocator, PagedKVCache
from jaxflash.dispatch import Explanation
from jaxflash.inference import decode_attention, paged_attention
from jaxflash.modules.rope import Rope
from jaxflash.parallel import (
    RING_COMPILER_OPTIONS,
    ring_attention,
    stripe,
    ulysses_attention,
    unstripe,
)
from jaxflash.quantization import QuantizedArray
from jaxflash.vjp import CHECKPOINT_NAMES

__version__ = "0.1.0"

__all__ = [
    "CHECKPOINT_NAMES",
    "RING_COMPILER_OPTIONS",
    "Explanation",
    "KVCache",
    "OutOfPages",
    "PageAllocator",
    "PagedKVCache",
    "QuantizedArray",
    "Rope",
    "decode_attention",
    "dot_product_attention",
    "explain",
    "merge",
    "paged_attention",
    "quantize",
    "ring_attention",
    "stripe",
    "ulysses_attention",
    "unstripe",
]


def __getattr__(name: str) -> Any:
    """``jaxflash.linen`` and ``jaxflash.nnx``, which import Flax: programs need one at the most."""
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jaxflash.{name}")
    raise AttributeError(f"module 'jaxflash' has no attribute {name!r}")
