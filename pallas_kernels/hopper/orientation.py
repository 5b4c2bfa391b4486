"""How a consumer holds its tiles: rows of queries as rows of matrices, or as columns.

A product has 64 rows and 8 to 256 columns. So many queries are rows: S = Q K^T and O += P V, a row
lies within a warp, and P is a left operand in registers. A few are columns: S^T = K Q^T and
O^T += V^T P^T, of which no more is computed than there is; a row is spread over all warps, P goes
through shared memory, and K and V are the left operands, which may be widened on their way to
registers.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic
from pallas_kernels.hopper.config import P_BUFFERS, ROWS

if TYPE_CHECKING:
    from pallas_kernels.hopper.kernel import Forward

Numbers = tuple[Any, ...]  # one for each part of a tile's keys


class Orientation(abc.ABC):
    """What differs between the two."""

    keys_axis: int  # of a matrix of scores

    @property
    def by_row(self) -> bool:
        """Whether a row of queries is a row of the matrix."""
        return self.keys_axis == 1

    def __init__(self, k: Forward) -> None:
        self.k = k

    @classmethod
    def of(cls, k: Forward) -> Orientation:
        return (Columns if k.config.turned else Rows)(k)

    def matrix(self, rows: int, others: int) -> tuple[int, int]:
        """The shape of a matrix that has rows of queries, and keys or columns of values."""
        return (rows, others) if self.by_row else (others, rows)

    def vector(self, value: float) -> jax.Array:
        """An entry for each row of queries."""
        rows = self.k.config.rows
        return mosaic.full((rows,), value, jnp.float32, by_row=self.by_row)

    def index(self) -> jax.Array:
        """Of each row of queries."""
        return mosaic.vector_iota(self.k.config.rows, by_row=self.by_row)

    def spread(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The matrix that has an entry of a vector in each row of queries."""
        return (mosaic.spread_rows if self.by_row else mosaic.spread_columns)(x, shape)

    def over(self, numbers: Numbers, shape: tuple[int, ...]) -> Any:
        """The numbers as a matrix of scores; the number itself if it is one."""
        if len(numbers) == 1:
            return numbers[0]
        return mosaic.spread_parts(numbers, shape, self.keys_axis)

    def row_max(self, s: jax.Array, units: Numbers, shifts: Numbers | None) -> jax.Array:
        """The largest of each row, given in multiples of what each part has, greater than 0.

        What parts are shifted by is added.
        """
        parts = len(units if shifts is None else shifts)
        if parts == 1:  # fewer to multiply
            largest = jnp.max(s, axis=self.keys_axis) * units[0]
            return largest if shifts is None else largest + shifts[0]
        s = self.folded(s, parts, jnp.maximum)
        s = s * self.over(units, s.shape)
        s = s if shifts is None else s + self.over(shifts, s.shape)
        return jnp.max(s, axis=self.keys_axis)

    @abc.abstractmethod
    def folded(self, s: jax.Array, parts: int, combine: Any) -> jax.Array:
        """Scores of which a thread combines what it has of each part."""

    @abc.abstractmethod
    def no_sums(self) -> jax.Array:
        """For each row of queries, as `sums` has them."""

    @abc.abstractmethod
    def sums(self, p: jax.Array, weights: Numbers) -> jax.Array:
        """Of rows, weighted: in a form that may be added up before they are a vector."""

    @abc.abstractmethod
    def decayed_sums(self, sums: jax.Array, decay: jax.Array) -> jax.Array:
        """Multiplied with a vector."""

    @abc.abstractmethod
    def totals(self, sums: jax.Array) -> jax.Array:
        """The vector."""

    def no_outputs(self) -> tuple[jax.Array, ...]:
        """Sums of nothing yet, in as many pieces as O has."""
        rows = self.k.config.rows
        shapes = [self.matrix(rows, columns) for columns in self.k.output_columns()]
        return tuple(mosaic.full(shape, 0, jnp.float32) for shape in shapes)

    @abc.abstractmethod
    def start_scores(self, q: mosaic.Matrix, k: mosaic.Matrix) -> jax.Array:
        """Starts S = Q K^T."""

    @abc.abstractmethod
    def given(self, p: jax.Array, step: Any) -> Any:
        """Probabilities of a visit, as `start_outputs` takes them."""

    @abc.abstractmethod
    def start_outputs(
        self, p: Any, step: Any, v: mosaic.Matrix, o: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """Starts O += P V of a visit, or of a part of it, with what `given` returned."""

    def values(self, v: mosaic.Matrix, part: int) -> mosaic.Matrix:
        """Those of a part of a visit's keys, see `Config.parts`."""
        assert self.k.config.parts == 1
        return v

    @abc.abstractmethod
    def output_part(self, piece: jax.Array, start: int, width: int) -> jax.Array:
        """Some columns of a piece of O."""

    @abc.abstractmethod
    def store(self, places: list[mosaic.Ref], parts: Iterable[jax.Array]) -> None:
        """Such parts to shared memory, each [rows, width]."""


class Rows(Orientation):
    """S = Q K^T, [rows, block_kv]; O, [rows, Hv]."""

    keys_axis = 1

    def folded(self, s: jax.Array, parts: int, combine: Any) -> jax.Array:
        return mosaic.fold_parts(s, parts, combine)

    def no_sums(self) -> jax.Array:
        return mosaic.full((self.k.config.rows, mosaic.FOLDED), 0, jnp.float32)

    def sums(self, p: jax.Array, weights: Numbers) -> jax.Array:
        # A thread adds up what it has of a row until the tile is done: it asks no other.
        p = self.folded(p, len(weights), jnp.add)
        return self.folded(p * self.over(weights, p.shape), 1, jnp.add)

    def decayed_sums(self, sums: jax.Array, decay: jax.Array) -> jax.Array:
        return sums * self.spread(decay, sums.shape)

    def totals(self, sums: jax.Array) -> jax.Array:
        return jnp.sum(sums, axis=1)

    def start_scores(self, q: mosaic.Matrix, k: mosaic.Matrix) -> jax.Array:
        return mosaic.start(q, k, transpose_b=True)

    def given(self, p: jax.Array, step: Any) -> Any:
        operands = self.k.problem.operands
        if not operands.is_quantized:
            return p.astype(operands.query.dtype)
        return mosaic.as_left_operand(p.astype(operands.value.dtype))

    def start_outputs(
        self, p: Any, step: Any, v: mosaic.Matrix, o: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        return mosaic.start_columns(p, v, o, transpose=self.k.problem.operands.is_quantized)

    def values(self, v: mosaic.Matrix, part: int) -> mosaic.Matrix:
        c = self.k.config
        if c.parts == 1:
            return v
        if self.k.problem.operands.is_quantized:
            return v.share(part, c.parts)
        return v.rows(pl.ds(part * c.part, c.part))

    def output_part(self, piece: jax.Array, start: int, width: int) -> jax.Array:
        return piece[:, start : start + width]

    def store(self, places: list[mosaic.Ref], parts: Iterable[jax.Array]) -> None:
        for place, part in zip(places, parts, strict=True):
            mosaic.store(place, part)


class Columns(Orientation):
    """S^T = K Q^T, [block_kv, rows]; O^T, [Hv, rows]."""

    keys_axis = 0

    def folded(self, s: jax.Array, parts: int, combine: Any) -> jax.Array:
        return s

    def no_sums(self) -> jax.Array:
        return mosaic.full((ROWS, self.k.config.rows), 0, jnp.float32)

    def sums(self, p: jax.Array, weights: Numbers) -> jax.Array:
        p = p * self.over(weights, p.shape)
        return functools.reduce(jnp.add, (p[i : i + ROWS] for i in range(0, len(p), ROWS)))

    def decayed_sums(self, sums: jax.Array, decay: jax.Array) -> jax.Array:
        return sums * self.spread(decay, sums.shape)

    def totals(self, sums: jax.Array) -> jax.Array:
        return jnp.sum(sums, axis=0)

    def start_scores(self, q: mosaic.Matrix, k: mosaic.Matrix) -> jax.Array:
        return mosaic.start(mosaic.widened_rows(k) if self.k.widens else k, q, transpose_b=True)

    def given(self, p: jax.Array, step: Any) -> Any:
        place = self._p_smem(step)
        mosaic.store_turned(place, p.astype(place.dtype))
        mosaic.commit_smem()
        return None

    def start_outputs(
        self, p: Any, step: Any, v: mosaic.Matrix, o: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        p = self._p_smem(step)
        if self.k.widens:
            return (mosaic.start(mosaic.widened_columns(v), p, *o, transpose_b=True),)
        return mosaic.start_turned(v, p, o)

    def _p_smem(self, step: Any) -> mosaic.Ref:
        return self.k.refs.p_smem.at[lax.rem(step, P_BUFFERS)]

    def output_part(self, piece: jax.Array, start: int, width: int) -> jax.Array:
        return piece[start : start + width]

    def store(self, places: list[mosaic.Ref], parts: Iterable[jax.Array]) -> None:
        if self.k.widens:
            mosaic.store_from_widened_columns(places, list(parts))
            return
        for place, part in zip(places, parts, strict=True):
            mosaic.store_turned(place, part)
