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
# Measured at batch 1 with 8 to 32 heads and 512 to 2048 tokens (bench/LOG.md, few tiles).
_FEW_ROUNDS = 2
_OF_ANY_TILE = 0.6


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a choice depends on."""

    mask: str  # "modified", "data", "band" or "full"
    head_dim: int  # the larger of H and Hv
    length: int  # of the keys; of a window, such that causal rows see as many

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
        length = problem.band.causal_keys(problem.S)
        return cls(mask, max(problem.H, problem.Hv), length)


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
        return _no_taller(hopper.Config.default(problem), problem.T)
    rows = [r for r in rows if r["head_dim"] == min(head_dims)]
    row = min(rows, key=lambda r: abs(math.log(r["length"] / max(kind.length, 1))))
    config = hopper.Config(**row["config"])
    if not config.divides_pages(problem):  # tables are measured without pages
        config = hopper.Config.default(problem)
    if kind.mask in ("full", "band"):
        config = _for_few_tiles(problem, kind, config)
    return _no_taller(config, problem.T)


def _for_few_tiles(problem: spec.Problem, kind: Kind, config: hopper.Config) -> hopper.Config:
    """The same, or one with fewer consumers that leaves less of the GPU without work.

    Tables are measured with many tiles of queries. A few are done in one or two rounds, the
    longest of which takes a time that grows with its rows.
    """
    blocks = hopper.multiprocessors(problem.device)

    def tiles(consumers: int) -> int:
        rows = config.rows * consumers
        return problem.B * problem.N * -(-problem.T // rows)

    if tiles(config.consumers) > _FEW_ROUNDS * blocks:
        return config
    share = _share(problem)

    def cost(consumers: int) -> float:
        """Rounds of the longest tile, by what one takes, in multiples of what 64 rows add to it."""
        rounds = share * tiles(consumers) / blocks
        rounds = math.ceil(rounds) if share == 1 else max(1.0, rounds)
        return rounds * (consumers + _OF_ANY_TILE)

    few = min((config.consumers, 2, 1), key=cost)
    if few == config.consumers:
        return config
    found = dataclasses.replace(hopper.Config.default(problem), consumers=few, ping_pong=few > 1)
    if kind.head_dim <= 64 or (few == 1 and kind.head_dim <= 128):
        return dataclasses.replace(found, overlaps=False, parts=2 * few)
    return found


def _no_taller(config: hopper.Config, T: int) -> hopper.Config:
    """The same without consumers that would have no rows in any tile."""
    consumers = min(config.consumers, -(-T // config.rows))
    return dataclasses.replace(
        config, consumers=consumers, ping_pong=config.ping_pong and consumers > 1
    )


def _share(problem: spec.Problem) -> float:
    """How many keys a row sees on average, of as many as one does at the most."""
    assert problem.static_band is not None, "no mask from data"
    keys = problem.static_band.counts(problem.T, problem.S)
    return float(keys.mean() / max(keys.max(), 1))


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
