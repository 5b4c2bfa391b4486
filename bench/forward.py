"""The forward at shapes and options that users have, against the best peer for each."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bench import baselines, results
from bench.problems import Problem, measure, submit
from bench.shapes import INPUT_DISTRIBUTION, Shape
from bench.timing import Clock, Compiler, Timing, device_clock

SUMMARY = "Forward time of this library and of the best peer, shape by shape, option by option."
OURS = "jaxflash"


class Cell(NamedTuple):
    """One implementation of one problem."""

    problem: Problem
    implementation: str
    timing: Timing | None
    reason: str | None  # why there is no time

    @property
    def tflops(self) -> float | None:
        if self.timing is None:
            return None
        return self.problem.flops / self.timing.median_ms / 1e9


def problems() -> dict[str, list[Problem]]:
    """What is measured, by heading."""
    plain = [
        Problem(Shape(b, t, t, 2048 // h, 2048 // h, h, c))
        for h in (64, 128, 256)
        for b, t in ((16, 1024), (4, 4096), (1, 16384))
        for c in (False, True)
    ]
    seed = [Problem(Shape(8, t, t, 32, 32, 64)) for t in (512, 1024, 2048, 4096, 8192)]
    grouped = [Problem(Shape(4, 2048, 2048, n, k, 128, True)) for n, k in ((32, 32), (64, 8))]
    windows = [
        Problem(Shape(4, 2048, 2048, 64, 8, 128, True), (1024, 0)),
        Problem(Shape(1, 16384, 16384, 16, 16, 128, True), (4096, 0)),
    ]
    tails = [
        Problem(Shape(4, 4095, 4095, 16, 16, 128, True)),
        Problem(Shape(4, 4095, 4095, 32, 32, 64, True)),
        Problem(Shape(1, 16383, 16383, 16, 16, 128)),
    ]
    head_dims = [
        Problem(Shape(4, 4096, 4096, 16, 16, h, c))
        for h in (72, 80, 96, 192)
        for c in (False, True)
    ]
    long = Shape(1, 16384, 16384, 16, 16, 128, True)
    options = [Problem(long, None, o) for o in ("", "soft cap", "ALiBi", "sinks", "documents")]
    square = Shape(4, 4096, 4096, 16, 16, 128)
    options += [Problem(square, None, o) for o in ("", "bias", "mask", "dropout")]
    return {
        "16k tokens, 2048 features": plain,
        "The seed document's shapes": seed,
        "Grouped heads": grouped,
        "Windows": windows,
        "Lengths that no tile divides": tails,
        "Head dims": head_dims,
        "Options": options,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; 1 when an implementation gave a wrong answer."""
    parser = argparse.ArgumentParser(prog="python -m bench forward", description=SUMMARY)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="headings that contain a word")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    chosen = {
        heading: list_
        for heading, list_ in problems().items()
        if not options.only or any(word.lower() in heading.lower() for word in options.only)
    }
    compiler, clock = Compiler(), device_clock(device)
    asked = list(dict.fromkeys(p for list_ in chosen.values() for p in list_))
    waiting = {problem: _submit(compiler, problem, device) for problem in asked}
    cells = {}
    for problem in asked:
        cells[problem] = _cells(problem, waiting.pop(problem), clock, options.repeats)
        print(problem.label, *(_short(cell) for cell in cells[problem]), sep="  ", flush=True)
    publish({h: [cells[p] for p in list_] for h, list_ in chosen.items()}, device, options.out)
    everything = [cell for row in cells.values() for cell in row]
    return int(any(cell.reason and cell.reason.startswith("wrong") for cell in everything))


def implementations(problem: Problem) -> dict[str, baselines.Implementation]:
    """Peers that know the option, then this library; the first that supports a call runs."""
    names = ["cudnn"] if problem.option in ("", "bias", "mask") else []
    if not problem.option:
        names += ["tokamax"] if problem.window is None else []
        names += ["fa3"] if problem.shape.head_dim == baselines.FA3_HEAD_DIM else []
    return {peer.name: peer for peer in baselines.select(names)} | {OURS: baselines.best_of_ours()}


def _submit(compiler: Compiler, problem: Problem, device: jax.Device) -> dict[str, Any]:
    """Programs on their way, or why there is none."""
    refusals, functions = {}, {}
    for name, implementation in implementations(problem).items():
        reason = implementation.refusal(problem.shape, device)
        if reason or implementation.call is None:
            refusals[name] = reason or "cannot be called"
        else:
            functions[name] = functools.partial(_call, implementation.call, problem)
    return refusals | submit(compiler, problem, functions)


def _call(
    attention: Callable[..., jax.Array],
    problem: Problem,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    arrays: dict[str, jax.Array],
) -> jax.Array:
    return attention(query, key, value, **problem.options(), **arrays)


def _cells(problem: Problem, submitted: dict[str, Any], clock: Clock, repeats: int) -> list[Cell]:
    timings, reasons = measure(problem, submitted, clock, repeats)
    names = implementations(problem)
    return [Cell(problem, name, timings.get(name), reasons.get(name)) for name in names]


def publish(cells: dict[str, list[list[Cell]]], device: jax.Device, out: Path) -> None:
    """Prints and writes a table for each heading."""
    footnotes = results.Footnotes()
    sections = [
        "Each cell: median ms / TFLOP/s at 4*B*N*H operations for each visible pair. The last "
        "column is the best peer's time over this library's: above 1 is faster than it."
    ]
    for heading, rows in cells.items():
        names = list(dict.fromkeys(cell.implementation for row in rows for cell in row))
        lines = [_line(row, names, footnotes) for row in rows]
        sections += [f"### {heading}", results.markdown_table(["", *names, "ratio"], lines)]
    everything = list({id(c): c for rows in cells.values() for row in rows for c in row}.values())
    ratios = [r for rows in cells.values() for row in rows if (r := ratio(row)) is not None]
    if ratios:
        mean = float(np.exp(np.mean(np.log(ratios))))
        sections.append(
            f"{sum(r >= 1 for r in ratios)} of {len(ratios)} ratios are at least 1, their "
            f"geometric mean is {mean:.3f}, the least {min(ratios):.3f}."
        )
    methods = dict.fromkeys(c.timing.method for c in everything if c.timing)
    sections += [
        footnotes.text(),
        f"Method: {'; '.join(methods) or 'nothing was measured'}; implementations interleaved; "
        f"inputs {INPUT_DISTRIBUTION}; the first and the last 128 rows checked against the "
        "reference in float32 before timing.",
    ]
    origin = results.origin(device)
    records = [_record(cell) | origin for cell in everything]
    report = results.Report("forward", "", "Attention forward", sections, records)
    results.publish(report, device, out)


def ratio(row: Sequence[Cell]) -> float | None:
    """The best peer's time over ours."""
    ours = next((c.timing for c in row if c.implementation == OURS), None)
    peers = [c.timing.median_ms for c in row if c.implementation != OURS and c.timing]
    return min(peers) / ours.median_ms if ours and peers else None


def _line(row: Sequence[Cell], names: Sequence[str], footnotes: results.Footnotes) -> list[str]:
    by_name = {cell.implementation: cell for cell in row}
    entries = []
    for name in names:
        cell = by_name.get(name)
        if cell is None:
            entries.append("")
        elif cell.timing is None:
            entries.append(footnotes.empty_cell(cell.reason or "not run"))
        else:
            entries.append(_entry(cell))
    found = ratio(row)
    return [row[0].problem.label, *entries, f"{found:.3f}" if found else ""]


def _entry(cell: Cell) -> str:
    assert cell.timing is not None
    return f"{cell.timing.median_ms:.4g} / {cell.tflops:.0f}"


def _short(cell: Cell) -> str:
    return f"{cell.implementation}: {_entry(cell) if cell.timing else cell.reason}"


def _record(cell: Cell) -> dict[str, Any]:
    shape, timing = cell.problem.shape, cell.timing
    row: dict[str, Any] = {
        "problem": cell.problem.label,
        "dtype": shape.dtype,
        "implementation": cell.implementation,
        "reason": cell.reason,
        "flops": cell.problem.flops,
    }
    if timing is not None:
        row |= timing.record() | {"tflops": cell.tflops}
    return row
