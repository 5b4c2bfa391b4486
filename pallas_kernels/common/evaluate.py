"""Programs traced outside of a kernel, evaluated on tiles of registers inside of it.

A user's elementwise function is traced on scalars. Here its program runs on matrices: scalars are
spread where they meet one, what some kind of kernel cannot lower is replaced by what all can, and
an array that the function captured is a reference to global memory, read element by element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import spec

# From a reference to a flat array and an index, a scalar or a matrix of them, to the elements.
Read = Callable[[Any, Any], Any]
_MOST_ELEMENTS = 2**31 - 1  # of an array that is captured: its elements are counted in 32 bits


class InKernel:
    """A `spec.ElementFunction` that is applied inside a kernel; its captures are references."""

    def __init__(self, function: spec.ElementFunction, read: Read) -> None:
        self._function, self._read = function, read

    def __call__(self, captures: tuple[Any, ...], *args: Any) -> jax.Array:
        return evaluate(self._function.program, self._read, captures, *args)[0]

    def with_slope(self, captures: tuple[Any, ...], *args: Any) -> list[jax.Array]:
        """Also the derivative by the first argument."""
        return evaluate(self._function.with_slope, self._read, captures, *args)


def in_kernel(problem: spec.Problem, read: Read) -> spec.Problem:
    """The problem with functions that a kernel can call."""
    score: Any = problem.score_mod and InKernel(problem.score_mod, read)
    mask: Any = problem.mask_mod and InKernel(problem.mask_mod, read)
    return dataclasses.replace(problem, score_mod=score, mask_mod=mask)


def flat(captures: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Captured arrays as `evaluate` wants them: flat, booleans as int8."""
    return tuple(
        x.reshape(-1).astype(jnp.int8 if x.dtype == jnp.bool_ else x.dtype) for x in captures
    )


class _Captured(NamedTuple):
    """A part of a captured array that has not been read: one element once ``shape`` is ()."""

    ref: Any  # flat
    load: Read
    strides: tuple[int, ...]
    sizes: tuple[int, ...]  # of the axes
    offset: Any  # flat index of the first element
    dtype: Any

    @classmethod
    def whole(cls, ref: Any, load: Read, aval: Any) -> _Captured:
        strides = tuple(math.prod(aval.shape[i + 1 :]) for i in range(aval.ndim))
        return cls(ref, load, strides, aval.shape, 0, aval.dtype)

    def read(self) -> Any:
        value = self.load(self.ref, self.offset)
        return value != 0 if self.dtype == jnp.bool_ else value


def evaluate(program: Any, read: Read, captures: Sequence[Any], *args: Any) -> list[Any]:
    """Applies a program of captured arrays and scalars to matrices and scalars.

    Args:
      program: ClosedJaxpr; its first inputs are the captured arrays, its constants scalars.
      read: Reads elements of captured arrays.
      captures: References to them, as `flat` makes them.
      *args: The rest of the inputs: scalars, or matrices of one shape.

    Returns:
      The program's outputs; a scalar stands for a matrix of them.
    """
    jaxpr = program.jaxpr
    avals = [v.aval for v in jaxpr.invars[: len(captures)]]
    views = [_simplest(_Captured.whole(r, read, a)) for r, a in zip(captures, avals, strict=True)]
    return _run(jaxpr, program.consts, [*views, *args])


def refusal(program: Any) -> str | None:
    """Why a program cannot be evaluated in a kernel; None if it can."""
    for equation in program.jaxpr.eqns:
        name = equation.primitive.name
        if name in _CALLS:
            reason = refusal(_callee(equation))
            if reason is not None:
                return reason
        elif name not in SUPPORTED and name not in _VIEWS:
            return f"its operation {name!r} has no form inside a kernel"
        elif any(v.aval.shape for v in equation.outvars) and name not in _VIEWS:
            return f"it computes an array, by {name!r}, and not one score at a time"
    return None


def refused_functions(problem: spec.Problem) -> str | None:
    """Why a kernel cannot apply a problem's functions, or None."""
    functions = {"score_mod": problem.score_mod, "mask_mod": problem.mask_mod}
    for name, function in functions.items():
        reason = None if function is None else refusal(function.program)
        if reason is not None:
            return f"cannot run this {name}: {reason}"
    x = problem.operands
    captured = (*x.score_consts, *x.mask_consts)
    wide = [c.dtype for c in captured if c.dtype.itemsize > 4]
    if wide:
        return f"takes captured arrays of at most 32 bits; got {wide[0]}"
    large = [c.shape for c in captured if math.prod(c.shape) > _MOST_ELEMENTS]
    return f"counts elements of captured arrays in 32 bits; got {large[0]}" if large else None


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def value(atom: Any) -> Any:
        # Of its own dtype: Pallas-Triton gives numbers without one that of another operand, though
        # this be the condition of a choice.
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        inputs = [value(v) for v in equation.invars]
        values.update(zip(equation.outvars, _apply(equation, inputs), strict=True))
    return [value(v) for v in jaxpr.outvars]


def _apply(equation: Any, inputs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        callee = _callee(equation)
        return _run(callee.jaxpr, callee.consts, inputs)
    if isinstance(inputs[0], _Captured):
        return [_simplest(_VIEWS[name](*inputs, **params))]
    if name in _VIEWS:  # of what is one number already
        return [inputs[0]]
    shapes = {jnp.shape(x) for x in inputs} - {()}
    if shapes:
        shape = jnp.broadcast_shapes(*shapes)
        inputs = [x if jnp.shape(x) == shape else jnp.broadcast_to(x, shape) for x in inputs]
    if all(isinstance(x, np.ndarray) for x in inputs):  # nor has it all operations of constants
        with jax.ensure_compile_time_eval():
            return [np.asarray(x) for x in _bind(equation, inputs)]
    if name in _IN_FLOAT32 and (dtype := jnp.result_type(inputs[0])) in _HALVES:
        return [x.astype(dtype) for x in _bind(equation, [x.astype(jnp.float32) for x in inputs])]
    return _bind(equation, inputs)


def _bind(equation: Any, inputs: Sequence[Any]) -> list[Any]:
    """The results of an operation on numbers."""
    name, params = equation.primitive.name, equation.params
    if name in _REPLACED:
        return [_REPLACED[name](*inputs, **params)]
    if params.get("accuracy") is not None:  # there is one way to compute it
        params = params | {"accuracy": None}
    out = equation.primitive.bind(*inputs, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def _simplest(view: _Captured) -> Any:
    """The element, if it is one."""
    return view if view.sizes else view.read()


def _dynamic_slice(view: _Captured, *starts: Any, slice_sizes: Any, **_: Any) -> _Captured:
    offset = view.offset
    for start, size, full, stride in zip(
        starts, slice_sizes, view.sizes, view.strides, strict=True
    ):
        if full > size:
            offset = offset + jnp.clip(start, 0, full - size).astype(jnp.int32) * stride
    return view._replace(offset=offset, sizes=tuple(slice_sizes))


def _slice(
    view: _Captured, start_indices: Any, limit_indices: Any, strides: Any, **_: Any
) -> _Captured:
    steps = strides or (1,) * len(view.sizes)
    offset = view.offset + sum(a * b for a, b in zip(start_indices, view.strides, strict=True))
    bounds = zip(start_indices, limit_indices, steps, strict=True)
    sizes = tuple(-((a - b) // s) for a, b, s in bounds)
    moved = tuple(a * b for a, b in zip(view.strides, steps, strict=True))
    return view._replace(offset=offset, sizes=sizes, strides=moved)


def _squeeze(view: _Captured, dimensions: Any, **_: Any) -> _Captured:
    kept = [i for i in range(len(view.sizes)) if i not in dimensions]
    return view._replace(
        sizes=tuple(view.sizes[i] for i in kept), strides=tuple(view.strides[i] for i in kept)
    )


def _not(x: Any, **_: Any) -> Any:
    return x ^ (True if x.dtype == jnp.bool_ else jnp.array(-1, x.dtype))


def _floor(x: Any, **_: Any) -> Any:
    nearest = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    return nearest - jnp.where(nearest > x, 1, 0).astype(x.dtype)


def _integer_pow(x: Any, y: int, **_: Any) -> Any:
    power = x
    for _i in range(abs(y) - 1):
        power = power * x
    return power if y > 0 else 1 / power


def _polynomial(x: Any, *coefficients: Any, **_: Any) -> Any:
    """The lowest order comes first."""
    *rest, total = coefficients
    for c in reversed(rest):
        total = total * x + c
    return total


def _erf(x: Any, **_: Any) -> Any:
    """Abramowitz and Stegun 7.1.26: error below 1.5e-7."""
    t = 1 / (1 + 0.3275911 * jnp.abs(x))
    series: Any = 1.061405429
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + c
    y = 1 - series * t * jnp.exp(-x * x)
    return jnp.where(x < 0, -y, y)


_VIEWS: dict[str, Callable[..., Any]] = {
    "dynamic_slice": _dynamic_slice,
    "slice": _slice,
    "squeeze": _squeeze,
}

_REPLACED: dict[str, Callable[..., Any]] = {
    "not": _not,
    "floor": _floor,
    "ceil": lambda x, **_: -_floor(-x),
    "log1p": lambda x, **_: jnp.log(1 + x),
    "expm1": lambda x, **_: jnp.exp(x) - 1,
    "pow": lambda x, y, **_: jnp.exp2(jnp.log2(x) * y.astype(x.dtype)),
    "integer_pow": _integer_pow,
    "square": lambda x, **_: x * x,
    "one_minus_square": lambda x, **_: 1 - x * x,
    "logistic": lambda x, **_: 1 / (1 + jnp.exp(-x)),
    "erf": _erf,
    "polynomial": _polynomial,
    "sign": lambda x, **_: jnp.where(x > 0, 1, jnp.where(x < 0, -1, 0)).astype(x.dtype),
    "abs": lambda x, **_: jnp.where(x < 0, -x, x),
    "is_finite": lambda x, **_: (x > -math.inf) & (x < math.inf),
    "copy": lambda x, **_: x,
    "copy_p": lambda x, **_: x,
    "stop_gradient": lambda x, **_: x,
    "reshard": lambda x, **_: x,
    "add_any": lambda x, y, **_: x + y,
    "convert_element_type": lambda x, new_dtype, **_: lax.convert_element_type(x, new_dtype),
    "clamp": lambda low, x, high, **_: jnp.minimum(jnp.maximum(x, low), high),
    "broadcast_in_dim": lambda x, **_: x,
    "reshape": lambda x, **_: x,
}

if jax.__version_info__ < (0, 11):  # has no lowering of it
    _REPLACED["sqrt"] = lambda x, **_: jnp.exp2(jnp.log2(x) * 0.5)

_ELEMENTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "rem",
        "neg",
        "max",
        "min",
        "and",
        "or",
        "xor",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "select_n",
        "exp",
        "exp2",
        "log",
        "log2",
        "tanh",
        "sin",
        "cos",
        "sqrt",
        "rsqrt",
        "shift_left",
        "shift_right_logical",
        "shift_right_arithmetic",
        "round",
        "bitcast_convert_type",
    ]
)

_HALVES = (jnp.bfloat16, jnp.float16)

# What kernels compute in 32 bits only; the result is then rounded.
_IN_FLOAT32 = frozenset(
    [
        *("div", "exp", "exp2", "expm1", "log", "log2", "log1p", "tanh", "sin", "cos", "sqrt"),
        *("rsqrt", "round", "floor", "ceil", "pow", "integer_pow", "logistic", "erf", "polynomial"),
    ]
)

# What `refusal` accepts of numbers.
SUPPORTED = frozenset(_REPLACED) | _ELEMENTWISE

_CALLS = {
    "pjit": "jaxpr",
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat": "jaxpr",
    "checkpoint": "jaxpr",
}


class _Callee(NamedTuple):
    jaxpr: Any
    consts: Any


def _callee(equation: Any) -> _Callee:
    inner = equation.params[_CALLS[equation.primitive.name]]
    return _Callee(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()))
