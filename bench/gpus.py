"""GPUs that programs can be compiled for without one at hand."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager

import jax

# The fields of XLA's GpuTargetConfigProto, as text. CUDA's own limits are alike on all of them.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {block_shared_memory}
  threads_per_core_limit: {gpu.threads_per_multiprocessor}
  core_count: {gpu.multiprocessors}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{gpu.description}"
"""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler must know of a GPU: name, compute capability, sizes in bytes."""

    description: str
    capability: tuple[int, int]
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_memory: int  # of a multiprocessor; a block may take 1 KiB less
    l2_cache: int
    memory: int
    bandwidth: int  # bytes a second
    clock_ghz: float
    known_as: str | None = None  # what Pallas-Triton knows of it, where that is another name

    def target_config(self) -> str:
        """The description in the form that ``topologies.get_topology_desc`` takes."""
        return _TARGET.format(gpu=self, block_shared_memory=self.shared_memory - 1024)


KIB = 2**10
MIB = 2**20

GPUS = {
    "a100": Gpu(
        description="NVIDIA A100-SXM4-40GB",
        capability=(8, 0),
        multiprocessors=108,
        threads_per_multiprocessor=2048,
        shared_memory=164 * KIB,
        l2_cache=40 * MIB,
        memory=40_536 * MIB,
        bandwidth=1_555 * 10**9,
        clock_ghz=1.41,
    ),
    "a10g": Gpu(
        description="NVIDIA A10G",
        known_as="NVIDIA A10",
        capability=(8, 6),
        multiprocessors=80,
        threads_per_multiprocessor=1536,
        shared_memory=100 * KIB,
        l2_cache=6 * MIB,
        memory=22_515 * MIB,
        bandwidth=600 * 10**9,
        clock_ghz=1.71,
    ),
    "l4": Gpu(
        description="NVIDIA L4",
        capability=(8, 9),
        multiprocessors=58,
        threads_per_multiprocessor=1536,
        shared_memory=100 * KIB,
        l2_cache=48 * MIB,
        memory=22_697 * MIB,
        bandwidth=300 * 10**9,
        clock_ghz=2.04,
    ),
    "h100": Gpu(
        description="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        multiprocessors=132,
        threads_per_multiprocessor=2048,
        shared_memory=228 * KIB,
        l2_cache=50 * MIB,
        memory=81_008 * MIB,
        bandwidth=3_352 * 10**9,
        clock_ghz=1.98,
    ),
    "b200": Gpu(
        description="NVIDIA B200",
        capability=(10, 0),
        multiprocessors=148,
        threads_per_multiprocessor=2048,
        shared_memory=228 * KIB,
        l2_cache=126 * MIB,
        memory=182_152 * MIB,
        bandwidth=8_000 * 10**9,
        clock_ghz=1.965,
    ),
}


def as_if_on(device_kind: str) -> AbstractContextManager[None]:
    """What is traced is for a kind of GPU, as JAX names it, that may not be here."""
    device = jax.sharding.AbstractDevice(device_kind, None, "gpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("device",), abstract_device=device)
    )
