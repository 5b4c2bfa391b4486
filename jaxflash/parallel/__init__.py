"""Attention over a sequence that is divided among devices, inside ``jax.shard_map``."""

from jaxflash.parallel.ring import RING_COMPILER_OPTIONS, ring_attention, stripe, unstripe
from jaxflash.parallel.ulysses import ulysses_attention

__all__ = ["RING_COMPILER_OPTIONS", "ring_attention", "stripe", "ulysses_attention", "unstripe"]
