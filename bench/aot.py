"""Programs compiled for GPUs that are not here: memory, registers, spills, instruction counts.

XLA compiles for a GPU from a description of it, on any machine; nothing is run. `compile_for` does
so for one function and reports what the compiler says: the program's memory and, for each Mosaic
kernel in it, what ptxas allocated and, where NVIDIA's disassembler is installed, the instructions.
Needs the packages of the ``aot`` extra, which ``make aot`` installs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.mosaic.gpu import constraints
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# On import Mosaic sets MOSAIC_GPU_CUDA_ROOT; imported later, it would undo `_dumping`.
import jaxflash
import pallas_kernels.mosaic  # noqa: F401
from bench import seed
from bench.gpus import GPUS, MIB, Gpu
from bench.progress import progress
from bench.results import markdown_table
from bench.runner import attention_function
from bench.shapes import DIRECTIONS, Direction, Shape, score_matrix_bytes

SUMMARY = "Programs compiled for GPUs that are not here: memory, registers, instructions."
LENGTHS = (512, 1024, 2048, 4096, 8192)

_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic kernel, as ptxas reports it. `instructions` is None without a disassembler."""

    name: str
    registers: int  # a thread, at launch: warpgroups may redistribute them
    spill_store_bytes: int
    spill_load_bytes: int
    warnings: tuple[str, ...]
    instructions: Mapping[str, int] | None

    def count(self, opcode: str) -> int:
        """How often `opcode` occurs in the machine code with any suffix: "MUFU", "MUFU.EX2"."""
        if self.instructions is None:
            raise ValueError(
                "instructions are counted only where nvidia-cuda-nvdisasm is installed"
            )
        return sum(
            count
            for name, count in self.instructions.items()
            if name == opcode or name.startswith(f"{opcode}.")
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program: bytes on the GPU, and its Mosaic kernels."""

    gpu: str
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int
    kernels: tuple[Kernel, ...]


def compile_for(
    fn: Callable[..., Any], *structs: Any, gpu: str = "h100", donated: tuple[int, ...] = ()
) -> Program:
    """Compiles a function for a GPU that need not be here.

    Args:
      fn: Any function that ``jax.jit`` takes.
      *structs: Its arguments without their contents, `jax.ShapeDtypeStruct` or pytrees of it.
      gpu: One of `GPUS`.
      donated: Which arguments' memory is for the results.

    Returns:
      What the compiler reports.

    Raises:
      ModuleNotFoundError: If the packages that hold the compiler are not installed.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}; got {gpu!r}")
    if reason := missing_packages():
        raise ModuleNotFoundError(reason)
    mesh = mesh_of(gpu, 1)
    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        # Pallas-Triton reads the kind of device from the abstract mesh (JAX 0.11 and later).
        with jax.sharding.use_abstract_mesh(_abstract(mesh, GPUS[gpu])):
            replicated = NamedSharding(mesh, PartitionSpec())
            jitted = jax.jit(fn, in_shardings=replicated, donate_argnums=donated)
            lowered = jitted.lower(*structs)
        analysis = lowered.compile().memory_analysis()
        kernels = _kernels(lowered.as_text(), Path(folder), GPUS[gpu])
    assert analysis is not None  # CUDA always has one
    return Program(
        gpu,
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.peak_memory_in_bytes,
        kernels,
    )


def mesh_of(gpu: str, devices: int) -> Mesh:
    """So many of a GPU that need not be here, along an axis "device"."""
    return Mesh(np.array(_topology(GPUS[gpu], devices).devices), ("device",))


def _abstract(mesh: Mesh, gpu: Gpu) -> jax.sharding.AbstractMesh:
    """The mesh without its device, which has a name that Pallas-Triton knows."""
    abstract = mesh.abstract_mesh
    if gpu.known_as is None:
        return abstract
    device = dataclasses.replace(abstract.abstract_device, device_kind=gpu.known_as)
    return jax.sharding.AbstractMesh(
        abstract.axis_sizes, abstract.axis_names, abstract.axis_types, abstract_device=device
    )


def missing_packages() -> str | None:
    """Why nothing can be compiled for an absent GPU here, and the remedy; None if all is there."""
    missing = [name for name in _PACKAGES if not _is_installed(name)]
    if not missing:
        return None
    return (
        f"compiling for a GPU that is not here needs the package{'s' * (len(missing) > 1)} "
        f"{', '.join(missing)}: run `make aot`, which installs and uses them"
    )


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _topology(gpu: Gpu, devices: int) -> topologies.TopologyDescription:
    """A machine with such GPUs."""
    try:
        with _nothing_runs_on_cuda():
            return topologies.get_topology_desc(
                "cuda", "cuda", target_config=gpu.target_config(), topology=f"1x1x{devices}"
            )
    except NotImplementedError as error:
        raise RuntimeError(
            "JAX's CUDA plugin is installed but did not register: where the CUDA libraries are "
            "incomplete, it does so only if JAX_PLATFORMS=cpu was set before JAX was first used. "
            "Set it, or run `make aot`"
        ) from error


@contextlib.contextmanager
def _nothing_runs_on_cuda() -> Iterator[None]:
    """Lets the CUDA plugin register without the CUDA libraries that only running needs."""
    option = "jax_platforms"
    with _configured(option, getattr(jax.config, option) or "cpu"):
        yield


@contextlib.contextmanager
def _configured(option: str, value: object) -> Iterator[None]:
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        yield
    finally:
        jax.config.update(option, before)


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Makes Mosaic write what ptxas and the disassembler say of its kernels into `folder`."""
    changes = {
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "TMPDIR": folder,  # Mosaic leaves folders of its own behind, too
    }
    if root := _disassembler_root():
        changes |= {"MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_CUDA_ROOT": str(root)}
    # Mosaic would also write how it chose layouts, a text that takes most of the time.
    without = mock.patch.object(constraints.ConstraintSystem, "__str__", return_value="")
    # Of a program taken from the compilation cache nothing would be reported.
    with _environment(changes), _configured("jax_enable_compilation_cache", False), without:
        yield


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _disassembler_root() -> Path | None:
    """Where the package nvidia-cuda-nvdisasm put its CUDA tree."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        root = Path(location) / "cu13"
        if (root / "bin" / "nvdisasm").exists():
            return root
    return None


# Mosaic compiles equal kernels once in a process and reports on them only then.
_reported: dict[tuple[tuple[int, int], str], Kernel] = {}

_STRING = r'"((?:[^"\\]|\\.)*)"'
_CUSTOM_CALL = re.compile(f"kernel_hash = {_STRING}, module = {_STRING}")


def _kernels(stablehlo: str, folder: Path, gpu: Gpu) -> tuple[Kernel, ...]:
    """The Mosaic kernels of a program, in its order, with the reports found in `folder`."""
    reports = sorted(folder.glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2]))
    fresh = [_read_report(path) for path in reports]
    kernels = []
    for digest, module in _CUSTOM_CALL.findall(stablehlo):
        identity = (gpu.capability, digest)
        if identity not in _reported:
            report = next((kernel for kernel in fresh if kernel.name in module), None)
            if report is None:
                raise RuntimeError(
                    "ptxas did not report on a Mosaic kernel of this program: was it compiled "
                    "earlier in this process without compile_for?"
                )
            fresh.remove(report)
            _reported[identity] = report
        kernels.append(_reported[identity])
    return tuple(kernels)


def _read_report(path: Path) -> Kernel:
    text = path.read_text(encoding="utf-8")
    sass = next(path.parent.glob(f"{path.stem}.sass*"), None)
    return Kernel(
        name=path.stem.rpartition("_")[0],
        registers=_number(r"Used (\d+) registers", text),
        spill_store_bytes=_number(r"(\d+) bytes spill stores", text),
        spill_load_bytes=_number(r"(\d+) bytes spill loads", text),
        # Mosaic declares shared memory as one byte: ptxas takes every access to it for a mistake.
        warnings=tuple(
            line
            for line in re.findall(r"^.*(?:warning|Potential|serialized).*$", text, re.MULTILINE)
            if "out of bound" not in line
        ),
        instructions=_count_opcodes(sass.read_text(encoding="utf-8")) if sass else None,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"ptxas report without {pattern!r}:\n{text}")
    return int(match.group(1))


def _count_opcodes(sass: str) -> Mapping[str, int]:
    # /*00a0*/ @!P0 MUFU.EX2 R4, R5
    lines = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_.]*)")
    return dict(collections.Counter(lines.findall(sass)))


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles and prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=SUMMARY)
    add = parser.add_argument
    add("--gpu", nargs="+", choices=GPUS, default=list(GPUS), help="default: all")
    add("--seq", type=int, nargs="+", metavar="T", default=LENGTHS, help="sequence lengths")
    add("--only", choices=("memory", "kernels"), help="one of the two tables")
    options = parser.parse_args(argv)
    if reason := missing_packages():
        print(reason, file=sys.stderr)
        return 1
    print(f"JAX {jax.__version__}. Compiled only; nothing is run.\n")
    # XLA complains of every program that would not fit the GPU: here that is a result.
    with _environment({"TF_CPP_MIN_LOG_LEVEL": "3"}), _nothing_runs_on_cuda():
        if options.only != "kernels":
            print(_memory_table(options.gpu, options.seq), flush=True)
        if options.only != "memory":
            print(_kernel_table())
    return 0


def _memory_table(gpus: Sequence[str], lengths: Sequence[int]) -> str:
    shapes = [
        Shape(seed.MEMORY_BATCH, length, length, seed.HEADS, seed.HEADS, seed.HEAD_DIM)
        for length in lengths
    ]
    cells = [(gpu, shape, d) for gpu in gpus for shape in shapes for d in DIRECTIONS]
    rows = []
    with progress(len(cells), "aot") as advance:
        for gpu, shape, direction in cells:
            advance(f"{gpu} {shape.label} {direction}")
            rows.append(_memory_row(gpu, shape, direction))
    headers = ("GPU", "T", "pass", "matrix", "standard", "/ matrix", "ours", "/ matrix")
    return (
        f"Temporary memory in MiB: batch {seed.MEMORY_BATCH}, {seed.HEADS} heads, head dim "
        f"{seed.HEAD_DIM}, bfloat16. `matrix` is one T x S matrix of all heads in bfloat16; "
        '`standard` is jax.nn.dot_product_attention, `ours` is jaxflash\'s, both "xla".\n\n'
        f"{markdown_table(headers, rows)}\n"
    )


def _memory_row(gpu: str, shape: Shape, direction: Direction) -> list[str]:
    matrix = score_matrix_bytes(shape) / MIB
    row = [gpu.upper(), str(shape.query_length), direction, f"{matrix:,.0f}"]
    for attention in (standard_attention, our_attention):
        temp = temp_bytes(attention, shape, direction, gpu) / MIB
        row += [f"{temp:,.0f}", f"{temp / matrix:.2f}"]
    return row


def standard_attention(*operands: jax.Array, is_causal: bool) -> jax.Array:
    """The attention that holds the T x S matrix."""
    return jax.nn.dot_product_attention(*operands, is_causal=is_causal, implementation="xla")


def our_attention(*operands: jax.Array, is_causal: bool) -> jax.Array:
    """This library's portable backend."""
    import jaxflash  # noqa: PLC0415  (compile_for serves the kernels' tests without the library)

    return jaxflash.dot_product_attention(*operands, is_causal=is_causal, implementation="xla")


def temp_bytes(
    attention: Callable[..., jax.Array], shape: Shape, direction: Direction, gpu: str
) -> int:
    """Temporary memory of an attention, compiled for a GPU."""
    fn = attention_function(attention, shape.is_causal, direction)
    structs = list(shape.structs())
    if direction == "forward+backward":
        structs.append(structs[0])  # the output's cotangent
    return compile_for(fn, *structs, gpu=gpu).temp_bytes


_OPCODES = ("HGMMA", "MUFU", "BAR.SYNC", "UTMALDG", "UTMASTG")


def _kernel_table() -> str:
    rows = []
    for label, fn, structs in _shown_kernels():
        for kernel in compile_for(fn, *structs, gpu="h100").kernels:
            opcodes = [str(kernel.count(o)) if kernel.instructions else "-" for o in _OPCODES]
            spills = f"{kernel.spill_store_bytes} / {kernel.spill_load_bytes}"
            warnings = "; ".join(kernel.warnings) or "none"
            rows.append([label, "H100", str(kernel.registers), spills, *opcodes, warnings])
    headers = ("kernel", "GPU", "registers", "spilled bytes", *_OPCODES, "ptxas warnings")
    title = "Mosaic kernels: registers a thread, bytes stored / loaded by spills, instructions."
    return f"{title}\n\n{markdown_table(headers, rows)}\n"


def _shown_kernels() -> list[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]]:
    """The forward at each head dim, full and causal."""
    shown: list[tuple[str, Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]] = []
    for head_dim in (64, 128, 256):
        for is_causal in (False, True):
            shape = Shape(1, 4096, 4096, 8, 8, head_dim, is_causal)
            call = functools.partial(
                jaxflash.dot_product_attention, is_causal=is_causal, implementation="hopper"
            )
            shown.append((f"hopper forward {shape.label}", call, shape.structs()))
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
