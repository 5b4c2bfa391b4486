"""What is right: the reference in a wider dtype, and how far the reference in the dtype gets.

A result passes when ``err(it) <= 2 * err(jnp in its dtype) + eps``, errors being the largest ones
relative to the largest entry.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxflash import reference
from jaxflash.arguments import canonicalize
from tests.cases import Arrays, Case

_CEILING = 0.1


class Results(NamedTuple):
    """Everything that a backend computes for a case."""

    out: Any
    lse: Any
    gradients: dict[str, Any]


def evaluate(case: Case, arrays: Arrays, attention: Callable[..., Any]) -> Results:
    """``attention`` with its residual, and its gradients for fixed random cotangents."""
    function, floating = computation(case, arrays, attention)
    return jax.tree.map(np.asarray, jax.jit(function)(floating))


def computation(
    case: Case, arrays: Arrays, attention: Callable[..., Any]
) -> tuple[Callable[[Arrays], Results], Arrays]:
    """What `evaluate` computes, and of what."""
    floating = {k: jnp.asarray(x) for k, x in arrays.items() if _is_floating(x)}
    others = {k: jnp.asarray(x) for k, x in arrays.items() if k not in floating}

    def run(floating: Arrays) -> Results:
        (out, lse), pull = jax.vjp(lambda f: case.call(attention, {**f, **others}), floating)
        rng = np.random.default_rng(0)
        cotangents = tuple(
            jnp.asarray(rng.standard_normal(x.shape), jnp.float32).astype(x.dtype)
            for x in (out, lse)
        )
        return Results(out, lse, pull(cotangents)[0])

    return run, floating


def expected(case: Case, arrays: Arrays) -> Results:
    """The reference in float64."""
    wide = {k: x.astype(np.float64) if _is_floating(x) else x for k, x in arrays.items()}
    with on_a_cpu(), jax.enable_x64(True):
        return evaluate(case, wide, reference_in(None))


def attainable(case: Case, arrays: Arrays) -> Results:
    """The reference with everything in the dtype of the case."""
    with on_a_cpu():
        return evaluate(case, arrays, reference_in(jnp.dtype(case.dtype)))


def on_a_cpu() -> Any:
    """Where a GPU is tested, too: for it, what is right would take long to compile."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def check(actual: Results, attained: Results, truth: Results, dtype: Any) -> None:
    """Compares out, lse and every gradient with the truth."""
    assert actual.gradients.keys() == truth.gradients.keys()
    for name, a, b, t in (
        ("out", actual.out, attained.out, truth.out),
        ("lse", actual.lse, attained.lse, truth.lse),
        *(
            (f"gradient of {k}", actual.gradients[k], attained.gradients[k], t)
            for k, t in truth.gradients.items()
        ),
    ):
        check_array(name, a, b, t, dtype)


def check_array(
    name: str, actual: np.ndarray, attained: np.ndarray, truth: np.ndarray, dtype: Any
) -> None:
    """Compares one array with the truth."""
    assert actual.shape == truth.shape, (name, actual.shape, truth.shape)
    eps = float(jnp.finfo(dtype).eps)
    eps *= 0.5 if jnp.dtype(dtype).itemsize == 2 else 16
    # Where positions or sums are beyond the dtype, the reference in it says little.
    allowed = 2 * min(error(attained, truth), _CEILING) + eps
    found = error(actual, truth)
    assert found <= allowed, f"{name}: error {found:.3g}, allowed {allowed:.3g}"


def error(x: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, relative to the largest entry; infinite where -inf or NaN differ."""
    x, truth = x.astype(np.float64), truth.astype(np.float64)
    finite = np.isfinite(truth)
    if not np.array_equal(x[~finite], truth[~finite], equal_nan=False):
        return np.inf
    if not np.isfinite(x[finite]).all():
        return np.inf
    scale = np.abs(truth[finite]).max(initial=0.0)
    return float(np.abs(x[finite] - truth[finite]).max(initial=0.0) / max(scale, 1e-30))


def reference_in(compute_dtype: Any) -> Callable[..., Any]:
    """Attention by the reference that computes in a dtype; returns out and lse."""

    def attention(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        problem, operands = canonicalize(*args, **options)
        out, lse = reference.forward(problem, operands, compute_dtype)
        batch = args[0].shape[:-3]
        return out.reshape(*batch, *out.shape[1:]), lse.reshape(*batch, *lse.shape[1:])

    return attention


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
