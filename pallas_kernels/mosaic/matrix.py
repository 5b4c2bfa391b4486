"""Matrices in shared memory, copied from and to arrays of any number of rows and columns.

TMA copies a box of an array: what lies beyond the array's end reads as zero and is not written. A
row of it in shared memory has 128, 64 or 32 bytes, swizzled. So a matrix is held in strips of so
many bytes, 64, 32 or 16 columns of 16 bits, one after the other. A product takes a strip as tiles
of eight rows: the same bytes, for which Mosaic has another type. A buffer is allocated as the union
of both.

If a product's right operand were tiles in row-major order, as Mosaic has them by itself, the array
would have to consist of whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.memory import Ref, swapped, tiled_smem
from pallas_kernels.mosaic.values import opaque

# Its annotations and signatures differ between JAX versions: no type checker can agree with all.
plgpu: Any = mosaic_gpu

_WIDTHS = (128, 64, 32)  # of strips, in bytes
_RANK = 2
_ALIGNMENT = 16  # TMA wants rows of arrays at multiples of so many bytes
_HALF = 2  # bytes of an element, unless it is said


class Piece(NamedTuple):
    """Strips of one width."""

    strips: int
    rows: int
    width: int

    @property
    def columns(self) -> int:
        return self.strips * self.width

    def smem(self, stack: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
        """What to allocate for a stack of them."""
        shape = (*stack, *self)
        tiled = tiled_smem(shape, dtype)
        if interpreter.is_interpreting():
            return tiled
        transforms = [plgpu.SwizzleTransform(self.width * jnp.dtype(dtype).itemsize)]
        if not _copies_any_columns():
            transforms.insert(0, plgpu.TilingTransform((self.width,)))
        return plgpu.RefUnion(plgpu.SMEM(shape, dtype, transforms=tuple(transforms)), tiled)


class View(NamedTuple):
    """A piece, or a stack of them, in a kernel."""

    copied: Ref  # [..., strips, rows, width], for copies
    tiled: Ref  # the same, for products, loads and stores

    def at(self, *index: Any) -> View:
        return View(self.copied.at[index], self.tiled.at[index])


class Form(NamedTuple):
    """How a matrix is held; the last strip may have columns to spare."""

    pieces: tuple[Piece, ...]
    array_columns: int  # of the array that it is copied from or to
    itemsize: int = _HALF

    @classmethod
    def of(cls, rows: int, columns: int, *, dividing: int = 0, itemsize: int = _HALF) -> Form:
        """In strips as wide as can be, of widths that divide a number; all divide 0."""
        found, rest, widths = [], columns, _widths(itemsize)
        for width in (w for w in widths if dividing % w == 0):
            found += [Piece(rest // width, rows, width)] if rest >= width else []
            rest %= width
        found += [Piece(1, rows, widths[-1])] if rest else []
        return cls(tuple(found), columns, itemsize)

    @classmethod
    def in_one_piece(cls, rows: int, columns: int, part: int) -> Form:
        """In strips of the same width, if they come out even, for products with ``part`` rows.

        A product with such a right operand gives all columns at once, which is faster.
        """
        # A product takes as many columns of its left operand at a time: they divide the rows.
        widest, *_, narrowest = _widths(_HALF)
        if columns % narrowest:
            return cls.of(rows, columns, dividing=part)
        width = math.gcd(columns, part, widest)
        return cls((Piece(columns // width, rows, width),), columns)

    @classmethod
    def in_strips(cls, rows: int, columns: int, width: int, count: int) -> Form:
        """In so many strips of one width; they may reach beyond the array's columns.

        Without ``columns`` it is some of them that are copied, one strip after the other.
        """
        return cls((Piece(count, rows, width),), columns)

    @property
    def columns(self) -> int:
        return sum(piece.columns for piece in self.pieces)

    @property
    def strips(self) -> int:
        return sum(piece.strips for piece in self.pieces)

    @property
    def copies(self) -> int:
        """How many it takes to copy a matrix."""
        return 1 if self._at_once else self.strips

    def copies_in(self, parts: int) -> int:
        """How many it takes if it is copied in so many parts, each of some rows."""
        return self.copies if parts == 1 else parts * self.strips

    @property
    def _at_once(self) -> bool:
        even = len(self.pieces) == 1 and self.columns == self.array_columns
        return even and not interpreter.is_interpreting()

    def array(self, x: jax.Array) -> jax.Array:
        """An array [..., columns] as copies take it."""
        if self._at_once:
            return x.reshape(*x.shape[:-1], self.strips, self.pieces[0].width)
        missing = copied_columns(self.array_columns, self.itemsize) - self.array_columns
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x

    def smem(self, *stack: int, dtype: jax.typing.DTypeLike) -> list[Any]:
        """What to allocate for a stack of matrices."""
        return [piece.smem(stack, dtype) for piece in self.pieces]


def smem_of_two(
    first: Form, second: Form, *stack: int, dtypes: tuple[jax.typing.DTypeLike, ...]
) -> Any:
    """What to allocate for matrices that become others where they are, no larger ones.

    Both are in one piece. `Matrix.two` finds them.
    """
    (one,), (other,) = first.pieces, second.pieces
    allocated = one.smem(stack, dtypes[0])
    if interpreter.is_interpreting():
        return [allocated, tiled_smem((*stack, *other), dtypes[1])]
    times = first.itemsize // second.itemsize
    return plgpu.RefUnion(*allocated.refs, tiled_smem((*stack, times, *other), dtypes[1]))


class Matrix(NamedTuple):
    """A matrix in shared memory, or a stack of them."""

    views: tuple[View, ...]

    @classmethod
    def of(cls, allocated: Sequence[Any]) -> Matrix:
        """From what `Form.smem` allocates."""
        one = interpreter.is_interpreting()
        return cls(tuple(View(x, x) if one else View(*x) for x in allocated))

    @classmethod
    def two(cls, allocated: Sequence[Any]) -> tuple[Matrix, Matrix]:
        """From what `smem_of_two` allocates for a stack of two axes."""
        *first, second = allocated
        if interpreter.is_interpreting():
            return cls.of(first), cls.of([second])
        second = second.at[:, :, 0]
        return cls((View(*first),)), cls((View(second, second),))

    def at(self, *index: Any) -> Matrix:
        """One of the stack."""
        return Matrix(tuple(view.at(*index) for view in self.views))

    def rows(self, rows: Any) -> Matrix:
        """Some rows of one matrix, for products: a slice by multiples of 8."""
        return Matrix(tuple(View(v.copied, v.tiled.at[:, rows]) for v in self.views))

    def share(self, number: Any, shares: int) -> Matrix:
        """One of so many shares of the strips of one matrix, which is in one piece."""
        (view,) = self.views
        count = view.tiled.shape[0] // shares
        return Matrix((view.at(pl.ds(number * count, count)),))

    def strips(self) -> Iterator[tuple[View, int, int]]:
        """Each strip of one matrix, its first column and its width."""
        start = 0
        for view in self.views:
            count, _, width = view.tiled.shape
            for i in range(count):
                yield view.at(i), start, width
                start += width


def copied_columns(columns: int, itemsize: int = _HALF) -> int:
    """How many columns an array must have to be copied, at least ``columns``."""
    if columns in _widths(itemsize):
        return columns
    step = (_ALIGNMENT if _copies_any_columns() else _WIDTHS[0]) // itemsize
    return -(-columns // step) * step


def _widths(itemsize: int) -> tuple[int, ...]:
    """Of strips, in elements."""
    return tuple(width // itemsize for width in _WIDTHS)


def _copies_any_columns() -> bool:
    """JAX 0.10.2 knows no view that is swizzled and not tiled, and tiles of whole widths only."""
    return jax.__version_info__ >= (0, 11)


def copy_in(
    gmem: Ref,  # [rows, columns], of what `Form.array` returns
    target: Matrix,
    barrier: Ref,  # expects ``Form.copies`` arrivals
) -> None:
    """Starts copies from global to shared memory; from beyond the array's end they bring zeros."""
    if len(gmem.shape) > _RANK:  # [rows, strips, width]
        (view,) = target.views
        plgpu.copy_gmem_to_smem(gmem, swapped(view.copied, (1, 0, 2)), barrier)
        return
    for strip, start, width in target.strips():
        source = gmem.at[:, _columns(gmem, start, width)]
        plgpu.copy_gmem_to_smem(source, strip.copied, barrier)


def copy_rows_in(
    gmem: Ref,  # [rows, columns], of what `Form.array` returns
    target: Matrix,
    rows: Any,  # of the target: a slice by multiples of 8
    barrier: Ref,  # expects an arrival for each strip
) -> None:
    """Starts copies to some rows of a matrix."""
    for i, (strip, start, width) in enumerate(target.strips()):
        at_once = len(gmem.shape) > _RANK
        source = gmem.at[:, i] if at_once else gmem.at[:, _columns(gmem, start, width)]
        plgpu.copy_gmem_to_smem(source, strip.copied.at[rows], barrier)


def copy_out(strip: View, gmem: Ref, column: int) -> None:
    """Starts the copy of a strip to an array [rows, columns], up to its end."""
    width = strip.tiled.shape[-1]
    plgpu.copy_smem_to_gmem(strip.copied, gmem.at[:, _columns(gmem, column, width)])


def _columns(gmem: Ref, start: int, width: int) -> Any:
    # An index that is not known is not refused for reaching beyond the end.
    known = start + width <= gmem.shape[-1]
    return pl.ds(start if known else opaque(start), width)
