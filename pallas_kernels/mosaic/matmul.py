"""Matrix products of tiles: wgmma when compiled, ``jnp.dot`` when interpreted.

Left operands are tiles in shared memory or values in registers, right operands tiles in shared
memory. Accumulators are float32. Three forms, from simple to fast:

* `matmul`, `matmul_add`: synchronous; other work can run in the product's shadow.
* `update_accumulators` with `issue`: products run while the body goes on; the final values come
  back when all have finished.
* `fresh_accumulators` with `issue` and `peek`: as above, and values can be read one by one while
  later products still run. `assign` replaces a value; `fori_loop` lets an accumulator live across
  the steps of a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.memory import Ref, transposed

Result = TypeVar("Result")


class _Cell:
    """Stands in for an accumulator register when interpreting."""

    def __init__(self, value: jax.Array) -> None:
        self.value = value


def matmul(
    a: Ref | jax.Array,  # [M, K], or [K, M] with transpose_a
    b: Ref,  # [K, N], or [N, K] with transpose_b
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> jax.Array:
    """``a @ b`` in float32. `meanwhile` is traced between the product's start and its end."""

    def body(acc: Ref) -> jax.Array:
        issue(acc, a, b, transpose_a=transpose_a, transpose_b=transpose_b)
        if meanwhile is not None:
            meanwhile()
        return peek(acc)

    return fresh_accumulators(body, (_rows(a, transpose_a), _columns(b, transpose_b)))


def matmul_add(
    acc: jax.Array,  # [M, N] float32
    a: Ref | jax.Array,
    b: Ref,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> jax.Array:
    """``acc + a @ b``; operands as in `matmul`."""

    def body(acc_ref: Ref) -> None:
        issue(acc_ref, a, b, transpose_a=transpose_a, transpose_b=transpose_b)
        if meanwhile is not None:
            meanwhile()

    return update_accumulators(body, acc)[0]


def fresh_accumulators(body: Callable[..., Result], *shapes: tuple[int, int]) -> Result:
    """Calls `body` with one zeroed accumulator a shape; returns what it returns."""
    if interpreter.is_interpreting():
        return body(*[_Cell(jnp.zeros(shape, jnp.float32)) for shape in shapes])
    return pl.run_scoped(body, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])


def update_accumulators(body: Callable[..., None], *values: jax.Array) -> Sequence[jax.Array]:
    """Calls `body` with accumulators that hold `values`; returns their final values."""
    if interpreter.is_interpreting():
        cells = [_Cell(value) for value in values]
        body(*cells)
        return [cell.value for cell in cells]
    run = pl.run_state(lambda refs: body(*refs))
    return run(tuple(plgpu.ACC.init(value) for value in values))


def issue(
    acc: Any,
    a: Ref | jax.Array,
    b: Ref,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> None:
    """Starts ``acc += a @ b`` and does not wait for it; operands as in `matmul`."""
    if interpreter.is_interpreting():
        acc.value = acc.value + _emulated(a, b, transpose_a, transpose_b)
    else:
        plgpu.wgmma(acc, transposed(a) if transpose_a else a, transposed(b) if transpose_b else b)


def peek(acc: Any, *, in_flight: int = 0) -> jax.Array:
    """The accumulator's value, once at most `in_flight` of the latest products still run."""
    if interpreter.is_interpreting():
        return acc.value
    return plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)


def assign(acc: Any, value: jax.Array) -> None:
    """Replaces the accumulator's value; no product may be running."""
    if interpreter.is_interpreting():
        acc.value = value
    else:
        acc[...] = value


def fori_loop(
    start: Any, stop: Any, body: Callable[[Any, Any], Any], carry: Any, *accumulators: Any
) -> Any:
    """``lax.fori_loop`` whose body may use `accumulators` that were made outside of it."""
    if not interpreter.is_interpreting():
        return lax.fori_loop(start, stop, body, carry)
    state = lax.fori_loop(
        start,
        stop,
        lambda i, state: _with_values(accumulators, state, lambda carry: body(i, carry)),
        ([a.value for a in accumulators], carry),
    )
    return _with_values(accumulators, state, lambda carry: carry)[1]


def while_loop(
    condition: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any, *accumulators: Any
) -> Any:
    """``lax.while_loop`` likewise; the condition sees the carry alone."""
    if not interpreter.is_interpreting():
        return lax.while_loop(condition, body, carry)
    state = lax.while_loop(
        lambda state: condition(state[1]),
        lambda state: _with_values(accumulators, state, body),
        ([a.value for a in accumulators], carry),
    )
    return _with_values(accumulators, state, lambda carry: carry)[1]


def _with_values(accumulators: Sequence[Any], state: Any, body: Callable[[Any], Any]) -> Any:
    """Gives interpreted accumulators their values, runs the body, and takes the values back."""
    for acc, value in zip(accumulators, state[0], strict=True):
        acc.value = value
    carry = body(state[1])
    return [acc.value for acc in accumulators], carry


def _emulated(a: Any, b: Any, transpose_a: bool, transpose_b: bool) -> jax.Array:
    a, b = a[...], b[...]
    if transpose_a:
        a = a.T
    if transpose_b:
        b = b.T
    product = jnp.dot(a, b, preferred_element_type=jnp.float32)
    # wgmma reads through the same proxy as TMA writes, these loads do not: without the fence the
    # detector would take the next copy into the tile for a race.
    plgpu.commit_smem()
    return product


def _rows(a: Any, transpose: bool) -> int:
    return a.shape[1] if transpose else a.shape[0]


def _columns(b: Any, transpose: bool) -> int:
    return b.shape[0] if transpose else b.shape[1]
