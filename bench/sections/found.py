"""What has been measured, and how figures, curves and sections are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import results
from bench.gpus import GPUS
from bench.results import Line, is_out_of_memory

TABLES = (
    "speed", "forward", "fp8", "footprint", "decode", "throughput", "generation", "serving",
)  # fmt: skip
OURS, STANDARD = "jaxflash-hopper", "standard"
SMALL_CARD = GPUS["a10g"]  # the 24 GB card
Row = dict[str, Any]
Curves = dict[str, tuple[list[int], list[float]]]  # lengths and values, by label


@dataclasses.dataclass(frozen=True)
class Found:
    """What has been measured on one kind of device."""

    device: str
    folder: Path
    rows: dict[str, list[Row]]  # by table, oldest first
    plots: Path

    def latest(self, table: str, /, **wanted: Any) -> Row | None:
        """The newest row with these values."""
        matching = [row for row in self.rows.get(table, ()) if _matches(row, wanted)]
        return matching[-1] if matching else None

    def command(self, table: str) -> str:
        """How to get what is not there."""
        return f"`python -m bench {table}` on {self.device} has not been run yet"


def _matches(row: Row, wanted: Row) -> bool:
    return all(row.get(name) == x for name, x in wanted.items())


def read(device: str, folder: Path, plots: Path) -> Found:
    """All rows of a device."""
    place = results.slug(device)
    rows = {}
    for table in TABLES:
        path = folder / f"{table}-{place}.jsonl"
        if path.exists():
            rows[table] = results.read_rows(path)
    return Found(device, folder, rows, plots)


def section(title: str, *parts: str) -> str:
    """Parts that are not empty, under a heading."""
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


def value(row: Row | None, name: str) -> float | None:
    """Of a row that may be missing."""
    return None if row is None else row.get(name)


def number(x: float | None, digits: int = 4) -> str:
    """A figure, or a dash."""
    return "-" if x is None else f"{x:.{digits}g}"


def number_or_reason(row: Row | None, x: float | None) -> str:
    """A figure, or why there is none, as far as the row says so."""
    if x is None and row is not None and is_out_of_memory(row.get("reason") or ""):
        return "does not fit"
    return number(x)


def quotient(a: float | None, b: float | None) -> str:
    """``a / b``, or a dash."""
    return f"{a / b:.2f}" if a and b else "-"


def kib(x: float | None) -> str:
    """Bytes in KiB, or a dash."""
    return "-" if x is None else f"{x / 1024:.1f}"


def new_curves(*names: str) -> Curves:
    """Without points yet."""
    return {name: ([], []) for name in names}


def picture(found: Found, name: str, title: str, y_label: str, curves: Curves) -> str:
    """Saves a plot by length; returns what shows it, or why there is none."""
    lines: Iterable[Line] = (Line(label, x, y) for label, (x, y) in curves.items() if x)
    path = found.plots / f"{name}.png"
    problem = results.save_plot(path, title, y_label, list(lines))
    return problem or f"![{title}]({path.parent.name}/{path.name})"
