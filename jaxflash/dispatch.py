"""Which backend runs a problem, and why each other one does not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxflash import native, portable, reference, xla
from jaxflash.gathering import gathering
from jaxflash.quantization import emulating
from pallas_kernels import hopper, spec

Results = tuple[jax.Array, jax.Array]


class Backend(NamedTuple):
    """One way to compute attention.

    ``supports`` returns None, or the reason why it refuses. ``backward`` takes (problem, operands,
    out, lse, dout, dlse); without one, JAX differentiates the forward. ``lacks_gradients`` returns
    None, or the reason why ``backward`` is that of `xla`.
    """

    name: str
    supports: Callable[[spec.Problem], str | None]
    forward: Callable[[spec.Problem, spec.Operands], Results]
    backward: Callable[..., spec.Operands] | None
    lacks_gradients: Callable[[spec.Problem], str | None] = lambda problem: None


# In the order in which they are tried.
BACKENDS = (
    Backend("hopper", hopper.supports, native.forward, native.backward, native.lacks_gradients),
    Backend(
        "triton",
        portable.supports,
        portable.forward,
        portable.backward,
        portable.lacks_gradients,
    ),
    Backend("xla", xla.supports, emulating(xla.forward), xla.backward),
    Backend("reference", reference.supports, emulating(reference.forward), None),
)

# The same for attention of new tokens to a cache, whose keys and values may be in pages.
OF_CACHES = (
    Backend("hopper", hopper.supports, native.attend_cache, None),
    Backend("triton", portable.supports, portable.attend_cache, None),
    Backend("xla", xla.supports, gathering(xla.forward), None),
    Backend("reference", reference.supports, gathering(reference.forward), None),
)


class Explanation(NamedTuple):
    """What ``jaxflash.explain`` found: the backend that runs, and each one's refusal."""

    runs: str | None
    refusals: dict[str, str | None]  # None: the backend would accept
    sharding: str | None = None  # what is divided among devices, and what is gathered
    gradients: str | None = None  # why those of the backend that runs, all of them, are `xla`'s

    def __str__(self) -> str:
        width = max(map(len, self.refusals))
        lines = [
            f"{name:<{width}}  {self._verdict(name, why)}" for name, why in self.refusals.items()
        ]
        return "\n".join([*lines, self.sharding] if self.sharding else lines)

    def _verdict(self, name: str, refusal: str | None) -> str:
        if name == self.runs:
            return f"runs; gradients by xla: {self.gradients}" if self.gradients else "runs"
        return "would run if asked for" if refusal is None else f"refuses: {refusal}"


def check_name(implementation: Any) -> None:
    """Raises unless ``implementation`` is None or the name of a backend."""
    names = [backend.name for backend in BACKENDS]
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"implementation must be None or one of {names}; got {implementation!r}. "
            "None picks the fastest that supports the call"
        )


def select(
    problem: spec.Problem,
    implementation: str | None,
    backends: tuple[Backend, ...] | None = None,
) -> Backend:
    """The backend named, or the first that supports the problem. Never falls back silently."""
    backend, refusals = _choose(problem, implementation, backends or BACKENDS)
    if backend is not None:
        return backend
    refusals = {k: v for k, v in refusals.items() if implementation in (None, k)}
    raise ValueError(
        "no implementation supports this call: "
        + "; ".join(f"{name!r} refuses: {why}" for name, why in refusals.items())
        + ". jaxflash.explain(...) with the same arguments lists all of them"
    )


def explain(problem: spec.Problem, implementation: str | None) -> Explanation:
    """Asks every backend about ``problem``, and the one that runs about gradients."""
    backend, refusals = _choose(problem, implementation, BACKENDS)
    if backend is None:
        return Explanation(None, refusals)
    return Explanation(backend.name, refusals, gradients=backend.lacks_gradients(problem))


def _choose(
    problem: spec.Problem, implementation: str | None, backends: tuple[Backend, ...]
) -> tuple[Backend | None, dict[str, str | None]]:
    """The backend that runs, if one does, and what each says."""
    check_name(implementation)
    refusals = {backend.name: backend.supports(problem) for backend in backends}
    accepting = (
        backend
        for backend in backends
        if refusals[backend.name] is None and implementation in (None, backend.name)
    )
    return next(accepting, None), refusals
