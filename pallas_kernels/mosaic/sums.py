"""Matrices in global memory in the order in which threads have them: sums, and stored ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, llvm, scf, vector
from pallas_kernels.mosaic.memory import Ref, store

_HEIGHT = 64
# How rows of a matrix are spread over threads: by warp, half and group of four lanes. Columns are:
# by registers that a thread writes at once, register, lane within the group, element of a register.
_ROWS = (4, 2, 8)
# In memory: warp, half, registers, then group and lane, then what one thread writes at once: 16
# bytes, or one integer.
_BY_VECTOR, _BY_ELEMENT = (0, 1, 3, 2, 5, 4, 6), (0, 1, 3, 4, 6, 2, 5)
_LANES, _AT_ONCE, _VECTOR_BYTES = 32, 4, 16
# Of `round_part`: columns, if a part had all rows of a warp; vectors that a thread loads.
_PART_WIDTH, _PARTS_VECTORS = 32, 4
_SPLAT = plgpu.Layout.WG_SPLAT
_ADD_FOUR = "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};"
_LOAD_FOUR = "ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];"
_STORE_FOUR = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
_ADD_ROUNDED = "{ .reg .s32 t; cvt.rni.s32.f32 t, $1; red.relaxed.gpu.global.add.s32 [$0], t; }"


class Sums(NamedTuple):
    """An array of matrices [slabs, ..., 64, width] that a kernel adds to.

    Of float32, or of int32: what is added to those is rounded, and their sums do not depend on the
    order in which blocks add.

    Compiled, there is one slab. Interpreted, where blocks cannot add to the same place, each of
    those that would has one of its own. A matrix is held in the order in which threads have it, so
    that they add floats 16 bytes at a time, and a warp adds to what is contiguous.
    """

    ref: Any  # [slabs, ..., 64 * width], one of the kernel's last operands

    @classmethod
    def zero(cls, slabs: int, shape: tuple[int, ...], width: int, dtype: Any = jnp.float32) -> Sums:
        """Nothing added yet to ``shape`` matrices; ``width`` is a multiple of 16."""
        slabs = slabs if interpreter.is_interpreting() else 1
        return cls(jax.new_ref(jnp.zeros((slabs, *shape, _HEIGHT * width), dtype)))

    def total(self) -> jax.Array:
        """What has been added once the kernel has been called, [..., 64, width]."""
        found = jax.freeze(self.ref)
        if interpreter.is_interpreting():
            return matrices(jnp.sum(found, axis=0))
        return matrices(found[0])

    @classmethod
    def exist(cls) -> bool:
        """JAX 0.10.2 passes no mutable arrays to kernels."""
        return jax.__version_info__ >= (0, 11)


def matrices(found: jax.Array) -> jax.Array:
    """[..., 64, width], of what `add` has summed up or `put` has stored, [..., 64 * width]."""
    leading = found.shape[:-1]
    if interpreter.is_interpreting():
        return found.reshape(*leading, _HEIGHT, -1)
    exact = found.dtype == jnp.int32
    registers = 2 if exact else _VECTOR_BYTES // found.dtype.itemsize // 2
    order = _BY_ELEMENT if exact else _BY_VECTOR
    sizes = np.array((*_ROWS, -1, registers, 4, 2))
    back = [len(leading) + int(i) for i in np.argsort(order)]
    found = found.reshape(*leading, *sizes[list(order)])
    return found.transpose(*range(len(leading)), *back).reshape(*leading, _HEIGHT, -1)


def put(place: Ref, value: jax.Array) -> None:
    """Stores a matrix [64, width] of 16 or 32 bits to a reference [64 * width].

    ``width`` is a multiple of 16 for 32 bits, of 32 for 16.
    """
    if interpreter.is_interpreting():
        store(place, value.reshape(-1))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def run(_: Any, place: Any, value: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        words = [x for at in _registers(value) for x in _words(value.registers[at])]
        base = _start(mgpu_utils.memref_ptr(place), _LANES * len(words), _AT_ONCE)
        for start in range(0, len(words), _AT_ONCE):
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [
                    mgpu_utils.getelementptr(base, [start * _LANES], i32),
                    *words[start : start + _AT_ONCE],
                ],
                _STORE_FOUR,
                "l" + ",r" * _AT_ONCE,
                has_side_effects=True,
            )

    run(place, value)


def add(sum_: Ref, value: jax.Array) -> None:
    """Adds a float32 matrix [64, width] to one of `Sums`, a reference [64 * width]."""
    exact = sum_.dtype == jnp.int32
    if interpreter.is_interpreting():
        store(sum_, (jnp.round(value) if exact else value).astype(sum_.dtype).reshape(-1))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def run(_: Any, sum_: Any, value: Any) -> None:
        f32 = ir.F32Type.get()
        elements = _elements(value)
        at_once = 1 if exact else _AT_ONCE
        base = _start(mgpu_utils.memref_ptr(sum_), _LANES * len(elements), at_once)
        for start in range(0, len(elements), at_once):
            place = mgpu_utils.getelementptr(base, [start * _LANES], f32)
            llvm.inline_asm(
                ir.Type.parse("!llvm.void"),
                [place, *elements[start : start + at_once]],
                _ADD_ROUNDED if exact else _ADD_FOUR,
                ",".join("l" + "f" * at_once),
                has_side_effects=True,
            )

    run(sum_, value)


def parts_of_rounding(width: int) -> int:
    """In how many parts `round_part` takes a matrix [64, width]."""
    return width // _PART_WIDTH


def round_part(
    sum_: Ref,  # [64 * width] float32
    part: Any,
    out: Ref,  # [rows, columns], of 16 bits
    row: Any,
    column: Any,
    scale: float,
) -> None:
    """Stores a part of a matrix that has been added up, see `add`, times a number; not interpreted.

    The matrix begins at a row and a column of ``out``, which may end within it, after a multiple of
    8 columns. All additions must be there for this warpgroup: see `wait_count`.
    """
    rows, columns = out.shape
    width = sum_.shape[0] // _HEIGHT
    parts, across = parts_of_rounding(width), width // 16

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *3 * (_SPLAT,)))
    def run(_: Any, sum_: Any, out: Any, *numbers: Any) -> None:
        f32 = ir.F32Type.get()
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        part, row, column = (x.registers.item() for x in numbers)
        strides, _ = ir.MemRefType(out.type).get_strides_and_offset()
        element = ir.MemRefType(out.type).element_type

        def times(x: Any, factor: int) -> Any:
            return arith.muli(x, mgpu_utils.c(factor, i32))

        lane, warp = _lane_and_warp()
        lanes = mgpu_utils.c(4, i32)  # that have the same row
        for more in (times(warp, 16), times(part, 16 // parts), arith.divui(lane, lanes)):
            row = arith.addi(row, more)
        of_part = times(part, _PARTS_VECTORS * _AT_ONCE * _LANES)
        source = _start(mgpu_utils.memref_ptr(sum_), _HEIGHT // 4 * width, _AT_ONCE)
        source = mgpu_utils.getelementptr(source, [of_part], f32)
        first = arith.extui(i64, arith.addi(column, times(arith.remui(lane, lanes), 2)))
        of_row = arith.muli(arith.extui(i64, row), mgpu_utils.c(strides[0], i64))
        first = arith.addi(of_row, first)
        target = mgpu_utils.getelementptr(mgpu_utils.memref_ptr(out), [first], element)
        four = ir.Type.parse(f"!llvm.struct<({', '.join(_AT_ONCE * ['f32'])})>")
        loaded = [
            llvm.inline_asm(
                four,
                [mgpu_utils.getelementptr(source, [i * _AT_ONCE * _LANES], f32)],
                _LOAD_FOUR,
                "=f,=f,=f,=f,l",
                has_side_effects=True,
            )
            for i in range(_PARTS_VECTORS)
        ]
        factor = mgpu_utils.c(scale, f32)

        def store_pair(half: int, across_: int, pair: int) -> None:
            """Two neighbours of a row."""
            found = loaded[half * across + across_]
            both = [
                arith.mulf(llvm.extractvalue(f32, found, [2 * pair + j]), factor) for j in range(2)
            ]
            rounded = arith.truncf(
                ir.VectorType.get((2,), element),
                vector.from_elements(ir.VectorType.get((2,), f32), both),
            )
            below, right = 8 * half, 16 * across_ + 8 * pair
            place = mgpu_utils.getelementptr(target, [below * strides[0] + right], element)
            exists = arith.andi(_is_below(row, below, rows), _is_below(column, right, columns))
            with ir.InsertionPoint(scf.IfOp(exists).then_block):
                llvm.inline_asm(
                    ir.Type.parse("!llvm.void"),
                    [place, mgpu_utils.bitcast(rounded, i32)],
                    "st.global.b32 [$0], $1;",
                    "l,r",
                    has_side_effects=True,
                )
                scf.yield_([])

        for at in np.ndindex(2 // parts, across, 2):
            store_pair(*at)

    run(sum_, out, *map(jnp.int32, (part, row, column)))


def _is_below(index: Any, more: int, limit: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    index = arith.addi(index, mgpu_utils.c(more, i32))
    return arith.cmpi(arith.CmpIPredicate.slt, index, mgpu_utils.c(limit, i32))


def _start(base: Any, words: int, at_once: int) -> Any:
    """Where a thread begins to write, of 32-bit words of which each warp has so many."""
    i32 = ir.IntegerType.get_signless(32)
    lane, warp = _lane_and_warp()
    first = mgpu_utils.dyn_dot((warp, lane), (mgpu_utils.c(words, i32), mgpu_utils.c(at_once, i32)))
    return mgpu_utils.getelementptr(base, [first], i32)


def _lane_and_warp() -> tuple[Any, Any]:
    """Within the warpgroup."""
    i32 = ir.IntegerType.get_signless(32)
    thread = mgpu_utils.thread_idx()
    lane = arith.remui(thread, mgpu_utils.c(32, i32))
    return lane, arith.remui(arith.divui(thread, mgpu_utils.c(32, i32)), mgpu_utils.c(4, i32))


def _words(register: Any) -> list[Any]:
    """A register's elements as 32-bit words."""
    i32 = ir.IntegerType.get_signless(32)
    vector_type = ir.VectorType(register.type)
    element: Any = vector_type.element_type
    count = vector_type.shape[0] * element.width // 32
    words = vector.bitcast(ir.VectorType.get((count,), i32), register)
    return [vector.extract(words, dynamic_position=[], static_position=[i]) for i in range(count)]


def _elements(value: Any) -> list[Any]:
    """A thread's elements by half, then by column, as far as the thread has them."""
    return [
        vector.extract(value.registers[at], dynamic_position=[], static_position=[i])
        for at in _registers(value)
        for i in range(2)
    ]


def _registers(value: Any) -> list[tuple[int, ...]]:
    return _placed(value.registers)


def _placed(registers: np.ndarray) -> list[tuple[int, ...]]:
    """Where a thread's registers are, by half, then by column."""
    steps = [
        fa.WGMMA_LAYOUT.tiling.tile_strides(tuple(int(i == axis) for i in range(2)))
        for axis in range(2)
    ]
    placed = sorted(
        ((int(np.dot(at, steps[0])), int(np.dot(at, steps[1]))), at)
        for at in np.ndindex(registers.shape)
    )
    return [at for _, at in placed]
