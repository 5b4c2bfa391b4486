"""Rotary position embedding."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxflash import checks


@dataclasses.dataclass(frozen=True)
class Rope:
    r"""Rotary position embedding of queries and keys.

    The pair of elements ``i`` of a head at position ``p`` is rotated by the angle

    .. math:: p \; \mathrm{base}^{-2 i / \mathrm{dims}} / \mathrm{scale}, \qquad
              0 \le i < \mathrm{dims} / 2,

    so that logits depend on distances between positions.

    Args:
      base: 10000 by default.
      dims: how many elements of a head are rotated, the first ones; even. All by default.
      interleaved: pairs are ``(2 i, 2 i + 1)``, as in GPT-J; by default ``(i, i + dims / 2)``, as
        in GPT-NeoX and Llama.
      scale: positions are divided by it ("position interpolation"); 1 by default.

    Raises:
      ValueError, TypeError: an argument is wrong.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxflash import Rope
      >>> x = jnp.ones((2, 5, 4, 16))
      >>> Rope()(x, jnp.arange(5)).shape
      (2, 5, 4, 16)

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
    """

    base: float = 10000.0
    dims: int | None = None
    interleaved: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("base", "scale"):
            if checks.number(name, getattr(self, name), "it is no parameter") <= 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.dims is not None and checks.size("dims", self.dims) % 2:
            raise ValueError(f"dims must be even, elements are rotated in pairs; got {self.dims}")

    def __call__(
        self, x: Float[Array, "*B T N H"], positions: Int[Array, "*#B T"]
    ) -> Float[Array, "*B T N H"]:
        """Rotates the heads of each token by its position.

        Args:
          x: ``[*B, T, N, H]``, queries or keys.
          positions: integers ``[T]`` or ``[*B, T]``.

        Returns:
          The same in the dtype of ``x``; angles and products are float32.

        Raises:
          ValueError: there are more ``dims`` than a head has elements, or H is odd.
        """
        head_dim = x.shape[-1]
        dims = head_dim if self.dims is None else self.dims
        if dims > head_dim or dims % 2:
            raise ValueError(f"cannot rotate {dims} of {head_dim} elements; set dims")
        rates = self.base ** (-jnp.arange(0, dims, 2, dtype=jnp.float32) / dims) / self.scale
        angles = (positions[..., None] * rates)[..., None, :]  # [*B|, T, 1, dims / 2]
        rotated, rest = x[..., :dims].astype(jnp.float32), x[..., dims:]
        shape = rotated.shape[:-1]
        if self.interleaved:
            pairs = rotated.reshape(*shape, dims // 2, 2)
            result = jnp.stack(_turn(pairs[..., 0], pairs[..., 1], angles), axis=-1)
            result = result.reshape(*shape, dims)
        else:
            first, second = jnp.split(rotated, 2, axis=-1)
            result = jnp.concatenate(_turn(first, second, angles), axis=-1)
        return jnp.concatenate([result.astype(x.dtype), rest], axis=-1)


def _turn(a: jax.Array, b: jax.Array, angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return a * cos - b * sin, b * cos + a * sin
