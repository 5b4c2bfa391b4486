"""Elements of global memory, one for each index in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir

from pallas_kernels.mosaic import interpreter
from pallas_kernels.mosaic.dialects import arith, llvm
from pallas_kernels.mosaic.memory import Ref


def gather(
    ref: Ref,  # [size], in global memory
    index: jax.Array,  # int32, [] or [rows, columns], all within the array
) -> jax.Array:
    """``ref[index]``: a load for each element."""
    if np.ndim(index) == 0:
        return ref[index]
    if interpreter.is_interpreting():
        return ref[...][index]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA),
        return_type=plgpu.ShapeDtypeStruct(index.shape, ref.dtype, plgpu.Layout.WGMMA),
    )
    def load(_: Any, ref: Any, index: Any) -> Any:
        base = mgpu_utils.memref_ptr(ref)
        element = ir.MemRefType(ref.type).element_type
        registers = np.empty_like(index.registers)
        for at, indices in np.ndenumerate(index.registers):
            registers[at] = _load_each(base, element, indices)
        signed = index.is_signed if isinstance(element, ir.IntegerType) else None
        return fa.FragmentedArray(_registers=registers, _layout=index.layout, _is_signed=signed)

    return load(ref, index)


def _load_each(base: Any, element: Any, indices: Any) -> Any:
    """A vector of the elements that a vector of indices names."""
    (length,) = ir.VectorType(indices.type).shape
    i32 = ir.IntegerType.get_signless(32)
    out = llvm.mlir_undef(ir.VectorType.get((length,), element))
    for i in range(length):
        at = arith.constant(i32, ir.IntegerAttr.get(i32, i))
        number = llvm.extractelement(indices, at)
        place = llvm.getelementptr(
            base.type, base, [number], [-(2**31)], element, llvm.GEPNoWrapFlags.none
        )
        out = llvm.insertelement(out, llvm.load(element, place), at)
    return out
