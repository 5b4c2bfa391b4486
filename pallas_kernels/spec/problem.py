"""What is asked of a backend: the arrays of a call, and everything about it that is static."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

from pallas_kernels.spec.band import Band
from pallas_kernels.spec.quantization import FP8


class Device(NamedTuple):
    """What a program is compiled for."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as JAX names it, for example "NVIDIA H100 80GB HBM3"


def extent(lengths: Any, size: int) -> Any:
    """How many of ``size`` rows or keys there are: all, or as many as lengths say."""
    return size if lengths is None else jnp.clip(lengths, 0, size)


class Operands(NamedTuple):
    """The arrays of one call in canonical shape (batch flattened); absent ones are None.

    With scales, keys and values are 8-bit floating point, the value turned, [B, Hv, K, tokens of
    whole blocks]: see `pallas_kernels.spec.quantization`. So is the query, if it has scales, or it
    is to be rounded likewise. In pages they are 8-bit numbers: see `pallas_kernels.spec.narrow`.

    ``Problem.operands`` holds the same tuple with shapes and dtypes in place of arrays.
    """

    query: Any  # [B, T, N, H]
    key: Any  # [B, S, K, H]; in pages [P, page_size, K, H]
    value: Any  # [B, S, K, Hv]; in pages [P, page_size, K, Hv]
    bias: Any = None  # [B|1, N|1, T|1, S|1] floating
    mask: Any = None  # [B|1, N|1, T|1, S|1] bool
    query_lengths: Any = None  # [B] int32
    key_value_lengths: Any = None  # [B] int32
    query_offset: Any = None  # [B] int32; a static offset is Problem.query_offset
    query_segment_ids: Any = None  # [B, T] int32
    key_value_segment_ids: Any = None  # [B, S] int32
    alibi_slopes: Any = None  # [N] floating
    sinks: Any = None  # [N] floating
    dropout_seed: Any = None  # [2] uint32
    score_consts: tuple[Any, ...] = ()  # arrays captured by score_mod
    mask_consts: tuple[Any, ...] = ()  # arrays captured by mask_mod
    page_table: Any = None  # [B, M] int32: where pages of keys and values are; of native kernels
    query_scale: Any = None  # [B, blocks of T, N] float32
    key_scale: Any = None  # [B, blocks of S, K] float32; of pages [P, K]
    value_scale: Any = None  # likewise

    @property
    def is_quantized(self) -> bool:
        return self.key_scale is not None and self.page_table is None

    @property
    def rounds_query(self) -> bool:
        """Whether the query is quantised, too, as it is read."""
        return self.is_quantized and self.query_scale is None

    @property
    def has_narrow_pages(self) -> bool:
        return self.key_scale is not None and self.page_table is not None


# Axes of the operands that calls can be folded or divided along: b batch, n query heads, k key
# heads. In bias and mask they may have size 1. Those left out have none.
AXES = {
    "query": "b.n.", "key": "b.k.", "value": "b.k.", "bias": "bn..", "mask": "bn..",
    "query_lengths": "b", "key_value_lengths": "b", "query_offset": "b",
    "query_segment_ids": "b.", "key_value_segment_ids": "b.", "alibi_slopes": "n", "sinks": "n",
    "query_scale": "b.n", "key_scale": "b.k", "value_scale": "b.k", "page_table": "b.",
}  # fmt: skip


# In pages keys and values belong to no batch element.
AXES_OF_PAGES = AXES | {
    "key": "..k.", "value": "..k.", "key_scale": ".k", "value_scale": ".k",
}  # fmt: skip


def gradients(operands: Operands, found: Operands) -> Operands:
    """Gradients in the dtypes of the operands; None for those that have none."""

    def each(found: tuple[Any, ...], consts: tuple[Any, ...]) -> tuple[Any, ...]:
        return found or (None,) * len(consts)

    found = found._replace(
        score_consts=each(found.score_consts, operands.score_consts),
        mask_consts=each((), operands.mask_consts),
    )
    return jax.tree.map(
        lambda g, x: None if g is None else g.astype(x.dtype),
        found,
        operands,
        is_leaf=lambda g: g is None,
    )


@dataclasses.dataclass(frozen=True)
class ElementFunction:
    """A user's elementwise function, traced on scalars, its captured arrays made arguments.

    Two of them are equal when they are the same program, so that eager calls with equal functions
    share what was compiled. Neither the user's function nor a captured value is kept.
    """

    structure: Any  # compares equal for equal programs only
    program: Any = dataclasses.field(compare=False)  # ClosedJaxpr of captures and scalars
    captures: int = dataclasses.field(compare=False)  # how many of its inputs

    @classmethod
    def trace(
        cls, function: Callable[..., Any], argument_types: tuple[Any, ...]
    ) -> tuple["ElementFunction", tuple[Any, ...]]:
        """Traces ``function`` on scalars; returns it with the arrays it captures."""

        def fresh(*scalars: Any) -> Any:
            """JAX caches traces by function, and what the user's captures may have changed."""
            return function(*scalars)

        scalars = [jax.ShapeDtypeStruct((), t) for t in argument_types]
        closed = jax.make_jaxpr(fresh)(*scalars)

        def opened(consts: Any, *scalars: Any) -> Any:
            return jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(closed.jaxpr, consts))(*scalars)

        consts = tuple(closed.consts)
        types = tuple(jax.ShapeDtypeStruct(jnp.shape(c), jnp.result_type(c)) for c in consts)
        program = jax.make_jaxpr(opened)(types, *scalars)
        return cls(
            str(program) if _is_told_by_its_text(program) else object(), program, len(consts)
        ), consts

    @property
    def result(self) -> Any:
        """Abstract values of what the function returns, one for each leaf."""
        return self.program.out_avals

    @functools.cached_property
    def with_slope(self) -> Any:
        """The program that also returns the derivative by the first scalar."""
        scalar = jex_core.jaxpr_as_fun(self.program)

        def both(*args: Any) -> Any:
            consts, (x, *rest) = args[: self.captures], args[self.captures :]
            return jax.jvp(lambda x: scalar(*consts, x, *rest)[0], (x,), (jnp.ones_like(x),))

        return jax.make_jaxpr(both)(*self.program.in_avals)

    def __call__(self, consts: tuple[Any, ...], *args: Any) -> Any:
        """Applies the function elementwise to broadcastable arrays.

        Axes of size one are not spread before they must be: a table indexed by the head alone is
        read once a head. Captured arrays may have a wider dtype than those that were traced: their
        elements are then narrowed once they are read, so that derivatives are summed in the wider.
        """
        return jnp.vectorize(lambda *a: _narrowing_late(self.program, *consts, *a)[0])(*args)


_INDEXING = ("dynamic_slice", "gather", "slice", "squeeze")


def _narrowing_late(program: Any, *args: Any) -> list[Any]:
    """Applies a program; what is wider than it should be is narrowed after it has been indexed."""
    jaxpr = program.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *args), strict=True))

    def narrow(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom].astype(atom.aval.dtype)

    for equation in jaxpr.eqns:
        inputs = [narrow(atom) for atom in equation.invars]
        if equation.primitive.name in _INDEXING:
            inputs[0] = values[equation.invars[0]]
        parameters = equation.primitive.get_bind_params(equation.params)
        found = equation.primitive.bind(*inputs, **parameters)
        found = found if equation.primitive.multiple_results else [found]
        values.update(zip(equation.outvars, found, strict=True))
    return [narrow(atom) for atom in jaxpr.outvars]


def _is_told_by_its_text(program: Any) -> bool:
    """Whether printing a program shows all of it: no functions, no constants within."""
    if len(getattr(program, "consts", ())) > 0:
        return False
    for equation in program.eqns:
        if any(hasattr(x, "val") and np.ndim(x.val) > 0 for x in equation.invars):
            return False
        for x in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(x, "eqns"):
                if not _is_told_by_its_text(x):
                    return False
            elif callable(x) and not isinstance(x, type):
                return False
    return True


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static description of a call: hashable, and all that ``supports`` needs to decide.

    Logits are ``s = scale * q.k + bias``, then the soft cap, then ALiBi, then ``score_mod``.
    ``band`` speaks of positions: row ``r`` stands at ``r + query_offset``.
    """

    operands: Operands  # of jax.ShapeDtypeStruct
    band: Band
    scale: float
    device: Device
    query_offset: int = 0
    soft_cap: float | None = None
    score_mod: ElementFunction | None = None
    mask_mod: ElementFunction | None = None
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False  # one mask for all batch elements and heads
    precision: Any = None
    deterministic: bool = False
    constant: frozenset[str] = frozenset()  # operands whose gradients nobody asks for
    # So many consecutive rows stand at one position: heads of a group that are worked on as one.
    # ALiBi's slopes are then [N, rows in whole tiles].
    rows_per_position: int = 1
    # Whether query_offset counts from each sequence's number of keys; of native kernels.
    from_last_key: bool = False

    def of(self, operands: Operands) -> "Problem":
        """The same problem of other arrays."""
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
        return dataclasses.replace(self, operands=structs)

    @property
    def is_in_8_bits(self) -> bool:
        """Whether the forward multiplies 8-bit floating point."""
        return self.operands.is_quantized or self.precision == FP8

    @property
    def asks_for_numbers(self) -> bool:
        """Whether a function or dropout depends on which batch element and head it is for."""
        return bool(self.score_mod or self.mask_mod or self.dropout_rate > 0)

    @property
    def B(self) -> int:
        return self.operands.query.shape[0]

    @property
    def T(self) -> int:
        return self.operands.query.shape[1]

    @property
    def S(self) -> int:
        table = self.operands.page_table
        return self.operands.key.shape[1] * (1 if table is None else table.shape[1])

    @property
    def N(self) -> int:
        return self.operands.query.shape[2]

    @property
    def K(self) -> int:
        return self.operands.key.shape[2]

    @property
    def G(self) -> int:
        return self.N // self.K

    @property
    def H(self) -> int:
        return self.operands.query.shape[3]

    @property
    def Hv(self) -> int:
        return self.operands.value.shape[1 if self.operands.is_quantized else 3]

    @property
    def dtype(self) -> np.dtype:
        """Of the output: that of the query, bfloat16 if elements have 8 bits."""
        given = np.dtype(self.operands.query.dtype)
        return given if given.itemsize > 1 else np.dtype(jnp.bfloat16)

    @property
    def compute_dtype(self) -> np.dtype:
        """Of logits, softmax statistics and accumulators: float32, float64 for float64 inputs."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def static_band(self) -> Band | None:
        """The band over rows and keys, as far as it is known before the arrays are."""
        if self.operands.query_offset is None and not self.from_last_key:
            return self.band.shift(self.query_offset)
        return self.band if self.band.is_unbounded else None

    def differentiates(self, name: str) -> bool:
        """Whether the gradient of an operand is asked for."""
        leaves = jax.tree.leaves(getattr(self.operands, name))
        floating = any(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
        return floating and name not in self.constant

    @property
    def masks_by_data(self) -> bool:
        """Whether visibility depends on the values of arrays, not on the band alone."""
        x = self.operands
        arrays = (x.mask, x.query_lengths, x.key_value_lengths, x.query_segment_ids)
        by_arrays = any(a is not None for a in arrays)
        return by_arrays or self.mask_mod is not None or self.static_band is None
