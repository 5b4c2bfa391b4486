"""Temporary memory of the compiled programs: the T x S matrix, held or not."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from bench import capacity, cli, results, seed
from bench.baselines import Implementation
from bench.capacity import ProgramBytes, format_bytes, program_bytes
from bench.progress import progress
from bench.runner import attention_function
from bench.shapes import DIRECTIONS, Direction, Shape, score_matrix_bytes

SUMMARY = "Temporary memory by the compiler's own analysis; nothing is run."
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
DEFAULTS = cli.Defaults(seq=LENGTHS, batch=8, heads=32, dtype="bfloat16", budget_s=None)


@dataclasses.dataclass(frozen=True)
class MemoryCell:
    """Memory of one program, or the reason why there is none."""

    shape: Shape
    direction: Direction
    implementation: str
    memory: ProgramBytes | None
    reason: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles everything, prints and writes the table."""
    parser = cli.parser("memory", SUMMARY)
    parser.add_argument("--causal", action="store_true")
    options = cli.fill(parser.parse_args(argv), DEFAULTS)
    device = jax.devices()[0]
    implementations = cli.implementations(parser, options)
    shapes = cli.shapes(options, options.causal)
    cells = []
    with progress(len(shapes) * len(DIRECTIONS) * len(implementations), "memory") as advance:
        for shape in shapes:
            for direction in DIRECTIONS:
                for implementation in implementations:
                    advance(f"{shape.label} {direction}: {implementation.name}")
                    cells.append(compile_cell(implementation, shape, direction, device))
    publish(cells, options, device)
    return 0


def compile_cell(
    implementation: Implementation, shape: Shape, direction: Direction, device: jax.Device
) -> MemoryCell:
    """Compiles for shapes alone, so that a program far larger than the device has a row too."""
    memory: ProgramBytes | None = None
    reason = implementation.refusal(shape, device)
    if reason is None and implementation.call is not None:
        structs = shape.structs()
        args = structs if direction == "forward" else (*structs, structs[0])
        function = attention_function(implementation.call, shape.is_causal, direction)
        try:
            memory = program_bytes(jax.jit(function).lower(*args).compile())
            reason = None if memory else "this platform has no memory analysis"
        except (ValueError, NotImplementedError) as error:  # a refusal at trace time
            reason = results.first_line(error)
        except jax.errors.JaxRuntimeError as error:
            free = capacity.free_bytes(jax.devices()[0])
            reason = capacity.compile_refusal(error, shape, free) or results.first_line(error)
    return MemoryCell(shape, direction, implementation.name, memory, reason)


def publish(cells: Sequence[MemoryCell], options: argparse.Namespace, device: jax.Device) -> None:
    """Prints and writes one table a direction, the seed's claims beside the forward one."""
    footnotes = results.Footnotes()
    mask = "causal" if options.causal else "full"
    size = f"batch {options.batch}, heads {options.heads}, head dim {options.head_dim}"
    title = f"Temporary memory, {size}, {options.dtype}, {mask}"
    sections = [
        "What a program allocates beside its inputs and outputs, by the compiler's analysis "
        f"(memory_analysis, compiled for {results.device_text(device)}); nothing was run. "
        "`matrix` is one B x N x T x S matrix of scores by formula."
    ]
    lines: list[results.Line] = []
    for direction in DIRECTIONS:
        chosen = [cell for cell in cells if cell.direction == direction]
        beside = direction == "forward" and _is_seed_shape(options)
        sections += [f"### {direction}", _table(chosen, footnotes, beside)]
        lines += _curves(chosen, direction)
    sections += [footnotes.text(), _absent(cells)]
    usual = dataclasses.replace(DEFAULTS)
    variant = cli.variant(options, usual, ("batch", "heads", "head_dim", "dtype", "causal"))
    rows = [_row(cell) | results.origin(device) for cell in cells]
    report = results.Report("memory", variant, title, sections, rows, "temporary MiB", lines)
    results.publish(report, device, options.out)


def _is_seed_shape(options: argparse.Namespace) -> bool:
    asked = (options.batch, options.heads, options.head_dim)
    return asked == (seed.MEMORY_BATCH, seed.HEADS, seed.HEAD_DIM)


def _shown(cells: Sequence[MemoryCell]) -> list[str]:
    """Implementations with at least one number, in order."""
    return list(dict.fromkeys(cell.implementation for cell in cells if cell.memory))


def _table(cells: Sequence[MemoryCell], footnotes: results.Footnotes, beside: bool) -> str:
    names = _shown(cells)
    headers = ["T", "matrix", *names]
    if beside:
        headers += ["seed: Attention Matrix", "seed: Standard total", "seed: Flash Attn 2 total"]
    by_place = {(cell.shape, cell.implementation): cell for cell in cells}
    rows = []
    for shape in dict.fromkeys(cell.shape for cell in cells):
        row = [str(shape.query_length), format_bytes(score_matrix_bytes(shape))]
        for name in names:
            cell = by_place[shape, name]
            row.append(
                format_bytes(cell.memory.temporary)
                if cell.memory
                else footnotes.empty_cell(cell.reason or "not compiled")
            )
        if beside:
            claim = seed.MEMORY.get(shape.query_length)
            row += (
                [claim.attention_matrix, claim.standard_total, claim.flash_total]
                if claim
                else ["N/A"] * 3
            )
        rows.append(row)
    return results.markdown_table(headers, rows)


def _absent(cells: Sequence[MemoryCell]) -> str:
    shown = _shown(cells)
    reasons = {c.implementation: c.reason for c in cells if c.implementation not in shown}
    if not reasons:
        return ""
    return "\n".join(["Not in the table:", "", *(f"- {n}: {r}" for n, r in reasons.items())])


def _curves(cells: Sequence[MemoryCell], direction: Direction) -> list[results.Line]:
    lines = []
    for name in _shown(cells):
        # A logarithmic axis has no zero; a program without temporaries has no point.
        points = [
            (cell.shape.query_length, cell.memory.temporary / 2**20)
            for cell in cells
            if cell.implementation == name and cell.memory and cell.memory.temporary
        ]
        style = "o-" if direction == "forward" else "s--"
        x, y = [length for length, _ in points], [mib for _, mib in points]
        lines.append(results.Line(f"{name}, {direction}", x, y, style=style))
    return [line for line in lines if line.x]


def _row(cell: MemoryCell) -> dict[str, Any]:
    memory = cell.memory
    return {
        **dataclasses.asdict(cell.shape),
        "direction": cell.direction,
        "implementation": cell.implementation,
        "status": "compiled" if memory else "skipped",
        "reason": cell.reason,
        "method": "memory_analysis of the compiled program",
        "temporary_bytes": memory.temporary if memory else None,
        "argument_bytes": memory.arguments if memory else None,
        "output_bytes": memory.outputs if memory else None,
        "score_matrix_bytes": score_matrix_bytes(cell.shape),
    }
