"""Where results go: JSON Lines, markdown, plots, and what a result says of its origin."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

RESULTS = Path(__file__).parent / "results"
_CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one JSON object a line; earlier runs stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads what `append_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table whose columns are aligned, so that it reads well in a terminal too."""
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(headers))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


class Footnotes:
    """Reasons for empty cells; equal reasons share a number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def empty_cell(self, reason: str) -> str:
        """A cell without a number that points at its reason."""
        return f"- {self.mark(reason)}"

    def mark(self, text: str) -> str:
        return f"[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def text(self) -> str:
        return "\n".join(f"- [{number}] {text}" for text, number in self._numbers.items())


def first_line(error: BaseException) -> str:
    """What an error says, or its kind when it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def is_out_of_memory(reason: str) -> bool:
    """Whether an error of a device says so."""
    return "RESOURCE_EXHAUSTED" in reason


def slug(text: str) -> str:
    """Lower case, with a dash for everything that is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def device_slug(device: jax.Device) -> str:
    """File-name part that names the kind of device, as `nvidia-h100-80gb-hbm3`."""
    return slug(device.device_kind)


def device_text(device: jax.Device) -> str:
    """The device in words; a CPU says how many cores this process may use."""
    if device.platform != "cpu":
        return device.device_kind
    return f"CPU ({platform.machine()}, {usable_cores()} cores)"


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions(device: jax.Device) -> dict[str, str | None]:
    """Versions that a number depends on; None for what is not there."""
    return {
        "jax": jax.__version__,
        "jaxlib": _installed("jaxlib"),
        "cudnn": cudnn_version() if device.platform == "gpu" else None,
        "python": platform.python_version(),
        "platform": device.client.platform_version.splitlines()[0],
    }


def cudnn_version() -> str | None:
    """The cuDNN that JAX's CUDA plugin has loaded, as "9.19.0"; None when it does not say."""
    for plugin in _CUDA_PLUGINS:
        try:
            number = _plugin_cudnn(plugin)
        except (ImportError, AttributeError, RuntimeError):  # absent, or it loads no cuDNN
            continue
        return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return None


def _plugin_cudnn(plugin: str) -> int:
    return int(importlib.import_module(f"{plugin}._versions").cudnn_get_version())


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def origin(device: jax.Device) -> dict[str, Any]:
    """What every row of a run shares: device, versions, date."""
    return {
        "device": device.device_kind,
        "device_text": device_text(device),
        "versions": versions(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def origin_line(device: jax.Device) -> str:
    """The same in one line of text, for under a table."""
    known = [f"{name} {version}" for name, version in versions(device).items() if version]
    date = datetime.datetime.now(datetime.UTC).date()
    return f"Device: {device_text(device)}; {', '.join(known)}; {date}."


class Line(NamedTuple):
    """One curve of a plot, with an optional band of (low, high)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    style: str = "o-"


def save_plot(
    path: Path, title: str, y_label: str, lines: Sequence[Line], x_label: str | None = None
) -> str | None:
    """Draws curves over the sequence length on logarithmic axes, over other things on plain ones.

    Returns the reason when there is no plot.
    """
    if not any(line.x for line in lines):
        return "no plot: nothing was measured"
    try:
        import matplotlib  # noqa: PLC0415  (the bench extra's)
    except ImportError:
        return "no plot: matplotlib is not installed (it comes with the bench extra)"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  (after the choice of backend)

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for line in lines:
        (drawn,) = axes.plot(line.x, line.y, line.style, label=line.label)
        if line.band:
            axes.fill_between(line.x, *line.band, color=drawn.get_color(), alpha=0.2)
    if x_label is None:
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set(title=title, xlabel=x_label or "sequence length T", ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return None


class Report(NamedTuple):
    """One run of a table: printed, and written under its stem."""

    table: str  # the JSON Lines file is named after it
    variant: str  # added to the names of the markdown file and the plot
    title: str
    sections: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    plot_y_label: str = ""
    plot_lines: Sequence[Line] | None = None  # None: no plot is wanted
    plot_x_label: str | None = None  # None: the sequence length


def part(only: Sequence[str] | None) -> str:
    """The variant of a table that some rows were asked of: the whole one stays as it is."""
    return "-part" if only else ""


def publish(report: Report, device: jax.Device, out_dir: Path) -> None:
    """Prints a report of what ran on a device, appends its rows, writes its markdown and plot."""
    write(report, device_slug(device), origin_line(device), out_dir)


def write(report: Report, place: str, origin: str, out_dir: Path) -> None:
    """The same for any place, a part of file names, and a line that says whence figures are."""
    stem = f"{report.table}{report.variant}-{place}"
    plot, problem, picture = out_dir / f"{stem}.png", None, ""
    if report.plot_lines is not None:
        labels = report.plot_y_label, report.plot_lines, report.plot_x_label
        problem = save_plot(plot, report.title, *labels)
        picture = f"\n{problem or f'![{report.title}]({plot.name})'}\n"
    parts = [f"## {report.title}", *(section for section in report.sections if section)]
    text = "\n\n".join([*parts, origin])
    append_rows(out_dir / f"{report.table}-{place}.jsonl", report.rows)
    markdown = out_dir / f"{stem}.md"
    markdown.write_text(f"{text}\n{picture}", encoding="utf-8")
    print(text)
    print(
        f"\nWritten: {markdown}, {report.table}-{place}.jsonl" + (f"; {problem}" if problem else "")
    )
