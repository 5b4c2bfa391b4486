"""This library beside the best peer for each problem: what the tables by shape and option share."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bench import baselines, results
from bench.problems import Problem, measure, submit
from bench.shapes import INPUT_DISTRIBUTION
from bench.timing import Clock, Compiler, Timing, device_clock

OURS = "jaxflash"
Problems = Mapping[str, Sequence[Problem]]  # by heading


class Cell(NamedTuple):
    """One implementation of one problem."""

    problem: Problem
    implementation: str
    timing: Timing | None
    reason: str | None  # why there is no time
    ms: float | None
    flops: float

    @property
    def tflops(self) -> float | None:
        return None if self.ms is None else self.flops / self.ms / 1e9


class Table(NamedTuple):
    """What to measure, and what to say of it."""

    name: str  # of the command and of the files
    title: str
    summary: str
    cell: str  # what an entry is
    check: str  # how answers are checked
    problems: Problems
    base: Problems | None = None  # what is taken away from each problem for a second table
    base_title: str = ""


def run(table: Table, argv: Sequence[str] | None) -> int:
    """Runs a table; 1 when an implementation gave a wrong answer."""
    prog = f"python -m bench {table.name}"
    parser = argparse.ArgumentParser(prog=prog, description=table.summary)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="headings that contain a word")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    chosen = [
        heading
        for heading in table.problems
        if not options.only or any(word.lower() in heading.lower() for word in options.only)
    ]
    compiler, clock = Compiler.for_device(device), device_clock(device)
    sources = [p for p in (table.problems, table.base) if p is not None]
    asked = list(dict.fromkeys(p for h in chosen for source in sources for p in source[h]))
    waiting = {problem: _submit(compiler, problem, device) for problem in asked}
    cells: dict[Problem, list[Cell]] = {}
    for problem in asked:
        cells[problem] = _cells(problem, waiting.pop(problem), clock, options.repeats)
        print(problem.label, *(_short(cell) for cell in cells[problem]), sep="  ", flush=True)
    publish(table, chosen, cells, device, options.out, results.part(options.only))
    everything = [cell for row in cells.values() for cell in row]
    return int(any(cell.reason and cell.reason.startswith("wrong") for cell in everything))


def implementations(problem: Problem) -> dict[str, baselines.Implementation]:
    """Peers that know the option, then this library.

    tokamax is left out of gradients: another peer has been faster at every shape.
    """
    names = ["cudnn"] if problem.option in ("", "bias", "mask") else []
    if not problem.option:
        names += ["tokamax"] if problem.window is None and problem.direction == "forward" else []
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
            functions[name] = functools.partial(problem.call, implementation.call)
    return refusals | submit(compiler, problem, functions, apart=(OURS,))


def _cells(problem: Problem, submitted: dict[str, Any], clock: Clock, repeats: int) -> list[Cell]:
    timings, reasons = measure(problem, submitted, clock, repeats)

    def cell(name: str) -> Cell:
        timing = timings.get(name)
        ms = timing.median_ms if timing else None
        return Cell(problem, name, timing, reasons.get(name), ms, problem.flops)

    return [cell(name) for name in implementations(problem)]


def publish(
    table: Table,
    headings: Sequence[str],
    cells: Mapping[Problem, Sequence[Cell]],
    device: jax.Device,
    out: Path,
    variant: str = "",
) -> None:
    """Prints and writes a table for each heading, and a second one where there is a base."""
    footnotes = results.Footnotes()
    sections = [
        f"Each cell: {table.cell}. The last column is the best peer's time over this library's: "
        "above 1 is faster than it."
    ]
    sections += _sections([(h, [cells[p] for p in table.problems[h]]) for h in headings], footnotes)
    if table.base is not None:
        sections.append(f"## {table.base_title}")
        rows = [
            (
                h,
                [
                    _less(cells[p], cells[b])
                    for p, b in zip(table.problems[h], table.base[h], strict=True)
                ],
            )
            for h in headings
        ]
        sections += _sections(rows, footnotes)
    everything = [cell for row in cells.values() for cell in row]
    methods = dict.fromkeys(c.timing.method for c in everything if c.timing)
    sections += [
        footnotes.text(),
        f"Method: {'; '.join(methods) or 'nothing was measured'}; implementations interleaved; "
        f"inputs {INPUT_DISTRIBUTION}; {table.check}.",
    ]
    origin = results.origin(device)
    records = [_record(cell) | origin for cell in everything]
    report = results.Report(table.name, variant, table.title, sections, records)
    results.publish(report, device, out)


def _sections(
    tables: Sequence[tuple[str, Sequence[Sequence[Cell]]]], footnotes: results.Footnotes
) -> list[str]:
    """Tables, each with its heading, and what their ratios come to."""
    sections = []
    for heading, rows in tables:
        names = list(dict.fromkeys(cell.implementation for row in rows for cell in row))
        lines = [_line(row, names, footnotes) for row in rows]
        sections += [f"### {heading}", results.markdown_table(["", *names, "ratio"], lines)]
    by_problem = {row[0].problem: row for _, rows in tables for row in rows}
    ratios = [r for row in by_problem.values() if (r := ratio(row)) is not None]
    if ratios:
        mean = float(np.exp(np.mean(np.log(ratios))))
        sections.append(
            f"{sum(r >= 1 for r in ratios)} of {len(ratios)} ratios are at least 1, their "
            f"geometric mean is {mean:.3f}, the least {min(ratios):.3f}."
        )
    return sections


def _less(row: Sequence[Cell], base: Sequence[Cell]) -> list[Cell]:
    """What a problem takes beyond another."""
    of_base = {cell.implementation: cell for cell in base}
    found = []
    for cell in row:
        other = of_base[cell.implementation]
        if cell.ms is None or other.ms is None:
            found.append(cell._replace(ms=None, timing=None, reason=cell.reason or other.reason))
        else:
            flops = cell.flops - other.flops
            found.append(cell._replace(ms=cell.ms - other.ms, flops=flops))
    return found


def ratio(row: Sequence[Cell]) -> float | None:
    """The best peer's time over ours."""
    ours = next((c.ms for c in row if c.implementation == OURS), None)
    peers = [c.ms for c in row if c.implementation != OURS and c.ms]
    return min(peers) / ours if ours and peers else None


def _line(row: Sequence[Cell], names: Sequence[str], footnotes: results.Footnotes) -> list[str]:
    by_name = {cell.implementation: cell for cell in row}
    entries = []
    for name in names:
        cell = by_name.get(name)
        if cell is None:
            entries.append("")
        elif cell.ms is None:
            entries.append(footnotes.empty_cell(cell.reason or "not run"))
        else:
            entries.append(_entry(cell))
    found = ratio(row)
    return [row[0].problem.label, *entries, f"{found:.3f}" if found else ""]


def _entry(cell: Cell) -> str:
    return f"{cell.ms:.4g} / {cell.tflops:.0f}"


def _short(cell: Cell) -> str:
    return f"{cell.implementation}: {_entry(cell) if cell.ms else cell.reason}"


def _record(cell: Cell) -> dict[str, Any]:
    shape, timing = cell.problem.shape, cell.timing
    row: dict[str, Any] = {
        "problem": cell.problem.label,
        "dtype": shape.dtype,
        "implementation": cell.implementation,
        "reason": cell.reason,
        "direction": cell.problem.direction,
        "flops": cell.flops,
    }
    if timing is not None:
        row |= timing.record() | {"tflops": cell.tflops}
    return row
