"""Every table of the seed document, answered from the results of the other tables.

`python -m bench report` reads what is in the results folder, and runs nothing unless asked with
`--run`. A section whose table has no results names the command that makes them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import results
from bench.sections.choices import features, recommendations, versions
from bench.sections.found import TABLES, Found, read
from bench.sections.memory import attention_memory, model_memory
from bench.sections.models import generation_rates, serving_rates, training_rates
from bench.sections.speed import forward_times, per_token

SUMMARY = "Answers every table of the seed document, from results that are there."
REPORT = Path(__file__).parent / "REPORT.md"
SECTIONS: tuple[Callable[[Found], str], ...] = (
    forward_times,
    attention_memory,
    model_memory,
    per_token,
    training_rates,
    generation_rates,
    serving_rates,
    versions,
    features,
    recommendations,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=SUMMARY)
    parser.add_argument("--device", default="NVIDIA H100 80GB HBM3", help="whose results")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=REPORT, metavar="FILE")
    parser.add_argument("--run", nargs="*", choices=TABLES, help="tables to run first; all")
    options = parser.parse_args(argv)
    for table in (options.run or TABLES) if options.run is not None else ():
        command = [sys.executable, "-m", "bench", table, "--out", str(options.results)]
        subprocess.run(command, check=True)
    found = read(options.device, options.results, options.out.parent / "plots")
    text = "\n\n".join([_introduction(found), *(section(found) for section in SECTIONS)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(f"Written: {options.out}")
    return 0


def _introduction(found: Found) -> str:
    tables = (name for table in found.rows for name in (table, f"{table}-part"))
    files = {name: f"{name}-{results.slug(found.device)}.md" for name in tables}
    names = ", ".join(
        f"[{name}]({found.folder.name}/{file})"
        for name, file in files.items()
        if (found.folder / file).exists()
    )
    return (
        "# The seed document's tables, answered\n\n"
        "Written by `python -m bench report` from the results of other tables: "
        f"{names}. They name the command, device and versions of each figure. Columns named `seed` "
        "are the document's own claims; none of them was measured here. *Measured* means run on "
        f"{found.device}; *compiled* means the compiler's memory analysis, for a device that need "
        "not be there; *scaled* means that some layers were run and the rest calculated."
    )
