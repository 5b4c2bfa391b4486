"""MLIR dialects as Mosaic GPU's generated code has them: no type checker can follow those."""

from __future__ import annotations

from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import nvvm as _nvvm
from jaxlib.mlir.dialects import scf as _scf
from jaxlib.mlir.dialects import vector as _vector

arith: Any = _arith
llvm: Any = _llvm
nvvm: Any = _nvvm
scf: Any = _scf
vector: Any = _vector


def instruct(operands: list[Any], instructions: str, constraints: str) -> None:
    """PTX that returns nothing, for what it does; ``constraints`` are LLVM's, of each operand."""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), operands, instructions, constraints, has_side_effects=True
    )
