"""Row maxima that grow seldom: what follows is done only where a row has grown by much.

A warp decides by itself, for the sixteen rows of a matrix that it has.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, llvm, scf, vector

_ROWS, _MATRIX, _SPLAT = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT
_ROWS_OF_WARP = 16
_HALVES = 2  # a thread has two rows of each 64
_OF_ROW = 4, 2  # threads that share eight columns of a row, and what each has
_CHAINS = 2  # of instructions that wait for each other
_LOWEST = float(np.finfo(np.float32).min)


def excess(s: jax.Array, units: Sequence[Any], limit: jax.Array) -> jax.Array:
    """By how much rows exceed a limit, if a thread can tell from what it has of them.

    It compares numbers as integers, three at a time (VIMNMX3), and asks no other thread. Of numbers
    that all are negative that finds the least, which is right only for limits that are not.

    Args:
      s: Float32 [64, columns].
      units: Numbers greater than 0, in multiples of which equal parts of the columns are given.
      limit: An entry for each row.

    Returns:
      For `grown`: in each thread what it found, NaN for negative limits.
    """
    if interpreter.is_interpreting():
        numbers = lax.bitcast_convert_type(s, jnp.int32).reshape(len(s), len(units), -1, *_OF_ROW)
        largest = lax.bitcast_convert_type(jnp.max(numbers, axis=(2, 4)), jnp.float32)
        found = jnp.max(largest * jnp.stack(units)[:, None], axis=(1, 2))
        return jnp.where(limit >= 0, found - limit, math.nan)
    result = plgpu.ShapeDtypeStruct(limit.shape, jnp.float32, _ROWS)
    types = (_MATRIX, _ROWS, *(_SPLAT for _ in units))

    @plgpu.inline_mgpu(arg_types=types, return_type=result)
    def run(_: Any, s: Any, limit: Any, *units: Any) -> Any:
        f32 = ir.F32Type.get()
        zero, nan = mgpu_utils.c(0.0, f32), mgpu_utils.c(math.nan, f32)
        numbers = s.registers.reshape(len(units), -1, _HALVES)
        found = []
        for row, register in enumerate(limit.registers.flat):
            largest = [
                arith.mulf(_largest(numbers[part, :, row]), unit.registers.item())
                for part, unit in enumerate(units)
            ]
            most = _scalar(register)
            is_sure = arith.cmpf(arith.CmpFPredicate.OGE, most, zero)
            most = arith.select(is_sure, most, nan)
            over = arith.subf(functools.reduce(arith.maximumf, largest), most)
            found.append(vector.broadcast(register.type, over))
        return _like(limit, found)

    return run(s, limit, *map(jnp.float32, units))


def grown(
    over: jax.Array,
    s: jax.Array,
    units: Sequence[Any],
    m: jax.Array,
    relative: Sequence[jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Row maxima to base 2, and matrices relative to them, where a row of a warp exceeds a limit.

    Elsewhere they stay as they are, by no instruction.

    Args:
      over: What `excess` returned of ``s`` and ``units``.
      s: See there.
      units: See there.
      m: The maxima so far; -inf where there were none.
      relative: Float32 matrices [64, columns].

    Returns:
      The larger of ``m`` and the maxima of ``s``, and what is relative to that.
    """
    if interpreter.is_interpreting():
        some = _any_of_each_warp(~(over <= 0))
        parts = jnp.split(s, len(units), axis=1)
        found = (jnp.max(x, axis=1) * unit for x, unit in zip(parts, units, strict=True))
        larger = jnp.where(some, functools.reduce(jnp.maximum, found, m), m)
        decay = jnp.where(some, jnp.exp2(m - jnp.maximum(larger, _LOWEST)), 1.0)
        return larger, tuple(x * decay[:, None] for x in relative)
    shapes = [(m.shape, _ROWS), *((x.shape, _MATRIX) for x in relative)]
    results = tuple(plgpu.ShapeDtypeStruct(shape, jnp.float32, at) for shape, at in shapes)
    types = (_ROWS, _MATRIX, *(at for _, at in shapes), *(_SPLAT for _ in units))

    @plgpu.inline_mgpu(arg_types=types, return_type=results)
    def run(_: Any, over: Any, s: Any, *rest: Any) -> Any:
        (m, *relative), units = rest[: len(shapes)], rest[len(shapes) :]
        zero = mgpu_utils.c(0.0, ir.F32Type.get())
        exceed = [
            arith.cmpf(arith.CmpFPredicate.UGT, _scalar(x), zero) for x in over.registers.flat
        ]

        def changed() -> list[Any]:
            width = s.shape[1] // len(units)
            larger = m
            for part, unit in enumerate(units):
                found = s[:, part * width : (part + 1) * width].reduce("max", 1)
                larger = larger.max(found * _filled(found, unit.registers.item()))
            lowest = _filled(m, mgpu_utils.c(_LOWEST, ir.F32Type.get()))
            decay = (m - larger.max(lowest)).exp2(approx=True)
            return [larger, *_scaled(relative, decay)]

        return _where_some(exceed, [m, *relative], changed)

    larger, *scaled = run(over, s, m, *relative, *map(jnp.float32, units))
    return larger, tuple(scaled)


def scaled_rows(pieces: Sequence[jax.Array], factor: jax.Array) -> tuple[jax.Array, ...]:
    """Matrices, float32, whose rows are multiplied: by no instruction where a warp's are all 1."""
    if interpreter.is_interpreting():
        return tuple(x * factor[:, None] for x in pieces)
    results = tuple(plgpu.ShapeDtypeStruct(x.shape, jnp.float32, _MATRIX) for x in pieces)

    @plgpu.inline_mgpu(arg_types=(_ROWS, *(_MATRIX for _ in pieces)), return_type=results)
    def run(_: Any, factor: Any, *pieces: Any) -> Any:
        one = mgpu_utils.c(1.0, ir.F32Type.get())
        changes = [
            arith.cmpf(arith.CmpFPredicate.UNE, _scalar(x), one) for x in factor.registers.flat
        ]
        return _where_some(changes, list(pieces), lambda: _scaled(pieces, factor))

    return run(factor, *pieces)


def _any_of_each_warp(flags: jax.Array) -> jax.Array:
    """In the interpreter: whether a row of the same warp has a flag."""
    some = jnp.any(flags.reshape(-1, _ROWS_OF_WARP), axis=1)
    return jnp.repeat(some, _ROWS_OF_WARP)


def _largest(registers: np.ndarray) -> Any:
    """The largest of a thread's float32 numbers; a negative one if there is no other."""
    i32 = ir.IntegerType.get_signless(32)
    numbers = [
        arith.bitcast(i32, vector.extract(x, dynamic_position=[], static_position=[i]))
        for x in registers
        for i in range(ir.VectorType(x.type).shape[0])
    ]
    chains = (functools.reduce(arith.maxsi, numbers[i::_CHAINS]) for i in range(_CHAINS))
    return arith.bitcast(ir.F32Type.get(), functools.reduce(arith.maxsi, chains))


def _scaled(pieces: Sequence[Any], factor: Any) -> list[Any]:
    return [x * factor.broadcast_in_dim(x.shape, (0,), x.layout) for x in pieces]


def _filled(like: Any, value: Any) -> Any:
    return fa.FragmentedArray.splat(value, like.shape, like.layout)


def _where_some(flags: Sequence[Any], arrays: list[Any], changed: Any) -> tuple[Any, ...]:
    """What ``changed()`` returns, where some thread of this warp has a flag; else the arrays."""
    before = [x for array in arrays for x in array.registers.flat]
    branch = scf.IfOp(_any_of_warp(flags), [x.type for x in before], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([x for array in changed() for x in array.registers.flat])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(before)
    after = iter(branch.results)
    return tuple(_like(x, itertools.islice(after, x.registers.size)) for x in arrays)


def _like(x: Any, registers: Any) -> Any:
    """An array in the layout of another, float32."""
    found = np.empty(x.registers.size, dtype=object)
    for i, register in enumerate(registers):
        found[i] = register
    found = found.reshape(x.registers.shape)
    return fa.FragmentedArray(_registers=found, _layout=x.layout, _is_signed=None)


def _scalar(register: Any) -> Any:
    """Of a register with one entry."""
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, dynamic_position=[], static_position=[0])


def _any_of_warp(flags: Sequence[Any]) -> Any:
    """Whether some thread of this warp has a flag that is set."""
    i32 = ir.IntegerType.get_signless(32)
    vote = (
        "{ .reg .pred p; setp.ne.s32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff;"
        " selp.s32 $0, 1, 0, p; }"
    )
    some = arith.extui(i32, functools.reduce(arith.ori, flags))
    found = llvm.inline_asm(i32, [some], vote, "=r,r", has_side_effects=True)
    return arith.cmpi(arith.CmpIPredicate.ne, found, mgpu_utils.c(0, i32))
