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
from pallas_kernels.mosaic.dialects import arith, instruct, llvm, vector
from pallas_kernels.mosaic.memory import Ref, ref_type, store
from pallas_kernels.mosaic.rows import store_four
from pallas_kernels.mosaic.warps import lane_and_warp

_HEIGHT = 64
# How rows of a matrix are spread over threads: by warp, half and group of four lanes. Columns are:
# by registers that a thread writes at once, register, lane within the group, element of a register.
_ROWS = (4, 2, 8)
# In memory: warp, columns, then group and lane, then what one thread writes at once: of 32 bits two
# columns of both halves, which are registers that follow each other, or one integer of those that
# are added one by one; of 16 bits eight columns, of one half and then of the other.
_BY_VECTOR, _BY_ELEMENT, _OF_16_BITS = (
    (0, 3, 2, 5, 1, 4, 6),
    (0, 3, 4, 1, 6, 2, 5),
    (0, 1, 3, 2, 5, 4, 6),
)
_LANES, _AT_ONCE, _VECTOR_BYTES = 32, 4, 16
PART_WIDTH = 32  # columns, of `load_part`
_SPLAT = plgpu.Layout.WG_SPLAT
_ADD_FOUR = "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};"
_ADD_ROUNDED = "{ .reg .s32 t; cvt.rni.s32.f32 t, $1; red.relaxed.gpu.global.add.s32 [$0], t; }"
_STAGE_FOUR = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"
# Two integers as one of 64 bits, see `Sums`.
_PAIR = """
    cvt.rni.s32.f32 {0}, {2}; cvt.rni.s32.f32 {1}, {3};
    shr.s32 t, {0}, 31; add.s32 {1}, {1}, t;
"""
_ADD_PAIR = f"""{{
    .reg .s32 a, b, t; .reg .b64 both;
    {_PAIR.format("a", "b", "$1", "$2")}
    mov.b64 both, {{a, b}}; red.relaxed.gpu.global.add.u64 [$0], both;
}}"""
_STAGE_PAIRS = f"""{{
    .reg .s32 a, b, c, d, t;
    {_PAIR.format("a", "b", "$1", "$2")}
    {_PAIR.format("c", "d", "$3", "$4")}
    st.shared.v4.s32 [$0], {{a, b, c, d}};
}}"""


class Sums(NamedTuple):
    """An array of matrices [slabs, ..., 64, width] that a kernel adds to.

    Of float32, or of int32: what is added to those is rounded, and their sums do not depend on the
    order in which blocks add.

    Compiled, there is one slab. Interpreted, where blocks cannot add to the same place, each of
    those that would has one of its own. A matrix is held in the order in which threads have it, so
    that they add floats 16 bytes at a time, and a warp adds to what is contiguous.

    Integers that copies add are two in one of 64 bits, ``low + 2^32 high``: the GPU adds as many of
    these in the same time. What the sign of the low one takes from the high one is given back when
    they are read.
    """

    ref: Any  # [slabs, ..., 64 * width], one of the kernel's last operands
    is_staged: bool  # added to by `add_staged`, too

    @classmethod
    def zero(
        cls,
        slabs: int,
        shape: tuple[int, ...],
        width: int,
        dtype: Any = jnp.float32,
        *,
        is_staged: bool = False,
    ) -> Sums:
        """Nothing added yet to ``shape`` matrices; ``width`` is a multiple of 16."""
        slabs = slabs if interpreter.is_interpreting() else 1
        return cls(jax.new_ref(jnp.zeros((slabs, *shape, _HEIGHT * width), dtype)), is_staged)

    def total(self) -> jax.Array:
        """What has been added once the kernel has been called, [..., 64, width]."""
        found = jax.freeze(self.ref)
        if interpreter.is_interpreting():
            return matrices(jnp.sum(found, axis=0))
        total = found[0]
        if self.is_staged and total.dtype == jnp.int32:
            low, high = jnp.moveaxis(total.reshape(*total.shape[:-1], -1, 2), -1, 0)
            total = jnp.stack([low, high - (low >> 31)], axis=-1).reshape(total.shape)
        return matrices(total, is_staged=self.is_staged)

    @classmethod
    def exist(cls) -> bool:
        """JAX 0.10.2 passes no mutable arrays to kernels."""
        return jax.__version_info__ >= (0, 11)


def matrices(found: jax.Array, *, is_staged: bool = False) -> jax.Array:
    """[..., 64, width], of what has been summed up or `put` has stored, [..., 64 * width]."""
    leading = found.shape[:-1]
    if interpreter.is_interpreting():
        return found.reshape(*leading, _HEIGHT, -1)
    by_element = found.dtype == jnp.int32 and not is_staged
    registers, order = 1, _BY_ELEMENT if by_element else _BY_VECTOR
    if found.dtype.itemsize == 2:
        registers, order = _VECTOR_BYTES // 2 // 2, _OF_16_BITS
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
            at = mgpu_utils.getelementptr(base, [start * _LANES], i32)
            store_four(at, words[start : start + _AT_ONCE])

    run(place, value)


def add(sum_: Ref, value: jax.Array, *, is_staged: bool = False) -> None:
    """Adds a float32 matrix [64, width] to one of `Sums`, a reference [64 * width].

    ``is_staged``: to one that others add to by `add_staged`.
    """
    exact = sum_.dtype == jnp.int32
    if interpreter.is_interpreting():
        store(sum_, (jnp.round(value) if exact else value).astype(sum_.dtype).reshape(-1))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def run(_: Any, sum_: Any, value: Any) -> None:
        f32 = ir.F32Type.get()
        elements = _elements(value)
        rounded = (2, _ADD_PAIR) if is_staged else (1, _ADD_ROUNDED)
        at_once, instruction = rounded if exact else (_AT_ONCE, _ADD_FOUR)
        apart = _AT_ONCE if is_staged else at_once  # what a thread has of what follows each other
        base = _start(mgpu_utils.memref_ptr(sum_), _LANES * len(elements), apart)
        for start in range(0, len(elements), at_once):
            offset = start // apart * apart * _LANES + start % apart
            place = mgpu_utils.getelementptr(base, [offset], f32)
            these = elements[start : start + at_once]
            instruct([place, *these], instruction, "l" + ",f" * at_once)

    run(sum_, value)


def stage(value: jax.Array, staging: Ref, dtype: Any) -> None:
    """Writes a float32 matrix [64, width] to where `add_staged` takes it from; not interpreted.

    Args:
      value: Rounded, if it is to be added to integers.
      staging: Shared memory of as many bytes or more, whatever it is else used for.
      dtype: Of the sums.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, ref_type(staging)))
    def run(_: Any, value: Any, staging: Any) -> None:
        i32, elements = ir.IntegerType.get_signless(32), _elements(value)
        instruction = _STAGE_FOUR if dtype == jnp.float32 else _STAGE_PAIRS
        base = _start(mgpu_utils.memref_ptr(staging), _LANES * len(elements), _AT_ONCE)
        for start in range(0, len(elements), _AT_ONCE):
            place = llvm.ptrtoint(i32, mgpu_utils.getelementptr(base, [start * _LANES], i32))
            these = elements[start : start + _AT_ONCE]
            instruct([place, *these], instruction, "r" + ",f" * _AT_ONCE)

    run(value, staging)


def add_staged(sum_: Ref, staging: Ref) -> None:
    """Adds what this warpgroup has staged, and shown by ``commit_smem``, to one of `Sums` by copy.

    ``wait_smem_to_gmem`` waits for it, as for other copies. There is no jump in it: products that
    run meanwhile would be serialised.
    """
    add = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add."
    add += "f32" if sum_.dtype == jnp.float32 else "u64"

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ref_type(staging)))
    def run(_: Any, sum_: Any, staging: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        source = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(staging))
        size = mgpu_utils.c(4 * ir.MemRefType(sum_.type).shape[0], i32)
        instruct(
            [mgpu_utils.memref_ptr(sum_), source, size],
            f"""{{
                .reg .pred is_first;
                .reg .u32 thread;
                mov.u32 thread, %tid.x;
                and.b32 thread, thread, {4 * _LANES - 1};
                setp.eq.u32 is_first, thread, 0;
                @is_first {add} [$0], [$1], $2;
                @is_first cp.async.bulk.commit_group;
            }}""",
            "l,r,r,~{memory}",
        )

    run(sum_, staging)


def load_part(sum_: Ref, part: Any, *, is_staged: bool = False) -> jax.Array:
    """Some columns [64, 32] of a matrix that has been added up, as float32; not interpreted.

    All additions must be there for this warpgroup: see `wait_count`. ``is_staged``: as for `add`.
    """
    width, exact = sum_.shape[0] // _HEIGHT, sum_.dtype == jnp.int32
    at_once = 1 if exact and not is_staged else _AT_ONCE
    shape, elements = (_HEIGHT, PART_WIDTH), PART_WIDTH // 2
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SPLAT), return_type=result)
    def run(_: Any, sum_: Any, part: Any) -> Any:
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        first = arith.muli(part.registers.item(), mgpu_utils.c(elements * _LANES, i32))
        start = _start(mgpu_utils.memref_ptr(sum_), _HEIGHT // 4 * width, at_once)
        start = mgpu_utils.getelementptr(start, [first], f32)
        places = [
            mgpu_utils.getelementptr(start, [i * _LANES], f32) for i in range(0, elements, at_once)
        ]
        found = [x for place in places for x in _load(place, i32 if exact else f32, at_once)]
        if exact and is_staged:
            found[1::2] = map(_without_sign, found[1::2], found[::2])
        if exact:
            found = [arith.sitofp(f32, x) for x in found]
        registers = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
        pair = ir.VectorType.get((2,), f32)
        for i, at in enumerate(_by_column(registers)):
            registers[at] = vector.from_elements(pair, found[2 * i : 2 * i + 2])
        return fa.FragmentedArray(_registers=registers, _layout=fa.WGMMA_LAYOUT, _is_signed=None)

    return run(sum_, jnp.int32(part))


def _load(place: Any, element: Any, number: int) -> list[Any]:
    """One or four elements of 32 bits that follow each other, as others have added them up."""
    kind = "r" if isinstance(element, ir.IntegerType) else "f"
    if number == 1:
        instruction = "ld.relaxed.gpu.global.b32 $0, [$1];"
        return [_asked(element, place, instruction, f"={kind},l")]
    four = ir.Type.parse(f"!llvm.struct<({', '.join(_AT_ONCE * [str(element)])})>")
    instruction = "ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];"
    found = _asked(four, place, instruction, ",".join([*_AT_ONCE * [f"={kind}"], "l"]))
    return [llvm.extractvalue(element, found, [i]) for i in range(_AT_ONCE)]


def _without_sign(high: Any, low: Any) -> Any:
    """The second one of a pair of integers, see `Sums`."""
    sign = arith.shrsi(low, mgpu_utils.c(31, ir.IntegerType.get_signless(32)))
    return arith.subi(high, sign)


def _asked(kind: Any, place: Any, instruction: str, constraints: str) -> Any:
    return llvm.inline_asm(kind, [place], instruction, constraints, has_side_effects=True)


def _start(base: Any, words: int, at_once: int) -> Any:
    """Where a thread begins to write, of 32-bit words of which each warp has so many."""
    i32 = ir.IntegerType.get_signless(32)
    lane, warp = lane_and_warp()
    first = mgpu_utils.dyn_dot((warp, lane), (mgpu_utils.c(words, i32), mgpu_utils.c(at_once, i32)))
    return mgpu_utils.getelementptr(base, [first], i32)


def _words(register: Any) -> list[Any]:
    """A register's elements as 32-bit words."""
    i32 = ir.IntegerType.get_signless(32)
    vector_type = ir.VectorType(register.type)
    element: Any = vector_type.element_type
    count = vector_type.shape[0] * element.width // 32
    words = vector.bitcast(ir.VectorType.get((count,), i32), register)
    return [vector.extract(words, dynamic_position=[], static_position=[i]) for i in range(count)]


def _elements(value: Any) -> list[Any]:
    """A thread's elements, as far as the thread has them, in the order of `_registers`."""
    return [
        vector.extract(value.registers[at], dynamic_position=[], static_position=[i])
        for at in _registers(value)
        for i in range(2)
    ]


def _registers(value: Any) -> list[tuple[int, ...]]:
    """Where a thread's registers are: by column, then by half; of 16 bits the other way round."""
    is_short = mgpu_utils.bitwidth(value.mlir_dtype) == 16
    return (_placed if is_short else _by_column)(value.registers)


def _by_column(registers: np.ndarray) -> list[tuple[int, ...]]:
    by_half = _placed(registers)
    number = len(by_half) // 2
    return [at for pair in zip(by_half[:number], by_half[number:], strict=True) for at in pair]


def _placed(registers: np.ndarray) -> list[tuple[int, ...]]:
    """The same by half, then by column."""
    steps = [
        fa.WGMMA_LAYOUT.tiling.tile_strides(tuple(int(i == axis) for i in range(2)))
        for axis in range(2)
    ]
    placed = sorted(
        ((int(np.dot(at, steps[0])), int(np.dot(at, steps[1]))), at)
        for at in np.ndindex(registers.shape)
    )
    return [at for _, at in placed]
