"""Values in registers, in the layout that matrix products give and take."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import llvm
from pallas_kernels.mosaic.memory import Ref, layout_cast, load

_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def full(shape: tuple[int, ...], value: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A matrix, or a vector with an entry for each row of one."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else _ROWS
    return layout_cast(jnp.full(shape, value, dtype), layout)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """The int32 index of each element of a matrix along an axis."""
    return layout_cast(lax.broadcasted_iota(jnp.int32, shape, axis), plgpu.Layout.WGMMA)


def row_iota(rows: int) -> jax.Array:
    """The int32 index of each row of a matrix, a vector."""
    return layout_cast(lax.iota(jnp.int32, rows), _ROWS)


def uniform(x: Any) -> Any:
    """An int32 scalar that was read from memory, in a form that tells the compiler it is uniform.

    What follows from it then needs no register in every thread.
    """
    return _through("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", x)


def opaque(x: Any) -> Any:
    """An int32 scalar of which the compiler knows nothing.

    What depends on it is computed where it is used, not before a loop to be held in registers.
    """
    return _through("mov.b32 $0, $1;", jnp.int32(x))


def _through(instruction: str, x: Any) -> Any:
    """The result of one instruction on a scalar."""
    if interpreter.is_interpreting():
        return jnp.int32(x)
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(splat,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, splat))
    def run(_: Any, x: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        operands = [x.registers.item()]
        value = llvm.inline_asm(i32, operands, instruction, "=r,r", has_side_effects=True)
        return fa.FragmentedArray.splat(value, (), fa.WGSplatFragLayout(()), is_signed=True)

    return run(x)


def load_matrix(ref: Ref) -> jax.Array:
    """Loads [rows, columns]."""
    return load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def load_rows(ref: Ref) -> jax.Array:
    """Loads an entry for each row of a matrix."""
    return load(ref, layout=_ROWS, optimized=False)


def load_columns(ref: Ref) -> jax.Array:
    """Loads an entry for each column of a matrix."""
    return load(ref, layout=_COLUMNS, optimized=False)


def spread_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The matrix whose every column is `x`."""
    return lax.broadcast_in_dim(x, shape, [0])


def spread_columns(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The matrix whose every row is `x`."""
    return lax.broadcast_in_dim(x, shape, [1])
