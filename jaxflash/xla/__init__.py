"""Blockwise attention in jnp and lax: any device, every option, memory linear in T and S.

One ``lax.scan`` walks the tiles that somebody sees (FlashAttention, Dao et al. 2022, algorithms 1
and 4). Tiles that need no mask and tiles that do are walked one after the other: online softmax
does not mind the order. Where visibility depends on data, a tile that nobody sees costs its mask
and no product. Batch and heads stay whole axes of every product, so that sharding them needs no
communication.
"""

from jaxflash.xla.backward import backward
from jaxflash.xla.forward import forward
from pallas_kernels import spec

__all__ = ["backward", "forward", "supports"]


def supports(problem: spec.Problem) -> str | None:
    """Everything is supported."""
    del problem
    return None
