"""A cache with one run of memory for each sequence."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int32

from jaxflash import checks
from jaxflash.cache import tokens
from jaxflash.cache.rules import enforce

_REMEDY = "build the cache with a larger capacity"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of B sequences, each with room for S tokens; a pytree.

    Args:
      key: ``[B, S, K, H]``; bfloat16, float16, float32 or float64.
      value: ``[B, S, K, Hv]``.
      lengths: int32 ``[B]``; the tokens that each sequence holds. What lies beyond is undefined.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxflash.cache import KVCache
      >>> append = jax.jit(KVCache.append, donate_argnums=0)
      >>> cache = KVCache.zeros(2, 64, 4, 16, dtype=jnp.float32)
      >>> prompt = jnp.ones((2, 5, 4, 16))
      >>> cache = append(cache, prompt, prompt, counts=jnp.array([5, 3]))
      >>> token = jnp.ones((2, 1, 4, 16))
      >>> append(cache, token, token).lengths
      Array([6, 4], dtype=int32)
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    lengths: Int32[Array, "B"]

    @classmethod
    def zeros(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any,
    ) -> "KVCache":
        """An empty cache.

        Args:
          batch: sequences B.
          capacity: tokens S that each has room for.
          kv_heads: key-value heads K.
          head_dim: head dimension H of the keys.
          value_dim: head dimension Hv of the values; H by default.
          dtype: of keys and values; bfloat16, float16, float32 or float64.

        Returns:
          A cache of zeros, every length 0.

        Raises:
          ValueError, TypeError: a size is no positive int, or the dtype is another.

        Example:
          >>> KVCache.zeros(2, 64, 4, 16, value_dim=8, dtype=jnp.bfloat16).value.shape
          (2, 64, 4, 8)
        """
        B, S = checks.size("batch", batch), checks.size("capacity", capacity)
        K, H = checks.size("kv_heads", kv_heads), checks.size("head_dim", head_dim)
        Hv = H if value_dim is None else checks.size("value_dim", value_dim)
        dtype = checks.float_dtype("dtype", dtype)
        key, value = jnp.zeros((B, S, K, H), dtype), jnp.zeros((B, S, K, Hv), dtype)
        return cls(key, value, jnp.zeros(B, jnp.int32))

    @property
    def capacity(self) -> int:
        """Tokens S that a sequence has room for."""
        return self.key.shape[1]

    def append(
        self,
        key: Float[ArrayLike, "B T K H"],
        value: Float[ArrayLike, "B T K Hv"],
        counts: Int32[ArrayLike, "B"] | None = None,
        *,
        debug_checks: bool = False,
    ) -> "KVCache":
        """The cache with new tokens after those it holds: a prompt, a chunk, or one token.

        Under jit with the cache donated, the new tokens are written in place. Nothing else is:
        tokens that do not fit are dropped, and the length stays at the capacity.

        Args:
          key: ``[B, T, K, H]`` in the cache's dtype.
          value: ``[B, T, K, Hv]`` in the cache's dtype.
          counts: int32 ``[B]``; sequence b gets the first ``counts[b]`` of its T tokens. All of
            them by default.
          debug_checks: check at run time that counts lie in [0, T] and that the tokens fit. Costs
            a round trip to the host; JAX_PLATFORMS, where it is set, must list cpu too.

        Returns:
          The new cache, with the lengths grown by the tokens written.

        Raises:
          ValueError: a shape is wrong, T exceeds the capacity or, if ``counts`` is no JAX array,
            a count is not in [0, T]; with ``debug_checks``, what it checks.
          TypeError: a dtype is wrong.
          jax.errors.JaxRuntimeError: what ``debug_checks`` finds inside jit, with the same
            message, when the result is waited for.

        Example:
          >>> cache = KVCache.zeros(1, 4, 1, 8, dtype=jnp.float32)
          >>> x = jnp.ones((1, 3, 1, 8))
          >>> cache.append(x, x).append(x, x).lengths
          Array([4], dtype=int32)
        """
        checks.flag("debug_checks", debug_checks)
        self._check()
        B, S = self.key.shape[:2]
        held = self.key, self.value
        new = tokens.new_tokens(key, value, B, held)
        T = new[0].shape[1]
        wanted = tokens.counted(counts, B, T, S, _REMEDY)
        rules = tokens.count_rules(self.lengths, wanted, T, S, _REMEDY)
        lengths = enforce(self.lengths, *rules, debug_checks=debug_checks)
        written = tokens.fitting(lengths, wanted, T, S)  # [B]
        steps = jnp.arange(T, dtype=jnp.int32)
        # S is past the end: a token at that place is dropped.
        place = jnp.where(steps < written[:, None], lengths[:, None] + steps, S)  # [B, T]
        sequence = np.arange(B, dtype=np.int32)[:, None]
        new_key, new_value = tokens.write(held, new, sequence, place)
        return KVCache(new_key, new_value, lengths + written)

    def _check(self) -> None:
        tokens.check_held("", self.key, self.value, ("[B, S, K, H]", "[B, S, K, Hv]"))
        checks.shaped("lengths", self.lengths, self.key.shape[:1], "[B]")
        checks.int32("lengths", self.lengths)
