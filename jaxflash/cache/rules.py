"""Rules about numbers in arrays: enforced at trace time when known then, else at run time."""

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxflash import checks


class Rule(NamedTuple):
    """What must hold of every element."""

    holds: Any  # bool [...]; an array of numpy's where it is known at trace time
    message: str  # formatted with `values` where the rule first fails
    values: tuple[Any, ...]  # each broadcasts to the shape of `holds`


def enforce(x: Any, *rules: Rule, debug_checks: bool) -> Any:
    """``x``, once every rule holds.

    Rules about numpy arrays are checked always, at trace time. The others are checked with
    ``debug_checks``: of concrete arrays at once, of traced ones by a callback at run time, which
    returns ``x``: what is computed from ``x`` waits for the callback, and fails with it.

    Raises:
      ValueError: a rule is broken; from inside jit it arrives as jax.errors.JaxRuntimeError.
    """
    for rule in rules:
        # Two numbers compare to one that is no array.
        is_static = isinstance(rule.holds, np.ndarray | np.generic)
        if not (is_static or debug_checks) or rule.holds.size == 0:
            continue
        first = _first_failure(rule, np if is_static else jnp)
        if isinstance(first[0], jax.core.Tracer):
            passed = jax.ShapeDtypeStruct(x.shape, x.dtype)
            x = io_callback(partial(_pass, rule.message), passed, x, *first)
        else:
            _raise_unless(rule.message, *first)
    return x


def integers(name: str, x: Any) -> Any:
    """``x`` as int32, and as an array of numpy's unless it is one of JAX's."""
    if isinstance(x, jax.Array):
        checks.int32(name, x)
        return x
    x = np.asarray(x)
    if x.size > 0 and not np.issubdtype(x.dtype, np.integer):
        raise TypeError(f"{name} must hold integers; got {x.dtype}")
    return np.clip(x.astype(np.int64), -(2**31), 2**31 - 1).astype(np.int32)


def _first_failure(rule: Rule, xp: ModuleType) -> tuple[Any, ...]:
    """Whether the rule holds everywhere, and the values where it first does not."""
    at = xp.argmin(xp.ravel(rule.holds))
    return tuple(
        xp.ravel(xp.broadcast_to(x, rule.holds.shape))[at] for x in (rule.holds, *rule.values)
    )


def _pass(message: str, x: Any, holds: Any, *values: Any) -> Any:
    _raise_unless(message, holds, *values)
    return x


def _raise_unless(message: str, holds: Any, *values: Any) -> None:
    if not holds:
        raise ValueError(message.format(*map(int, values)))
