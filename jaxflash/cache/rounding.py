"""Pages of 8 bits: new tokens among those that a page holds already, under one scale."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxflash.cache import pages
from pallas_kernels.spec import narrow


def append(
    held: Float[Array, "P page_size K H"],
    scales: Float32[Array, "P K"],
    new: Float[Array, "B T K H"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, "B"],
    counts: Int32[Array, "B"],
) -> tuple[Float[Array, "P page_size K H"], Float32[Array, "P K"]]:
    """Pages and scales with ``counts`` new tokens after those of each sequence, which have pages.

    The pages that are written are read first: where a new token is too large for a page's scale,
    the scale grows, and what the page holds is rounded again.
    """
    P, page_size, *_ = held.shape
    B, T = new.shape[:2]
    if T == 0:
        return held, scales
    written = (T + page_size - 2) // page_size + 1  # pages at the most
    first = jnp.maximum(lengths, 0) // page_size  # [B]
    start = first[:, None] * page_size + jnp.arange(written, dtype=jnp.int32) * page_size
    place = start[..., None] + jnp.arange(page_size, dtype=jnp.int32)  # [B, written, page_size]
    end = (lengths + counts)[:, None]
    page, exists = pages.find(page_table, start, P, page_size)
    is_written = exists & (start < end) & (counts[:, None] > 0)  # [B, written]

    token = place - lengths[:, None, None]
    is_new = (token >= 0) & (token < counts[:, None, None])
    token = jnp.clip(token, 0, T - 1).reshape(B, -1, 1, 1)
    fresh = jnp.take_along_axis(new.astype(jnp.float32), token, axis=1)
    fresh = _zero_unless(is_new, fresh.reshape(*place.shape, *new.shape[2:]))
    is_held = place < lengths[:, None, None]
    at = jnp.where(is_written, page, 0)
    before = jnp.where(is_held.any(2)[..., None], scales[at], 0)  # [B, written, K]
    kept = _zero_unless(is_held, narrow.widen(held[at], before))

    size = jnp.max(jnp.abs(fresh), axis=(2, 4), where=jnp.isfinite(fresh), initial=0)
    after = jnp.maximum(before, narrow.scales_for(size, held.dtype))
    tokens = narrow.narrow(fresh + kept, after, held.dtype)
    at = jnp.where(is_written, page, P)  # past the end: dropped
    return held.at[at].set(tokens, mode="drop"), scales.at[at].set(after, mode="drop")


def _zero_unless(
    is_there: Bool[Array, "B W page_size"], x: Float[Array, "B W page_size K H"]
) -> Float[Array, "B W page_size K H"]:
    return jnp.where(is_there[..., None, None], x, 0)
