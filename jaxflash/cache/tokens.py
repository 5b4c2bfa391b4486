"""New tokens for a cache of either kind: what they must look like, how many of them fit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jaxflash import checks
from jaxflash.cache.rules import Rule, integers
from jaxflash.partitioning import is_local


def new_tokens(key: Any, value: Any, batch: int, like: tuple[Any, Any]) -> tuple[Any, Any]:
    """Key [B, T, K, H] and value [B, T, K, Hv] as arrays; they must fit what the cache holds."""
    key, value = checks.as_array("key", key), checks.as_array("value", value)
    for name, x, held, H in (("key", key, like[0], "H"), ("value", value, like[1], "Hv")):
        heads, head_dim = held.shape[2:]
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, head_dim):
            raise ValueError(
                f"{name} must have shape [B, T, K, {H}] = ({batch}, T, {heads}, {head_dim}) to fit "
                f"the cache; got shape {x.shape}"
            )
        if held.dtype in checks.NARROW:
            checks.float_dtype(name, x.dtype, f"; convert it with {name}.astype")
        elif x.dtype != held.dtype:
            raise TypeError(
                f"{name} must have the cache's dtype {held.dtype}; got {x.dtype}; convert it with "
                f"{name}.astype"
            )
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"key and value must have as many tokens T; got {key.shape[1]} and {value.shape[1]}"
        )
    return key, value


def counted(counts: Any, batch: int, new: int, capacity: int, remedy: str) -> Any:
    """How many of T new tokens are meant for each sequence: int32 [B], T by default."""
    if new > capacity:
        raise ValueError(
            f"T = {new} new tokens exceed the capacity of {capacity} tokens a sequence; {remedy}"
        )
    if counts is None:
        return np.full(batch, new, np.int32)
    counts = integers("counts", counts)
    checks.shaped("counts", counts, (batch,), "[B]")
    return counts


def count_rules(
    lengths: Any, counts: Any, new: int, capacity: int, remedy: str
) -> tuple[Rule, Rule]:
    """Counts lie in [0, T], and that many tokens fit."""
    batch = np.arange(len(lengths))
    return (
        Rule(
            (counts >= 0) & (counts <= new),
            f"counts must lie in [0, T] = [0, {new}]; got {{}} for sequence {{}}",
            (counts, batch),
        ),
        Rule(
            (lengths >= 0) & (lengths + counts <= capacity),
            f"{{}} new tokens for sequence {{}}, which holds {{}}, exceed the capacity of "
            f"{capacity}; {remedy}",
            (counts, batch, lengths),
        ),
    )


def fitting(lengths: Int32[Array, "B"], counts: Any, new: int, capacity: int) -> Any:
    """How many of ``counts`` new tokens there are and fit, int32 [B]; none after length < 0."""
    room = jnp.where(lengths >= 0, capacity - lengths, 0)
    return jnp.clip(counts, 0, jnp.clip(room, 0, new))


def write(
    held: tuple[Any, ...], new: tuple[Any, ...], row: Any, place: Int32[Array, "B T"]
) -> tuple[Any, ...]:
    """Arrays [rows, places, K, _] with new ones [B, T, K, _] at rows and places [B, T].

    What is past the end of either axis is dropped.
    """
    at: tuple[Any, ...] = row, place
    if place.size == 1:
        if is_local():
            return tuple(_write_one(x, y, row, place) for x, y in zip(held, new, strict=True))
        # XLA makes five small kernels of a scatter of one row, and one of a row for each head.
        at = row[..., None], place[..., None], np.arange(held[0].shape[2], dtype=np.int32)
    return tuple(
        x.at[at].set(tokens, mode="drop", out_sharding=_explicit_sharding(x))
        for x, tokens in zip(held, new, strict=True)
    )


def _write_one(x: Any, token: Any, row: Any, place: Any) -> Any:
    """The same of one token. XLA makes a shorter kernel of it than of a scatter (bench/LOG.md).

    It reads what is there. Of an array whose rows or places are divided that gathers all.
    """
    row, place = jnp.reshape(row, ()), jnp.reshape(place, ())
    at = row, place, np.int32(0), np.int32(0)  # of one type, as they must be
    exists = (row < x.shape[0]) & (place < x.shape[1])
    old = lax.dynamic_slice(x, at, token.shape)
    return lax.dynamic_update_slice(x, jnp.where(exists, token, old), at)


def _explicit_sharding(x: Any) -> Any:
    """As its type says over explicit mesh axes, else None."""
    sharding = jax.typeof(x).sharding
    return sharding if any(sharding.spec) else None


def check_held(
    prefix: str,
    key: Any,
    value: Any,
    axes: tuple[str, str],
    check_dtype: Callable[[str, Any, str], Any] = checks.float_dtype,
) -> None:
    """What a cache holds: two arrays of a dtype it may have that agree but for their last axis."""
    for name, x, named in ((f"key{prefix}", key, axes[0]), (f"value{prefix}", value, axes[1])):
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes {named}; got shape {x.shape}")
        check_dtype(name, x.dtype, f"; convert it with {name}.astype")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key{prefix} and value{prefix} must agree but for their last axis; got shapes "
            f"{key.shape} and {value.shape}"
        )
