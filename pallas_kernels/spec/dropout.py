"""Which probabilities dropout keeps: a hash of where an element stands, and of nothing else.

Every backend, the forward, the backward and a rematerialised forward compute the same mask, in any
order and with any tiles. The hash is integer arithmetic that a GPU kernel can do in registers.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.spec.problem import Problem
from pallas_kernels.spec.tile import Tile

_GOLDEN = np.uint32(0x9E3779B9)
# The multipliers of lowbias32 (C. Wellons, "Prospecting for Hash Functions", 2018).
_MULTIPLIER_A = np.uint32(0x7FEB352D)
_MULTIPLIER_B = np.uint32(0x846CA68B)


def keep(problem: Problem, tile: Tile, seed: Any) -> Any:
    """Which elements of the tile are kept, with probability ``1 - dropout_rate`` each.

    ``seed`` is [2] uint32. A row has a 64-bit key of its own, so that rows never share a sequence,
    unless batch and heads are to share one mask.
    """
    stream = np.uint32(0)
    if not problem.broadcast_dropout:
        stream = _u32(tile.batch) * np.uint32(problem.N) + _u32(tile.head)
    first = _mix(_u32(tile.position) ^ _mix(stream ^ seed[0]))
    second = _mix(first ^ seed[1])
    x = _u32(tile.key) * _GOLDEN + first
    x = (x ^ (x >> 16)) * _MULTIPLIER_A ^ second
    x = (x ^ (x >> 15)) * _MULTIPLIER_B
    return (x ^ (x >> 16)) >= np.uint32(problem.dropout_rate * 2.0**32)


def apply(problem: Problem, tile: Tile, seed: Any, p: Any) -> Any:
    """``p`` with the dropped elements zero and the kept ones divided by ``1 - dropout_rate``."""
    if problem.dropout_rate == 0.0:
        return p
    return jnp.where(keep(problem, tile, seed), p * (1.0 / (1.0 - problem.dropout_rate)), 0)


def _u32(x: Any) -> Any:
    return lax.convert_element_type(x, jnp.uint32)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> 16)) * _MULTIPLIER_A
    x = (x ^ (x >> 15)) * _MULTIPLIER_B
    return x ^ (x >> 16)
