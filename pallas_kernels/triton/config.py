"""How kernels are cut into tiles, by GPU and head dim."""

import dataclasses
from typing import Literal

from pallas_kernels import spec
from pallas_kernels.triton.memory import padded


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


# By shared memory of a block, largest first: what holds q, and stages of k and v.
Table = dict[int, tuple[tuple[int, Config], ...]]
_FORWARD: Table = {
    # head dim: (bytes, config)
    64: ((160, Config(128, 64, 4, 3)), (0, Config(128, 64, 4, 2))),
    128: ((160, Config(128, 64, 8, 3)), (0, Config(64, 64, 4, 2))),
    256: ((160, Config(64, 64, 8, 2)), (0, Config(64, 32, 4, 2))),
}
_BACKWARD: Table = {
    64: ((160, Config(64, 64, 4, 2)), (0, Config(64, 64, 4, 2))),
    128: ((160, Config(64, 64, 8, 2)), (0, Config(32, 64, 8, 1))),
    256: ((200, Config(32, 64, 8, 1)), (160, Config(32, 32, 8, 1)), (0, Config(16, 32, 4, 1))),
}


def forward_config(problem: spec.Problem) -> Config:
    """Of the forward; not measured yet on any card."""
    return _pick(_FORWARD, problem)


def backward_config(problem: spec.Problem) -> Config:
    """Of both kernels of the backward, likewise."""
    return _pick(_BACKWARD, problem)


def decode_config(problem: spec.Problem) -> Config:
    """Of few rows against many keys."""
    rows = min(64, padded(problem.T * problem.G))
    wide = padded(max(problem.H, problem.Hv))
    return Config(rows, 64 if wide <= 128 else 32, 4, 3 if wide <= 128 else 2)


def _pick(table: Table, problem: spec.Problem) -> Config:
    wide = max(64, padded(max(problem.H, problem.Hv)))
    room = shared_memory_kib(problem.device)
    return next(config for least, config in table[wide] if room >= least)


def is_supported(device: spec.Device) -> bool:
    """Whether it is an NVIDIA GPU that multiplies bfloat16: Ampere and later."""
    older = ("Tesla", "Quadro", "TITAN", "GTX", "RTX 20", "T4", "V100", "P100")
    is_nvidia = device.platform == "gpu" and device.kind.startswith("NVIDIA")
    return is_nvidia and not any(name in device.kind for name in older)


def shared_memory_kib(device: spec.Device) -> int:
    """What a block may take: much on cards for data centers, 99 KiB on others."""
    names = {"A100": 163, "A800": 163, "A30": 163, "H100": 227, "H200": 227, "H800": 227}
    names |= {"H20": 227, "GH200": 227, "B100": 227, "B200": 227, "GB200": 227, "B300": 227}
    return next((size for name, size in names.items() if name in device.kind), 99)


def multiprocessors(device: spec.Device) -> int:
    """Of a card; where unknown, those of an average one."""
    names = {"A100": 108, "A10G": 80, "A10": 72, "L40": 142, "L4": 58, "H100": 132, "H200": 132}
    names |= {"B200": 148, "RTX 3090": 82, "RTX 4090": 128, "RTX 5090": 170}
    return next((count for name, count in names.items() if name in device.kind), 80)
