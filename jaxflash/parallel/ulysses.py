"""Ulysses attention: sequences are exchanged for heads, all of a head at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxflash.api import dot_product_attention


def ulysses_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    axis_name: str,
    *,
    query_segment_ids: Int32[Array, "*B T"] | None = None,
    key_value_segment_ids: Int32[Array, "*B S"] | None = None,
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    attention: Callable[..., Any] = dot_product_attention,
    **options: Any,
) -> Any:
    """``dot_product_attention`` of a sequence that is divided over a mesh axis of n devices.

    For use inside ``jax.shard_map``; arrays are this device's contiguous parts. They are exchanged
    for the whole sequence of some heads, N / n of the queries, and back afterwards. Where there are
    fewer heads of the keys than devices, each is sent to several.

    Args:
      query: ``[*B, T, N, H]``; n divides N.
      key: ``[*B, S, K, H]``; n divides K, or K divides n.
      value: ``[*B, S, K, Hv]``.
      axis_name: of the mesh axis over which the sequence is divided.
      query_segment_ids: as in ``dot_product_attention``, of this part.
      key_value_segment_ids: likewise.
      bias: as there, of all heads and of the whole sequence.
      mask: likewise.
      alibi_slopes: of all heads.
      sinks: likewise.
      attention: of whole sequences; `ring_attention` with its ``axis_name`` bound, for a sequence
        that is divided over two axes, that of the ring first.
      **options: of ``attention``. ``score_mod`` and ``mask_mod`` are given the number of a head
        among all heads; dropout draws a mask for each device's heads that is not that of the
        undivided sequence.

    Returns:
      As ``dot_product_attention``; differentiable.

    Raises:
      ValueError, TypeError: heads do not divide as they must, or bias or mask has others; as
        ``attention``.

    Example:
      >>> import functools, jax, numpy as np, jaxflash
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> mesh = Mesh(np.array(jax.devices()[:1]), ("sequence",))
      >>> attend = functools.partial(
      ...     jaxflash.ulysses_attention, axis_name="sequence", is_causal=True
      ... )
      >>> attend = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "sequence"),
      ...     out_specs=P(None, "sequence"))
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 4, 16))
      >>> jax.jit(attend)(q, k, v).shape
      (1, 64, 4, 16)

    Source: Jacobs et al., "DeepSpeed Ulysses" (2023).
    """
    n = lax.axis_size(axis_name)
    N, K = query.shape[-2], key.shape[-2]
    if N % n:
        raise ValueError(f"{n} devices must divide the query's heads; got {N=}")
    if K % n and n % K:
        raise ValueError(f"{n} devices must divide the key-value heads, or they them; got {K=}")
    device = lax.axis_index(axis_name)
    first = device * (N // n)
    if n > K:
        key, value = (jnp.repeat(x, n // K, axis=-2) for x in (key, value))

    def exchange(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, axis_name, x.ndim - 2, x.ndim - 3, tiled=True)

    def whole(ids: Any) -> Any:
        if ids is None:
            return None
        return lax.all_gather(ids, axis_name, axis=ids.ndim - 1, tiled=True)

    def own(of_heads: Any, axis: int = 0) -> Any:
        """Of this device's heads."""
        if of_heads is None:
            return None
        return lax.dynamic_slice_in_dim(of_heads, first, N // n, axis)

    def of_logits(x: Any) -> Any:
        """What broadcasts to the logits, of this device's heads."""
        if jnp.ndim(x) < 3 or x.shape[-3] == 1:
            return x
        if x.shape[-3] != N:
            raise ValueError(f"bias and mask must be of all {N} heads or of one; got {x.shape}")
        return own(x, x.ndim - 3)

    def back(x: jax.Array, heads: int) -> jax.Array:
        return lax.all_to_all(x, axis_name, heads - 1, heads, tiled=True)

    found = attention(
        exchange(query),
        exchange(key),
        exchange(value),
        query_segment_ids=whole(query_segment_ids),
        key_value_segment_ids=whole(key_value_segment_ids),
        alibi_slopes=own(alibi_slopes),
        sinks=own(sinks),
        **{k: of_logits(x) for k, x in (("bias", bias), ("mask", mask)) if x is not None},
        **_of_heads(options, first, device),
    )
    if isinstance(found, tuple):
        out, lse = found
        return back(out, out.ndim - 2), back(lse, lse.ndim - 1)
    return back(found, found.ndim - 2)


def _of_heads(options: dict[str, Any], first: Any, device: Any) -> dict[str, Any]:
    """Options that depend on the number of a head, for heads that begin with the ``first``."""
    found = dict(options)

    def shifted(function: Any) -> Any:
        return lambda *args: function(*args[:-3], args[-3] + first, *args[-2:])

    for name in ("score_mod", "mask_mod"):
        if options.get(name) is not None:
            found[name] = shifted(options[name])
    if options.get("dropout_key") is not None and not options.get("broadcast_dropout"):
        found["dropout_key"] = jax.random.fold_in(options["dropout_key"], device)
    return found
