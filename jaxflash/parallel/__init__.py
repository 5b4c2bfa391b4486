"""Attention over a sequence that is divided among devices, inside ``jax.shard_map``."""

from jaxflash.parallel.ring import ring_attention, stripe, unstripe
from jaxflash.parallel.ulysses import ulysses_attention

__all__ = ["ring_attention", "stripe", "ulysses_attention", "unstripe"]
