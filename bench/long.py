"""Time at long sequences: where attention without the T x S matrix wins."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from bench import cli, results, tables
from bench.progress import progress
from bench.runner import Cell, exit_code, records, run_shape
from bench.shapes import DIRECTIONS

SUMMARY = "Time at long sequences, causal and full, forward and with gradients."
LENGTHS = (1024, 2048, 4096, 8192, 16384)
GPU = cli.Defaults(seq=LENGTHS, batch=1, heads=32, dtype="bfloat16", budget_s=None)
CPU = cli.Defaults(
    seq=LENGTHS, batch=1, heads=4, dtype="float32", budget_s=480, warmup=1, repeats=5
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; 1 when an implementation gave a wrong answer."""
    parser = cli.parser("long", SUMMARY)
    cli.add_timing_options(parser)
    parser.add_argument("--mask", choices=("full", "causal"), nargs="+", default=["full", "causal"])
    parser.add_argument("--direction", choices=DIRECTIONS, nargs="+", default=list(DIRECTIONS))
    device = jax.devices()[0]
    usual = CPU if device.platform == "cpu" else GPU
    options = cli.fill(parser.parse_args(argv), usual)
    implementations = cli.implementations(parser, options)
    settings = cli.settings(options, device)
    cells: list[Cell] = []
    total = len(options.seq) * len(options.mask) * len(options.direction) * len(implementations)
    with progress(total, "long") as advance:
        # Length outermost: when time runs out, every table has its shorter sequences.
        for index in range(len(options.seq)):
            for mask in options.mask:
                shape = cli.shapes(options, mask == "causal")[index]
                for direction in options.direction:
                    cells += run_shape(shape, direction, implementations, settings, advance)
    variant = cli.variant(options, usual, ("batch", "heads", "head_dim", "dtype"))
    publish(cells, options, variant, device)
    return exit_code(cells)


def publish(
    cells: Sequence[Cell], options: argparse.Namespace, variant: str, device: jax.Device
) -> None:
    """Prints and writes one table for each mask and direction."""
    footnotes = results.Footnotes()
    size = f"batch {options.batch}, heads {options.heads}, head dim {options.head_dim}"
    sections = ["Each cell: median ms / TFLOP/s."]
    lines: list[results.Line] = []
    for mask in options.mask:
        for direction in options.direction:
            chosen = [
                cell
                for cell in cells
                if cell.direction == direction and cell.shape.is_causal == (mask == "causal")
            ]
            sections += [
                f"### {direction}, {mask}",
                tables.comparison(chosen, footnotes),
                tables.details(chosen),
            ]
            style = ("o" if mask == "full" else "s") + ("-" if direction == "forward" else "--")
            lines += tables.curves(chosen, f"{mask} {direction}: ", style)
    sections += [footnotes.text(), tables.absent(cells), tables.method_line(cells)]
    title = f"Attention time at long sequences, {size}, {options.dtype}"
    report = results.Report(
        "long", variant, title, sections, records(cells, device), "median ms", lines
    )
    results.publish(report, device, options.out)
