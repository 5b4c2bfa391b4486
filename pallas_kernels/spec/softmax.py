"""Softmax over keys that arrive in pieces (Milakov and Gimelshein 2018; FlashAttention, alg. 1).

``m`` is the running maximum of a row's logits, ``l`` the sum of ``exp(s - m)``, ``lse`` their
natural log-sum-exp ``m + log(l)``. A row that has seen nothing has ``m = lse = -inf`` and
``l = 0``; no function here makes a NaN of it, in values or in derivatives. A NaN among the logits
does stay one. Outputs do not depend on which ``m`` is subtracted, so no derivative is taken through
it.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


class State(NamedTuple):
    """Statistics of each row, and the unnormalised output ``sum(exp(s - m) v)``."""

    m: Any  # [..., rows]
    l: Any  # [..., rows]
    acc: Any  # [..., rows, Hv]


def probabilities(s: Any, m: Any, *, base2: bool = False) -> Any:
    """``exp(s - m)``, a row's ``m`` being its maximum or its lse; zero where ``s`` is -inf.

    To base 2, as elsewhere here, logits and ``m`` are multiples of ln 2.
    """
    return _exp(base2)(s - _finite(m)[..., None])


def start(shape: tuple[int, ...], dtype: Any) -> State:
    """The state of rows that have seen nothing; ``shape`` is that of ``acc``."""
    nothing = jnp.zeros(shape[:-1], dtype)
    return State(nothing - jnp.inf, nothing, jnp.zeros(shape, dtype))


def update(state: State, s: Any, *, base2: bool = False) -> tuple[State, Any]:
    """Takes the logits ``s`` [..., rows, keys] into ``m`` and ``l``; rescales ``acc``.

    Returns the state and ``p = exp(s - m)``, whose product with the values is yet to be added.
    """
    m = lax.stop_gradient(jnp.maximum(state.m, jnp.max(s, axis=-1)))
    decay = _exp(base2)(state.m - _finite(m))
    p = probabilities(s, m, base2=base2)
    total = state.l * decay + jnp.sum(p, axis=-1)
    return State(m, total, state.acc * decay[..., None]), p


def keep_nan(state: State) -> State:
    """Statistics of rows that have seen a NaN: of many, XLA on a CPU finds no largest logit."""
    return state._replace(m=jnp.where(jnp.isnan(state.l), jnp.nan, state.m))


def finish(state: State, sink: Any = None, *, base2: bool = False) -> tuple[Any, Any]:
    """The normalised output and the lse. ``sink`` is a logit that takes weight and has no value.

    A row that saw no key gives 0 and -inf, with a sink too. Sink and lse are natural always.
    """
    seen = state.m != -jnp.inf
    m, total = _finite(state.m), state.l
    if base2:
        m = m * math.log(2)
        state = state._replace(m=state.m * math.log(2))
    if sink is not None:
        m = lax.stop_gradient(jnp.maximum(m, sink))
        decay = jnp.exp(_finite(state.m) - m)
        total = total * decay + jnp.exp(sink - m)
        state = state._replace(acc=state.acc * decay[..., None])
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)
    return jnp.where(seen[..., None], state.acc / total[..., None], 0), lse


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any) -> tuple[Any, Any]:
    """The attention over two disjoint sets of keys, from that over each.

    Outputs are [..., rows, Hv], lse [..., rows], all in the compute dtype.
    """
    m = lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    seen = m != -jnp.inf
    m = _finite(m)
    weight_a, weight_b = jnp.exp(lse_a - m), jnp.exp(lse_b - m)
    total = jnp.where(seen, weight_a + weight_b, 1)
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / total[..., None]
    return out, jnp.where(seen, m + jnp.log(total), -jnp.inf)


def delta(out: Any, lse: Any, dout: Any, dlse: Any) -> Any:
    """What a row's ``dp`` is lessened by, so that ``ds = p (dp - delta)``; zero if it saw nothing.

    d lse / d s = p and d out / d s = p (dp - sum(dout out)): one vector carries both cotangents.
    """
    return delta_of_sums(sums_of_rows(out, dout, lse.dtype), lse, dlse)


def sums_of_rows(out: Any, dout: Any, dtype: Any) -> Any:
    """``sum(dout out)`` of each row."""
    return jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1)


def delta_of_sums(sums: Any, lse: Any, dlse: Any) -> Any:
    """`delta`, from what `sums_of_rows` gives."""
    return jnp.where(lse == -jnp.inf, 0, sums - dlse)


def of_sinks(sinks: Any, lse: Any, delta: Any) -> Any:
    """The gradient of sinks [N], from lse and delta [B, T, N]; None without sinks.

    A sink is a key without a value: dp = 0, hence ds = -p delta.
    """
    if sinks is None:
        return None
    p = probabilities(sinks.astype(lse.dtype).reshape(1, 1, -1, 1), lse)[..., 0]
    return jnp.sum(-p * delta, axis=(0, 1)).astype(sinks.dtype)


def _exp(base2: bool) -> Any:
    return jnp.exp2 if base2 else jnp.exp


def _finite(m: Any) -> Any:
    return jnp.where(m == -jnp.inf, 0, m)
