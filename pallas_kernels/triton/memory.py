"""The only place that meets Pallas-Triton's API: launches, loads and stores of tiles.

Triton's matrices have sizes that are powers of two. Where an array ends within one, what is beyond
its end is neither read nor written: it loads as zero.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton

from pallas_kernels import spec

# A reference inside a kernel. JAX names its type differently in each version.
Ref = Any

_LEAST = 16  # of what a matrix product takes
_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Lets the kernels run on a CPU, interpreted: slow, and for tests."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def is_interpreting() -> bool:
    return _interpreting.get()


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    device: spec.Device,
    *,
    num_warps: int,
    num_stages: int,
    name: str,
    zeroed: Sequence[int] = (),
) -> list[jax.Array]:
    """Runs a kernel of references to whole arrays; outputs named in ``zeroed`` begin as zeros."""
    # Inside shard_map, outputs vary over the mesh axes that inputs vary over.
    types = [jax.typeof(x).manual_axis_type for x in inputs]
    varies = max(types, key=lambda t: len(t.varying))
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varies) for x in outputs]
    zeros = [jnp.zeros(outputs[i].shape, outputs[i].dtype) for i in zeroed]
    if varies.varying:
        zeros = [lax.pcast(x, tuple(sorted(varies.varying)), to="varying") for x in zeros]
    aliases = {len(inputs) + n: i for n, i in enumerate(zeroed)}

    def body(*refs: Ref) -> None:
        kernel(*refs[: len(inputs)], *refs[len(inputs) + len(zeros) :])

    return pl.pallas_call(
        body,
        out_shape=outputs,
        grid=grid,
        input_output_aliases=aliases,
        interpret=device.platform == "cpu",
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        name=name,
    )(*inputs, *zeros)


class Run(NamedTuple):
    """Consecutive indices along an axis, some of which may be beyond the array's end."""

    start: Any
    size: int
    limit: Any | None  # None: all exist

    @classmethod
    def of(cls, start: Any, size: int, length: int) -> "Run":
        """Of whole tiles of an axis."""
        return cls(start, size, None if length % size == 0 else length)

    @classmethod
    def columns(cls, count: int) -> "Run":
        """All columns of a head."""
        return cls.of(0, padded(count), count)

    @property
    def indices(self) -> jax.Array:
        return self.start + jnp.arange(self.size, dtype=jnp.int32)

    @property
    def exists(self) -> Any | None:
        return None if self.limit is None else self.indices < self.limit


def padded(count: int) -> int:
    """The size of a matrix that holds so many rows or columns."""
    return max(_LEAST, 1 << (count - 1).bit_length())


def load_vector(ref: Ref, at: tuple[Any, ...], run: Run, other: float = 0) -> jax.Array:
    """The elements of a run along the last axis."""
    return load_where(ref, (*at, run.indices), run, other=other)


def load_rows(
    ref: Ref,
    at: Callable[[Any], tuple[Any, ...]],
    rows: Run,
    columns: Run,
    wanted: jax.Array | None = None,
) -> jax.Array:
    """A matrix [rows, columns]; ``at`` makes all but the last index of row indices [rows, 1].

    Rows that are not wanted, [rows] bool, are zero whatever is there. A choice after the load would
    not do: Triton cannot lay out the condition as an operand of a product.
    """
    place = (*at(rows.indices[:, None]), columns.indices[None, :])
    mask = _both(rows, columns)
    if wanted is not None:
        wanted = jnp.broadcast_to(wanted[:, None], (rows.size, columns.size))
        mask = wanted if mask is None else wanted & mask
    fill = None if mask is None else jnp.array(0, ref.dtype)
    return triton.load(ref.at[place], mask=mask, other=fill)


def store_rows(
    ref: Ref, at: Callable[[Any], tuple[Any, ...]], rows: Run, columns: Run, x: jax.Array
) -> None:
    """Stores a matrix likewise."""
    place = (*at(rows.indices[:, None]), columns.indices[None, :])
    triton.store(ref.at[place], x.astype(ref.dtype), mask=_both(rows, columns))


def store_vector(ref: Ref, at: tuple[Any, ...], run: Run, x: jax.Array) -> None:
    triton.store(ref.at[(*at, run.indices)], x.astype(ref.dtype), mask=run.exists)


def add_rows(
    ref: Ref,
    at: Callable[[Any], tuple[Any, ...]],
    rows: Run,
    columns: Run,
    x: jax.Array,
    device: spec.Device,
) -> None:
    """Adds a matrix to what others add to, in no fixed order."""
    if device.platform == "cpu":  # one program after the other; the interpreter has no atomics
        store_rows(ref, at, rows, columns, load_rows(ref, at, rows, columns) + x)
        return
    place = (*at(rows.indices[:, None]), columns.indices[None, :])
    triton.atomic_add(ref, place, x.astype(ref.dtype), mask=_both(rows, columns))


def load_where(
    ref: Ref, at: tuple[Any, ...], run: Run, wanted: jax.Array | None = None, other: float = 0
) -> jax.Array:
    """An element for each index of a run; ``other`` where it does not exist, or is not wanted."""
    masks = [mask for mask in (run.exists, wanted) if mask is not None]
    mask = functools.reduce(jnp.logical_and, masks) if masks else None
    fill = None if mask is None else jnp.array(other, ref.dtype)
    return triton.load(ref.at[at], mask=mask, other=fill)


def load_pages(table: Ref, batch: Any, keys: Run, page_size: int) -> jax.Array:
    """The page of each key of a run, [B, M] being the table; 0 where there is no key."""
    return load_where(table, (batch, lax.div(keys.indices, page_size)), keys)


def read(ref: Ref, index: Any) -> Any:
    """Elements of a flat array, one for each index."""
    return triton.load(ref.at[index])


def _both(rows: Run, columns: Run) -> Any | None:
    down, across = rows.exists, columns.exists
    if down is None:
        return None if across is None else jnp.broadcast_to(across[None], (rows.size, columns.size))
    if across is None:
        return jnp.broadcast_to(down[:, None], (rows.size, columns.size))
    return down[:, None] & across[None]


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
