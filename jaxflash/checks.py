"""Checks of what users pass: each raises an error that names the argument, its value, a remedy."""

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxflash.quantization import QuantizedArray
from pallas_kernels.spec import narrow
from pallas_kernels.spec.quantization import FP8

FLOATS = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)))
NARROW = narrow.DTYPES
# Positions and what windows add to them must stay integers of 32 bits.
_MOST_OFFSET, _UNLIMITED = 2**30, 2**29
PAGE_SIZES = (16, 32, 64, 128, 256)


def as_array(name: str, x: Any) -> Any:
    """``x`` as an array."""
    if isinstance(x, QuantizedArray):
        raise TypeError(
            f"{name} must be an array; a QuantizedArray is for dot_product_attention alone"
        )
    is_number_or_list = isinstance(x, Sequence | numbers.Number) and not isinstance(x, str)
    is_array = hasattr(x, "dtype") or hasattr(x, "__jax_array__")
    if not is_array and not is_number_or_list:
        raise TypeError(f"{name} must be an array; got {_shown(x)}")
    return jnp.asarray(x)


def operand(name: str, x: Any) -> Any:
    """``x`` as an array, or quantised."""
    return x if isinstance(x, QuantizedArray) else as_array(name, x)


def qkv(query: Any, key: Any, value: Any) -> None:
    """The three arrays must fit each other."""
    for name, x, axes in (
        ("query", query, "[*B, T, N, H]"),
        ("key", key, "[*B, S, K, H]"),
        ("value", value, "[*B, S, K, Hv]"),
    ):
        if x.ndim < 3:
            raise ValueError(f"{name} must have at least three axes {axes}; got shape {x.shape}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be bfloat16, float16, float32 or float64; got {x.dtype}; "
                f"convert it with {name}.astype"
            )
        if x.dtype != query.dtype:
            raise TypeError(
                f"query, key and value must share a dtype; got query {query.dtype} and {name} "
                f"{x.dtype}; convert one with .astype"
            )
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"query, key and value must share their batch axes; got query {query.shape} and "
                f"{name} {x.shape}"
            )
    _heads(query.shape, key.shape, value.shape)


def _heads(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    if k[-3] != v[-3]:
        raise ValueError(f"key and value must have the same length S; got {k[-3]} and {v[-3]}")
    if k[-2] != v[-2]:
        raise ValueError(f"key and value must have the same heads K; got {k[-2]} and {v[-2]}")
    if q[-1] != k[-1]:
        raise ValueError(
            f"query and key must have the same head dimension H; got {q[-1]} and {k[-1]}"
        )
    if 0 in (q[-1], q[-2], k[-2], v[-1]):
        raise ValueError(
            f"heads and head dimensions must be positive; got query {q}, key {k}, value {v}"
        )
    if q[-2] % k[-2] != 0:
        raise ValueError(
            f"query heads N must be a multiple of key-value heads K; got N={q[-2]}, K={k[-2]}; "
            "each key-value head serves N // K query heads"
        )


def broadcastable(name: str, x: Any, full: tuple[int, ...]) -> None:
    """``x`` must broadcast to the logits [*B, N, T, S]."""
    fits = x.ndim <= len(full) and all(
        size in (1, whole) for size, whole in zip(x.shape[::-1], full[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to the logits [*B, N, T, S] = {full}; got shape {x.shape}"
        )


def shaped(name: str, x: Any, shape: tuple[int, ...], axes: str) -> None:
    """``x`` must have exactly this shape."""
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}; got shape {x.shape}")


def int32(name: str, x: Any) -> None:
    """``x`` must be int32."""
    if x.dtype != jnp.int32:
        raise TypeError(f"{name} must be int32; got {x.dtype}; convert it with .astype(jnp.int32)")


def int32_range(name: str, x: Any) -> None:
    """A static integer must fit positions."""
    if not -_MOST_OFFSET <= x < _MOST_OFFSET:
        raise ValueError(f"{name} must be within 2**30 of zero; got {x}")


def floating(name: str, x: Any, remedy: str = "") -> None:
    """``x`` must be of a floating dtype."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating; got {x.dtype}{remedy}")


def boolean_array(name: str, x: Any) -> None:
    """``x`` must be boolean."""
    if x.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be boolean; got {x.dtype}; pass an additive mask as bias, or a 0/1 mask "
            f"as {name} != 0"
        )


def flag(name: str, x: Any) -> bool:
    """A Python bool."""
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, known at trace time; got {_shown(x)}")
    return bool(x)


def number(name: str, x: Any, remedy: str) -> float:
    """A finite number known at trace time."""
    if not _is_real(x):
        raise TypeError(f"{name} must be a number known at trace time; got {_shown(x)}; {remedy}")
    if not math.isfinite(float(x)):
        raise ValueError(f"{name} must be finite; got {float(x)}")
    return float(x)


def window(x: Any) -> tuple[int | None, int | None] | None:
    """``local_window_size`` as (left, right); None is without a limit."""
    if x is None:
        return None
    pair = (x, x) if is_int(x) else x
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(map(is_int, pair)):
        raise TypeError(
            f"local_window_size must be an int or a pair (left, right) of ints; got {_shown(x)}"
        )
    if min(pair) < 0:
        raise ValueError(
            f"local_window_size must not be negative; got {x!r}; the window (left, right) reaches "
            "from position - left to position + right, both included"
        )
    left, right = (int(reach) if reach < _UNLIMITED else None for reach in pair)
    return left, right


def dropout(rate: Any, key: Any) -> tuple[float, Any]:
    """The rate, and two words of the key's (None at rate zero)."""
    rate = number("dropout_rate", rate, "make it a Python float")
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1); got {rate}")
    if rate == 0.0:
        return 0.0, None
    if key is None:
        raise ValueError(f"dropout_rate={rate} needs a dropout_key; pass jax.random.key(...)")
    try:
        return rate, jax.random.bits(key, (2,), jnp.uint32)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"dropout_key must be one key of jax.random, jax.random.key(...); got {_shown(key)}"
        ) from error


def element_function(name: str, function: Any, arguments: str) -> Callable[..., Any]:
    """A callable of the arguments named."""
    if not callable(function):
        raise TypeError(f"{name} must be a function ({arguments}); got {_shown(function)}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return function
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise TypeError(f"{name} must take ({arguments}); got {name}{signature}") from error
    return function


def element_result(name: str, result: Any, kind: Any, remedy: str) -> None:
    """An elementwise function must return one scalar of a kind of dtype."""
    if len(result) != 1 or result[0].shape != ():
        raise ValueError(
            f"{name} must return one scalar, it is applied to each logit; got "
            f"{[str(x) for x in result]}"
        )
    if not jnp.issubdtype(result[0].dtype, kind):
        raise TypeError(f"{name} must return {remedy}; got {result[0].dtype}")


def precision(x: Any) -> Any:
    """A jax.lax.Precision, "fp8", or None."""
    if x is None or isinstance(x, jax.lax.Precision) or x == FP8:
        return x
    try:
        return jax.lax.Precision(x)
    except ValueError as error:
        raise ValueError(
            "precision must be None, a jax.lax.Precision, or one of 'default', 'high', 'highest', "
            f"{FP8!r}; got {x!r}"
        ) from error


def captured(name: str, consts: tuple[Any, ...]) -> None:
    """What a function captures must be real, or its gradient would need a convention."""
    for x in consts:
        if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
            raise TypeError(f"{name} must capture no complex array; got {_shown(x)}; split it")


def not_in_checked_shard_map(name: str, function: Any, arrays: Any) -> None:
    """The types of a traced function do not say over which mesh axes its values vary."""
    varies = any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))
    if function is not None and varies:
        raise ValueError(
            f"{name} inside jax.shard_map needs check_vma=False; got {function!r} and operands "
            "that vary over mesh axes"
        )


def is_int(x: Any) -> bool:
    """Whether ``x`` is an integer, and neither a bool nor an array."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def count(name: str, x: Any) -> int:
    """An integer that is not negative, known at trace time."""
    if not is_int(x):
        raise TypeError(f"{name} must be an int; got {_shown(x)}")
    if x < 0:
        raise ValueError(f"{name} must not be negative; got {x}")
    return int(x)


def size(name: str, x: Any) -> int:
    """A positive integer known at trace time."""
    if count(name, x) == 0:
        raise ValueError(f"{name} must be positive; got 0")
    return int(x)


def page_size(x: Any) -> int:
    """Tokens in a page."""
    if size("page_size", x) not in PAGE_SIZES:
        raise ValueError(f"page_size must be one of {PAGE_SIZES}; got {x}")
    return int(x)


def float_dtype(name: str, x: Any, remedy: str = "") -> jnp.dtype:
    """A dtype of keys and values."""
    return _dtype(name, x, FLOATS, remedy)


def page_dtype(name: str, x: Any, remedy: str = "") -> jnp.dtype:
    """A dtype of pages."""
    return _dtype(name, x, (*FLOATS, *NARROW), remedy)


def _dtype(name: str, x: Any, known: tuple[Any, ...], remedy: str) -> jnp.dtype:
    *others, last = map(str, known)
    if jnp.dtype(x) not in known:
        raise TypeError(f"{name} must be {', '.join(others)} or {last}; got {jnp.dtype(x)}{remedy}")
    return jnp.dtype(x)


def scales(key_pages: Any, value_pages: Any, key_scale: Any, value_scale: Any) -> None:
    """Pages of 8 bits have scales, float32 [P, K] each; others have none."""
    named = ("key_scale", key_pages, key_scale), ("value_scale", value_pages, value_scale)
    dtypes = key_pages.dtype, value_pages.dtype
    if dtypes[0] != dtypes[1] and set(dtypes) & set(NARROW):
        raise TypeError(
            f"key_pages and value_pages must share a dtype; got {dtypes[0]} and {dtypes[1]}"
        )
    for name, pages, scale in named:
        if pages.dtype not in NARROW:
            if scale is not None:
                raise ValueError(f"{name} is for pages of 8 bits; got pages of {pages.dtype}")
            continue
        if scale is None:
            raise ValueError(f"pages of {pages.dtype} need {name}, float32 [P, K]; got None")
        shaped(name, scale, (pages.shape[0], pages.shape[2]), "[P, K]")
        if scale.dtype != jnp.float32:
            raise TypeError(f"{name} must be float32; got {scale.dtype}")


def _is_real(x: Any) -> bool:
    """A number, or a concrete array of one."""
    if isinstance(x, bool | jax.core.Tracer):
        return False
    dtype = getattr(x, "dtype", object)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return isinstance(x, numbers.Real) or (is_real and jnp.shape(x) == ())


def _shown(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    return f"{x!r} ({type(x).__name__})"
