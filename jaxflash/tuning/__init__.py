"""Configurations of kernels that were measured to be the fastest, by kind of GPU and of problem.

The tables beside this file are made by ``python -m bench tune`` and looked up while a call is
traced; nothing is tuned at run time.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import hopper, spec
from pallas_kernels.hopper.config import modifies

TABLES = Path(__file__).parent
_DEFAULT = "h100"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a choice depends on."""

    mask: str  # "modified", "data", "band" or "full"
    head_dim: int  # the larger of H and Hv
    length: int  # of the keys

    @classmethod
    def of(cls, problem: spec.Problem) -> "Kind":
        """The kind of a problem; the first that applies."""
        by_mask = {
            "modified": modifies(problem) or problem.dropout_rate > 0,
            "data": problem.masks_by_data,
            "band": not problem.band.is_unbounded,
            "full": True,
        }
        mask = next(name for name, applies in by_mask.items() if applies)
        return cls(mask, max(problem.H, problem.Hv), problem.S)


def hopper_forward(problem: spec.Problem, operands: spec.Operands) -> tuple[jax.Array, jax.Array]:
    """`hopper.forward` with the configuration of the table."""
    return hopper.forward(problem, operands, hopper_config(problem))


def hopper_config(problem: spec.Problem) -> hopper.Config:
    """The one measured for the next larger head dim, and for the nearest length by ratio."""
    kind = Kind.of(problem)
    rows = [r for r in table(_gpu(problem.device)) if r["mask"] == kind.mask]
    head_dims = [r["head_dim"] for r in rows if r["head_dim"] >= kind.head_dim]
    # Measured where both head dims are the same: one that is much smaller leaves room for more.
    if not head_dims or problem.Hv <= 128 < problem.H or problem.operands.is_quantized:
        return hopper.Config.default(problem)
    rows = [r for r in rows if r["head_dim"] == min(head_dims)]
    row = min(rows, key=lambda r: abs(math.log(r["length"] / max(kind.length, 1))))
    return hopper.Config(**row["config"])


def _gpu(device: spec.Device) -> str:
    """The table of a device: its own, or that of the GPU that most were measured on."""
    names = sorted(path.stem for path in TABLES.glob("*.json"))
    return next((name for name in names if name in device.kind.lower()), _DEFAULT)


@functools.cache
def table(gpu: str) -> list[dict[str, Any]]:
    """The rows of a GPU's table."""
    text = (TABLES / f"{gpu}.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows
