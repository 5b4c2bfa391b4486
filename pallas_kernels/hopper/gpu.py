"""The GPUs that these kernels run on."""

from pallas_kernels import spec

L2_CACHE_BYTES = 50 * 2**20
# What tiles that are worked on at the same time read should stay in the L2 cache.
L2_BYTES = 2**24
# What all blocks of the backward work on at the same time: 34 MB still stay in the cache, 67 do not
# (bench/LOG.md, heads of a group).
L2_AT_ONCE_BYTES = 40 * 2**20


def is_hopper(device: spec.Device) -> bool:
    names = ("H100", "H200", "H800", "H20", "GH200")
    return device.platform == "gpu" and any(name in device.kind for name in names)


def multiprocessors(device: spec.Device) -> int:
    """Of a Hopper GPU; one too many would cost time, and nothing else."""
    for name, count in (("H100 PCIe", 114), ("H800 PCIe", 114), ("H20-", 78), ("H20 ", 78)):
        if name in f"{device.kind} ":
            return count
    return 132
