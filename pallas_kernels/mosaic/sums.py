"""Sums in global memory that blocks add to."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import interpreter


class Sums(NamedTuple):
    """An array of float32 that a kernel adds to, [slabs, ...].

    Compiled, there is one slab. Interpreted, where blocks cannot add to the same place, each of
    those that would has one of its own.
    """

    ref: Any  # the kernel's last operand

    @classmethod
    def zero(cls, slabs: int, shape: tuple[int, ...]) -> Sums:
        """Nothing added yet."""
        slabs = slabs if interpreter.is_interpreting() else 1
        return cls(jax.new_ref(jnp.zeros((slabs, *shape), jnp.float32)))

    def total(self) -> jax.Array:
        """What has been added, once the kernel has been called."""
        found = jax.freeze(self.ref)
        return found[0] if found.shape[0] == 1 else jnp.sum(found, axis=0)

    @classmethod
    def exist(cls) -> bool:
        """JAX 0.10.2 passes no mutable arrays to kernels."""
        return jax.__version_info__ >= (0, 11)
