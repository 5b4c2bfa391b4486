"""How kernels are cut into tiles, by GPU and head dim."""

import dataclasses
import re
from typing import Literal, TypeVar

from pallas_kernels import spec
from pallas_kernels.triton.memory import padded

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of tiles, and what Triton is told."""

    block_q: int = 64
    block_kv: int = 64
    num_warps: int = 4
    num_stages: int = 2
    # 2: a program for each tile of queries. 1: one for all of a head, as FlashAttention-1 has it.
    schedule: Literal[1, 2] = 2

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two, at least 16; got {size}")


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Of the backward's kernels, each of which keeps its own tile while others pass by."""

    of_keys: Config
    of_rows: Config


# By head dim, then by shared memory of a block in KiB, largest first. Those with most are the best
# that `python -m bench portable` found on an H100 (bench/LOG.md).
Table = dict[int, tuple[tuple[int, T], ...]]
_FORWARD: Table[Config] = {
    64: ((160, Config(64, 64, 4, 3)), (0, Config(128, 64, 4, 2))),
    128: ((160, Config(128, 64, 4, 2)), (0, Config(64, 64, 4, 2))),
    256: ((200, Config(128, 64, 8, 2)), (160, Config(64, 64, 4, 2)), (0, Config(64, 32, 4, 2))),
}
_BACKWARD: Table[BackwardConfig] = {
    64: (
        (160, BackwardConfig(Config(64, 64, 4, 3), Config(128, 64, 4, 3))),
        (0, BackwardConfig(Config(64, 64, 4, 2), Config(64, 64, 4, 2))),
    ),
    128: (
        (160, BackwardConfig(Config(64, 64, 4, 2), Config(128, 32, 8, 3))),
        (0, BackwardConfig(Config(32, 64, 8, 1), Config(32, 64, 8, 1))),
    ),
    256: (
        (200, BackwardConfig(Config(64, 32, 4, 2), Config(64, 32, 4, 2))),
        (160, BackwardConfig(Config(32, 32, 8, 1), Config(32, 32, 8, 1))),
        (0, BackwardConfig(Config(16, 32, 4, 1), Config(16, 32, 4, 1))),
    ),
}


def forward_config(problem: spec.Problem) -> Config:
    """Of the forward: measured on an H100, guessed where there is less room."""
    return _pick(_FORWARD, problem)


def backward_config(problem: spec.Problem) -> BackwardConfig:
    """Of the backward, likewise."""
    return _pick(_BACKWARD, problem)


def decode_config(problem: spec.Problem) -> Config:
    """Of few rows against many keys."""
    rows = min(64, padded(problem.T * problem.G))
    wide = padded(max(problem.H, problem.Hv))
    return Config(rows, 64 if wide <= 128 else 32, 4, 3 if wide <= 128 else 2)


def _pick(table: Table[T], problem: spec.Problem) -> T:
    wide = max(64, padded(max(problem.H, problem.Hv)))
    room = shared_memory_kib(problem.device)
    return next(config for least, config in table[wide] if room >= least)


def is_supported(device: spec.Device) -> bool:
    """Whether it is an NVIDIA GPU that multiplies bfloat16: Ampere and later."""
    is_nvidia = device.platform == "gpu" and device.kind.startswith("NVIDIA")
    return is_nvidia and _OLDER.search(device.kind) is None


def shared_memory_kib(device: spec.Device) -> int:
    """What a block may take: much on cards for data centers, 99 KiB on others."""
    return _of_card(_SHARED_MEMORY_KIB, device, 99)


def multiprocessors(device: spec.Device) -> int:
    """Of a card; where unknown, those of an average one."""
    return _of_card(_MULTIPROCESSORS, device, 80)


_OLDER = re.compile(r"\b(Tesla|Quadro|TITAN|GTX|RTX 20[678]0|[TPV]100|T4|T\d{3,4}|MX\d+)\b")
_SHARED_MEMORY_KIB = {
    r"A100|A800|A30": 163,
    r"H100|H200|H800|H20|GH200|B100|B200|GB200|B300|GB300": 227,
}
_MULTIPROCESSORS = {
    r"A100|A800": 108, r"A30": 56, r"A10G": 80, r"A10": 72, r"L40|L40S": 142, r"L4": 58,
    r"H100|H200|H800|GH200": 132, r"B200|GB200": 148, r"RTX 3090": 82, r"RTX 4090": 128,
    r"RTX 5090": 170,
}  # fmt: skip


def _of_card(table: dict[str, int], device: spec.Device, otherwise: int) -> int:
    """The entry whose names are words of a card's name."""
    found = (n for names, n in table.items() if re.search(rf"\b({names})\b", device.kind))
    return next(found, otherwise)
