"""8-bit attention: arrays with scales, and what ``precision="fp8"`` means for every backend."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import spec
from pallas_kernels.spec import quantization as rules

Forward = Callable[[spec.Problem, spec.Operands], tuple[jax.Array, jax.Array]]
# Takes [B, T, N, H], what has a scale, whether to turn the result, and whether to rotate first;
# returns values and scales as `pallas_kernels.spec.quantization` has them.
Quantize = Callable[[jax.Array, str, bool, bool], tuple[jax.Array, jax.Array]]
GRANULARITIES = ("block", "head", "tensor")


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
        values, scales = (flat(x, self.shape[:-3]) for x in (self.values, self.scales))
        wide = rules.dequantize(values, scales, self.tokens, turned=self.is_value)
        return wide.reshape(self.shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def by_xla(x: jax.Array, per: str, turned: bool, rotate: bool) -> tuple[jax.Array, jax.Array]:
    if rotate:
        matrix = jnp.asarray(rules.hadamard(x.shape[3]), jnp.float32)
        x = jnp.einsum("btnh,hi->btni", x.astype(jnp.float32), matrix, precision="highest")
    scales = rules.scales_of(x, per)
    return rules.quantize(x, scales, turned=turned), scales


def check_together(query: Any, key: Any, value: Any) -> None:
    """All are quantised, or none."""
    given = {"query": query, "key": key, "value": value}
    quantized = [name for name, x in given.items() if isinstance(x, QuantizedArray)]
    if 0 < len(quantized) < len(given):
        raise TypeError(
            f"query, key and value must be quantised all or none; got {quantized} quantised: "
            "see jaxflash.quantize"
        )


def operands(query: Any, key: Any, value: Any) -> dict[str, Any]:
    """The three arrays, and their scales if they are quantised, with one batch axis."""
    given, batch = {"query": query, "key": key, "value": value}, query.shape[:-3]
    if not isinstance(query, QuantizedArray):
        return {name: flat(x, batch) for name, x in given.items()}
    if query.is_rotated != key.is_rotated:
        raise ValueError(
            f"query and key must be rotated both or none; got {query.is_rotated=}, "
            f"{key.is_rotated=}"
        )
    if query.is_value or key.is_value or not value.is_value:
        raise ValueError("quantise the value with is_value=True, query and key without")
    found = {name: flat(x.values, batch) for name, x in given.items()}
    return found | {f"{name}_scale": flat(x.scales, batch) for name, x in given.items()}


def lowered(
    problem: spec.Problem, x: spec.Operands, quantize: Quantize, *, leave_query: bool = False
) -> tuple[spec.Problem, spec.Operands]:
    """A problem of 8-bit operands, if that precision is asked for.

    What lengths or a static band hide is zeroed. The query may be left for the kernel to round.
    """
    if problem.precision != rules.FP8:
        return problem, x
    first, last = 0, problem.S
    if problem.static_band is not None and problem.T > 0:
        first, last = problem.static_band.any_keys(0, problem.T, problem.S)
    keys = first, spec.extent(x.key_value_lengths, last)
    tokens = {"key": keys, "value": keys}
    if not leave_query:
        tokens["query"] = 0, spec.extent(x.query_lengths, problem.T)
    found: dict[str, Any] = {}
    for name, (start, stop) in tokens.items():
        y = _zeroed_outside(getattr(x, name), start, stop)
        found[name], found[f"{name}_scale"] = quantize(y, "block", name == "value", False)
    x = x._replace(**found)
    return dataclasses.replace(problem.of(x), precision=None), x


def emulating(forward: Forward) -> Forward:
    """``forward``, which multiplies no 8-bit numbers, of what they stand for.

    Its derivatives are those at the numbers before they were rounded.
    """

    def of_rounded(problem: spec.Problem, x: spec.Operands) -> tuple[jax.Array, jax.Array]:
        low, y = lowered(problem, x, by_xla)
        wide = [
            rules.dequantize(y.query, y.query_scale, problem.T),
            rules.dequantize(y.key, y.key_scale, problem.S),
            rules.dequantize(y.value, y.value_scale, problem.S, turned=True),
        ]
        query, key, value = (w.astype(problem.compute_dtype) for w in wide)
        y = x._replace(query=query, key=key, value=value)
        y = y._replace(query_scale=None, key_scale=None, value_scale=None)
        out, lse = forward(low.of(y), y)
        return out.astype(problem.dtype), lse

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def straight_through(problem: spec.Problem, x: spec.Operands) -> tuple[jax.Array, jax.Array]:
        return of_rounded(problem, x)

    @straight_through.defjvp
    def _(problem: spec.Problem, primals: Any, tangents: Any) -> Any:
        exact = functools.partial(forward, dataclasses.replace(problem, precision=None))
        _, derivatives = jax.jvp(exact, primals, tangents)
        return straight_through(problem, *primals), derivatives

    def run(problem: spec.Problem, x: spec.Operands) -> tuple[jax.Array, jax.Array]:
        if x.is_quantized:
            return of_rounded(problem, x)
        return (straight_through if problem.precision == rules.FP8 else forward)(problem, x)

    return run


def _zeroed_outside(x: jax.Array, start: int, stop: Any) -> jax.Array:
    """[B, T, N, H], zero but for tokens of ``[start, stop)``; ``stop`` may be an array [B]."""
    if not isinstance(stop, jax.Array) and (start, stop) == (0, x.shape[1]):
        return x
    token = jnp.arange(x.shape[1])
    exists = (start <= token) & (token < jnp.reshape(stop, (-1, 1)))
    return jnp.where(exists[:, :, None, None], x, 0)


def flat(x: Any, batch: tuple[int, ...]) -> Any:
    """Merges the leading batch axes into one."""
    return x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[len(batch) :])
