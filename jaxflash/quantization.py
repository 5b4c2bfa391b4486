"""8-bit attention: arrays with scales, and what ``precision="fp8"`` means for every backend."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxflash import checks
from jaxflash.device import target
from jaxflash.partitioning import is_local
from pallas_kernels import hopper, spec
from pallas_kernels.spec import quantization as rules

Forward = Callable[[spec.Problem, spec.Operands], tuple[jax.Array, jax.Array]]
_GRANULARITIES = ("block", "head", "tensor")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array [*B, T, N, H] in 8-bit floating point with float32 scales, as `quantize` makes it.

    Attributes:
      values: float8_e4m3fn ``[*B, T, N, H]``; of a value ``[*B, H, N, tokens]``, of whole blocks of
        128 tokens, in the order that tensor cores take.
      scales: float32 ``[*B, blocks, N]``: of each block of 128 tokens, or one block of all.
      tokens: T.
      is_value: whether it is laid out to be the value of attention.
      is_rotated: whether columns were rotated: then queries and keys both must be.
    """

    values: jax.Array
    scales: jax.Array
    tokens: int = dataclasses.field(metadata={"static": True})
    is_value: bool = dataclasses.field(default=False, metadata={"static": True})
    is_rotated: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """``[*B, T, N, H]``."""
        *batch, a, n, b = self.values.shape
        return (*batch, self.tokens, n, a if self.is_value else b)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def dtype(self) -> Any:
        """bfloat16: that of attention's output."""
        return jnp.dtype(jnp.bfloat16)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The array ``[*B, T, N, H]``; rotated, if it is."""
        values, scales = _flat(self.values), _flat(self.scales, 2)
        wide = rules.dequantize(values, scales, self.tokens, turned=self.is_value)
        return wide.reshape(self.shape).astype(dtype)


def quantize(
    x: Float[Array, "*B T N H"],
    *,
    per: Literal["block", "head", "tensor"] = "block",
    is_value: bool = False,
    rotate: bool = False,
) -> QuantizedArray:
    """Rounds an array to 8-bit floating point, e4m3, each part with a scale of its own.

    Args:
      x: queries, keys or values.
      per: what has a scale: each "block" of 128 tokens of a head, each "head" of a batch element,
        or the whole "tensor".
      is_value: lays the result out as the value of attention must be.
      rotate: multiplies queries, and keys, by an orthogonal matrix first, which spreads outliers
        over all columns (incoherent processing). Their products stay the same, so both must be.

    Returns:
      What `dot_product_attention` takes in place of an array; all three of its arrays must then be
      quantised. Not differentiable: to train, pass 16-bit arrays and ``precision="fp8"``. Padding
      must be finite: a NaN spreads over its block.

    Raises:
      ValueError, TypeError: the shape, the dtype or an option is wrong, or a value is rotated.

    Example:
      >>> import jax, jaxflash
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 64), "bfloat16")
      >>> q, k = (jaxflash.quantize(x, rotate=True) for x in (q, k))
      >>> jaxflash.dot_product_attention(q, k, jaxflash.quantize(v, is_value=True)).dtype
      dtype(bfloat16)

    Source: Shah et al., "FlashAttention-3" (2024), section 3.3.
    """
    x = checks.as_array("x", x)
    checks.floating("x", x)
    if x.ndim < 3:
        raise ValueError(f"x must have at least three axes [*B, T, N, H]; got shape {x.shape}")
    if per not in _GRANULARITIES:
        raise ValueError(f"per must be one of {_GRANULARITIES}; got {per!r}")
    is_value, rotate = checks.flag("is_value", is_value), checks.flag("rotate", rotate)
    if is_value and rotate:
        raise ValueError("values are not rotated: only products of queries and keys stay the same")
    by_kernel = per == "block" and is_local()
    values, scales = _quantize(_flat(x), per, is_value, rotate, by_kernel=by_kernel)
    batch = x.shape[:-3]
    values, scales = (y.reshape(*batch, *y.shape[1:]) for y in (values, scales))
    return QuantizedArray(values, scales, x.shape[-3], is_value, rotate)


def _quantize(
    x: jax.Array, per: str, turned: bool, rotate: bool, *, by_kernel: bool
) -> tuple[jax.Array, jax.Array]:
    """Of [B, T, N, H]; by the kernel if it may, and there is one."""
    if by_kernel and hopper.supports_quantize(x, target(), rotate=rotate):
        return _by_kernel(x, turned, rotate)
    return _by_xla(x, per, turned, rotate)


def _by_kernel(x: jax.Array, turned: bool, rotate: bool) -> tuple[jax.Array, jax.Array]:
    @jax.custom_batching.custom_vmap
    def call(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return hopper.quantize(x, turned=turned, rotate=rotate)

    @call.def_vmap
    def rule(size: int, _: Any, x: jax.Array) -> Any:
        found = call(x.reshape(-1, *x.shape[2:]))
        values, scales = (y.reshape(size, -1, *y.shape[1:]) for y in found)
        return (values, scales), (True, True)

    values, scales = call(x)
    return values, scales


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _by_xla(x: jax.Array, per: str, turned: bool, rotate: bool) -> tuple[jax.Array, jax.Array]:
    if rotate:
        matrix = jnp.asarray(rules.hadamard(x.shape[3]), jnp.float32)
        x = jnp.einsum("btnh,hi->btni", x.astype(jnp.float32), matrix, precision="highest")
    scales = rules.scales_of(x, per)
    return rules.quantize(x, scales, turned=turned), scales


def operands(query: Any, key: Any, value: Any) -> dict[str, Any]:
    """The three arrays, all quantised or none, and their scales, with one batch axis."""
    given = {"query": query, "key": key, "value": value}
    quantized = [name for name, x in given.items() if isinstance(x, QuantizedArray)]
    if not quantized:
        return {name: _flat(x) for name, x in given.items()}
    if len(quantized) < len(given):
        raise TypeError(
            f"query, key and value must be quantised all or none; got {quantized} quantised: "
            "see jaxflash.quantize"
        )
    if query.is_rotated != key.is_rotated:
        raise ValueError(
            f"query and key must be rotated both or none; got {query.is_rotated=}, "
            f"{key.is_rotated=}"
        )
    if query.is_value or key.is_value or not value.is_value:
        raise ValueError("quantise the value with is_value=True, query and key without")
    found = {name: _flat(x.values) for name, x in given.items()}
    return found | {f"{name}_scale": _flat(x.scales, 2) for name, x in given.items()}


def lowered(
    problem: spec.Problem, x: spec.Operands, *, by_kernel: bool
) -> tuple[spec.Problem, spec.Operands]:
    """A problem of 8-bit operands, if that precision is asked for. What lengths hide is zeroed.

    ``by_kernel`` is for arrays of one device.
    """
    if problem.precision != rules.FP8:
        return problem, x
    query, key, value = (
        _zeroed_beyond(y, lengths)
        for y, lengths in (
            (x.query, x.query_lengths),
            (x.key, x.key_value_lengths),
            (x.value, x.key_value_lengths),
        )
    )
    of_query, of_key, of_value = (
        _quantize(y, "block", turned, False, by_kernel=by_kernel)
        for y, turned in ((query, False), (key, False), (value, True))
    )
    x = x._replace(
        query=of_query[0],
        key=of_key[0],
        value=of_value[0],
        query_scale=of_query[1],
        key_scale=of_key[1],
        value_scale=of_value[1],
    )
    return dataclasses.replace(problem.of(x), precision=None), x


def emulating(forward: Forward) -> Forward:
    """``forward``, which multiplies no 8-bit numbers, of what they stand for.

    Derivatives are those at the rounded numbers, with respect to the numbers before.
    """

    def run(problem: spec.Problem, x: spec.Operands) -> tuple[jax.Array, jax.Array]:
        dtype = problem.dtype
        low, y = lowered(problem, x, by_kernel=False)
        if not y.is_quantized:
            return forward(problem, x)
        wide = [
            rules.dequantize(y.query, y.query_scale, problem.T),
            rules.dequantize(y.key, y.key_scale, problem.S),
            rules.dequantize(y.value, y.value_scale, problem.S, turned=True),
        ]
        if not x.is_quantized:
            given = (x.query, x.key, x.value)
            wide = [g + jax.lax.stop_gradient(w - g) for g, w in zip(given, wide, strict=True)]
        query, key, value = wide
        y = x._replace(query=query, key=key, value=value)
        y = y._replace(query_scale=None, key_scale=None, value_scale=None)
        out, lse = forward(low.of(y), y)
        return out.astype(dtype), lse

    return run


def _zeroed_beyond(x: jax.Array, lengths: Any) -> jax.Array:
    if lengths is None:
        return x
    exists = jnp.arange(x.shape[1]) < lengths[:, None]
    return jnp.where(exists[:, :, None, None], x, 0)


def _flat(x: Any, others: int = 3) -> Any:
    """Merges the batch axes, which lead so many others, into one."""
    batch = x.shape[:-others]
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-others:])
