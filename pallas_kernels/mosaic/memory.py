"""Shared memory, layouts, loads and stores that mean the same on every JAX version."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.mosaic import interpreter

# Its annotations and signatures differ between JAX versions: no type checker can agree with all.
plgpu: Any = mosaic_gpu

# A reference inside a kernel. JAX names its type differently in each version.
Ref = Any

_TILE_ROWS = 8  # the hardware's swizzle patterns repeat after eight rows
_SWIZZLES = (128, 64, 32)


def tiled_smem(
    shape: tuple[int, ...], dtype: jax.typing.DTypeLike, swizzle: int | None = None
) -> Any:
    """A shared-memory buffer in the tiled, swizzled form that TMA copies and wgmma share.

    Args:
      shape: The last two axes are tiled; leading ones (pipeline stages, warpgroups) are not.
      dtype: Element type.
      swizzle: Bytes of a swizzled row: 128, 64 or 32. The last axis must be a multiple of it.
        Default: the widest that is possible.
    """
    itemsize = jnp.dtype(dtype).itemsize
    if swizzle is None:
        swizzle = next((s for s in _SWIZZLES if shape[-1] * itemsize % s == 0), _SWIZZLES[-1])
    if swizzle not in _SWIZZLES:
        raise ValueError(f"swizzle must be one of {_SWIZZLES} bytes; got {swizzle}")
    columns = swizzle // jnp.dtype(dtype).itemsize
    if len(shape) < 2 or shape[-2] % _TILE_ROWS or shape[-1] % columns:
        raise ValueError(
            f"the last two axes must be multiples of {_TILE_ROWS} and {columns} for "
            f"{jnp.dtype(dtype)} and swizzle {swizzle}; got shape {shape}: pad it or use a "
            "smaller swizzle"
        )
    transforms = (plgpu.TilingTransform((_TILE_ROWS, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def swapped(ref: Ref, axes: tuple[int, ...]) -> Ref:
    """A reference with its axes in another order, for compiled kernels."""
    if hasattr(ref, "transpose"):
        return ref.transpose(axes)
    return plgpu.transpose_ref(ref, axes)  # JAX 0.10.2; deprecated in 0.12


def tiling_of(ref: Ref) -> tuple[tuple[int, ...], int]:
    """The tile and the bytes of a swizzled row of a `tiled_smem` buffer, or of a part of one."""
    (tiling,) = (t.tiling for t in ref.transforms if hasattr(t, "tiling"))
    (swizzle,) = (t.swizzle for t in ref.transforms if hasattr(t, "swizzle"))
    return tiling, swizzle


def ref_type(ref: Ref) -> Any:
    """How code inlined into a kernel takes such a buffer."""
    tiling, swizzle = tiling_of(ref)
    return plgpu.RefType((plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)))


def load(ref: Ref, *, layout: Any = None, optimized: bool = True) -> jax.Array:
    """Loads a reference to global or shared memory into registers.

    Args:
      ref: Select with ``ref.at[...]`` first.
      layout: Register layout, such as ``plgpu.Layout.WGMMA``. Default: the compiler's choice.
      optimized: False allows a slow access pattern, as row statistics need.
    """
    if interpreter.is_interpreting():
        return ref[...]  # 0.10.2's interpreter has no load; none has layouts
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def store(ref: Ref, value: jax.Array, *, optimized: bool = True) -> None:
    """Stores registers into a reference to global or shared memory.

    Args:
      ref: Select with ``ref.at[...]`` first.
      value: As many elements as `ref`.
      optimized: False allows a slow access pattern. JAX 0.12 demands it for global memory.
    """
    plgpu_store = getattr(plgpu, "store", None)  # since JAX 0.12; before, every pattern is allowed
    if plgpu_store is None or interpreter.is_interpreting():
        ref[...] = value
    else:
        plgpu_store(ref, value, optimized=optimized)


def layout_cast(value: jax.Array, layout: Any) -> jax.Array:
    """Gives constants and iotas, which have no layout of their own, the one asked for."""
    # 0.10.2's interpreter has no layout_cast; elsewhere it does nothing there.
    return value if interpreter.is_interpreting() else plgpu.layout_cast(value, layout)
