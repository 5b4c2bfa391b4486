"""Whether a compiled program fits the device, from its own memory analysis."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bench.shapes import Shape, score_matrix_bytes

# A CPU's free memory is shared with everything else on the machine, so a program that would take
# the last of it is left out.
_CPU_HEADROOM = 0.9
_CGROUP = Path("/sys/fs/cgroup")


class ProgramBytes(NamedTuple):
    """What a compiled program says it allocates, in bytes."""

    arguments: int
    outputs: int
    temporary: int


def program_bytes(compiled: Any) -> ProgramBytes | None:
    """Reads `compiled.memory_analysis()`; None where the platform has none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return ProgramBytes(
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
    )


def free_bytes(device: jax.Device) -> int | None:
    """Memory that a program may still allocate on the device now; None where it is unknown."""
    if device.platform == "cpu":
        free = [n for n in (_host_available(), _cgroup_available()) if n is not None]
        return int(min(free) * _CPU_HEADROOM) if free else None
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def refusal(needed: ProgramBytes | None, free: int | None) -> str | None:
    """The reason why a program does not fit beside its arguments, which are held already."""
    if needed is None or free is None:
        return None
    wanted = needed.outputs + needed.temporary
    if wanted <= free:
        return None
    return f"needs {format_bytes(wanted)} beside its inputs; {format_bytes(free)} is free"


def compile_refusal(
    error: jax.errors.JaxRuntimeError, shape: Shape, free: int | None
) -> str | None:
    """The reason why a program whose float32 logits do not fit did not compile; None if they do.

    XLA tries products on the device while it compiles, and fails there with other words.
    """
    logits = score_matrix_bytes(shape) * 4 // shape.itemsize
    words = ("All configs failed", "Failed to get configs", "RESOURCE_EXHAUSTED")
    if free is None or logits <= free or not any(word in str(error) for word in words):
        return None
    return (
        f"does not compile on the device: the float32 logits take {format_bytes(logits)}; "
        f"{format_bytes(free)} is free"
    )


def format_bytes(count: float) -> str:
    """Text of a byte count with a binary unit and three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:,.4g} TiB"


def _host_available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except FileNotFoundError:  # not Linux
        return _host_physical()
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _host_physical()


def _host_physical() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available() -> int | None:
    """What a container's limit leaves, which MemAvailable does not know of."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (_CGROUP / "memory.current").read_text(encoding="ascii").strip()
    except (FileNotFoundError, PermissionError):
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
