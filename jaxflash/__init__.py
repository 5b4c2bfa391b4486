"""Attention for JAX: exact, with memory linear in the sequence, every option differentiable."""

from jaxflash.api import dot_product_attention, explain, merge
from jaxflash.cache import KVCache, OutOfPages, PageAllocator, PagedKVCache
from jaxflash.dispatch import Explanation
from jaxflash.inference import decode_attention, paged_attention
from jaxflash.vjp import CHECKPOINT_NAMES

__version__ = "0.1.0"

__all__ = [
    "CHECKPOINT_NAMES",
    "Explanation",
    "KVCache",
    "OutOfPages",
    "PageAllocator",
    "PagedKVCache",
    "decode_attention",
    "dot_product_attention",
    "explain",
    "merge",
    "paged_attention",
]
