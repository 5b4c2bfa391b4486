"""Measured cells as text: a table to compare, a table of details, curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.results import Footnotes, Line, markdown_table
from bench.runner import Cell

STANDARD = "standard"


def names_of(cells: Sequence[Cell]) -> list[str]:
    """Implementations in the order of their first cell."""
    return list(dict.fromkeys(cell.implementation for cell in cells))


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells of one shape and direction together: one row of a table."""
    rows: dict[object, list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.shape, cell.direction), []).append(cell)
    return list(rows.values())


def milliseconds(value: float) -> str:
    """Three or four significant digits, with no exponent."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def comparison(
    cells: Sequence[Cell],
    footnotes: Footnotes,
    extra_headers: Sequence[str] = (),
    extra: Callable[[int], Sequence[str]] = lambda length: (),
) -> str:
    """One row a shape, `ms / TFLOP/s` of each implementation, then columns of another origin."""
    names = [name for name in names_of(cells) if _runs_somewhere(cells, name)]
    rows = []
    for row in grouped(cells):
        by_name = {cell.implementation: cell for cell in row}
        length = row[0].shape.query_length
        entries = [_entry(by_name[name], footnotes) for name in names]
        rows.append([str(length), *entries, *extra(length)])
    return markdown_table(["T", *names, *extra_headers], rows)


def absent(cells: Sequence[Cell]) -> str:
    """Implementations that ran nowhere, each with its reason, in place of an empty column."""
    lines = []
    for name in names_of(cells):
        if not _runs_somewhere(cells, name):
            reasons = dict.fromkeys(cell.reason for cell in cells if cell.implementation == name)
            lines.append(f"- {name}: {'; '.join(filter(None, reasons))}")
    return "\n".join(["Not in the table:", "", *lines]) if lines else ""


def details(cells: Sequence[Cell]) -> str:
    """One row a measurement: median, spread, rate, ratio to standard, error, repeats."""
    headers = ["T", "implementation", "median ms", "p10..p90 ms", "TFLOP/s"]
    headers += ["x standard", "relative error", "temporary MiB", "runs"]
    rows = []
    for row in grouped(cells):
        baseline = next((c.timing for c in row if c.implementation == STANDARD), None)
        for cell in row:
            if cell.timing is None or cell.tflops is None:
                continue
            ratio = baseline.median_ms / cell.timing.median_ms if baseline else None
            rows.append(
                [
                    str(cell.shape.query_length),
                    cell.implementation,
                    milliseconds(cell.timing.median_ms),
                    f"{milliseconds(cell.timing.p10_ms)}..{milliseconds(cell.timing.p90_ms)}",
                    f"{cell.tflops:.3g}",
                    f"{ratio:.2f}" if ratio else "-",
                    f"{cell.parity.worst:.1e}" if cell.parity else "-",
                    f"{cell.memory.temporary / 2**20:.1f}" if cell.memory else "-",
                    str(cell.timing.repeats),
                ]
            )
    return markdown_table(headers, rows)


def curves(cells: Sequence[Cell], prefix: str = "", style: str = "o-") -> list[Line]:
    """Median time over the sequence length, one curve an implementation."""
    lines = []
    for name in names_of(cells):
        timed = [
            (cell.shape.query_length, cell.timing)
            for cell in cells
            if cell.implementation == name and cell.timing is not None
        ]
        lines.append(
            Line(
                f"{prefix}{name}",
                [length for length, _ in timed],
                [timing.median_ms for _, timing in timed],
                ([t.p10_ms for _, t in timed], [t.p90_ms for _, t in timed]),
                style,
            )
        )
    return [line for line in lines if line.x]


def method_line(cells: Sequence[Cell]) -> str:
    """How the numbers were taken."""
    methods = dict.fromkeys(cell.timing.method for cell in cells if cell.timing)
    warmups = dict.fromkeys(str(cell.timing.warmup) for cell in cells if cell.timing)
    if not methods:
        return "Nothing was measured."
    return (
        f"Method: {'; '.join(methods)}; {'/'.join(warmups)} warm-up runs, implementations "
        "interleaved; checked against float32 before timing (relative error of the worst tile of "
        "64 rows)."
    )


def _entry(cell: Cell, footnotes: Footnotes) -> str:
    if cell.timing is None or cell.tflops is None:
        return footnotes.empty_cell(cell.reason or "not run")
    mark = f" {footnotes.mark(cell.note)}" if cell.note else ""
    return f"{milliseconds(cell.timing.median_ms)} / {cell.tflops:.3g}{mark}"


def _runs_somewhere(cells: Sequence[Cell], name: str) -> bool:
    """A failure is shown in the table, like a number; only a refusal everywhere is moved out."""
    return any(cell.implementation == name and cell.status != "skipped" for cell in cells)
