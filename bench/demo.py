"""The main job on whatever device is here: right, timed, its memory compared, and it trains.

Needs the runtime dependencies only, prints plainly, and ends within two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax

import jaxflash
from bench import lm, results
from bench.baselines import Implementation, standard
from bench.capacity import format_bytes
from bench.results import markdown_table
from bench.runner import Cell, Settings, run_shape
from bench.shapes import DIRECTIONS, Shape
from bench.timing import Budget, device_clock

SUMMARY = "Attention against the standard one, then a small language model that learns."
OURS = "jaxflash"
CPU_SHAPE = Shape(1, 2048, 2048, 4, 4, 64, is_causal=True, dtype="float32")
# 1 GiB for one matrix of scores, so that the standard attention fits any card it is shown on.
GPU_SHAPE = Shape(2, 4096, 4096, 16, 16, 64, is_causal=True, dtype="bfloat16")
_CHANCE_TO_LEARNED = 0.1  # the loss must fall below this part of its first value
_LEARNED_ACCURACY = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every part; 1 when an answer is wrong or the model does not learn."""
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=SUMMARY)
    parser.add_argument("--seq", type=int, metavar="T", help="sequence length of the comparison")
    parser.add_argument("--steps", type=int, default=lm.Config.steps, help="training steps")
    options = parser.parse_args(argv)
    start = time.monotonic()
    device = jax.devices()[0]
    print(f"jaxflash on {results.device_text(device)}, JAX {jax.__version__}")
    cells = compare(demo_shape(device, options.seq), device)
    problems = show_comparison(cells) + show_training(lm.Config(steps=options.steps))
    _heading("Result")
    for problem in problems:
        print(f"FAILED: {problem}")
    verdict = "FAILED" if problems else "passed"
    print(f"{verdict} in {time.monotonic() - start:.0f} s")
    return int(bool(problems))


def demo_shape(device: jax.Device, length: int | None) -> Shape:
    """A shape that suits the device, at the length asked for."""
    shape = CPU_SHAPE if device.platform == "cpu" else GPU_SHAPE
    if length is None:
        return shape
    return dataclasses.replace(shape, query_length=length, key_length=length)


def ours() -> Implementation:
    """The library as a user calls it: it chooses the backend."""
    return Implementation(OURS, "jaxflash.dot_product_attention", jaxflash.dot_product_attention)


def compare(shape: Shape, device: jax.Device) -> list[Cell]:
    """Checks and times both directions of both implementations."""
    clock = device_clock(device)
    cells: list[Cell] = []
    for direction in DIRECTIONS:
        settings = Settings(device, clock, Budget(None), warmup=1, repeats=5)
        cells += run_shape(shape, direction, [standard(), ours()], settings)
    return cells


def show_comparison(cells: Sequence[Cell]) -> list[str]:
    """Prints parity, time and memory; returns what is wrong."""
    shape = cells[0].shape
    print(f"attention {shape.label}; standard is jax.nn.dot_product_attention")
    backends = str(jaxflash.explain(*shape.structs(), is_causal=shape.is_causal))
    print("backends:\n" + "\n".join(f"  {line}" for line in backends.splitlines()))
    _heading("Parity: relative error against float32, worst tile of 64 rows")
    rows = [
        [
            cell.implementation,
            cell.direction,
            name,
            f"{error:.1e}",
            f"{cell.parity.limits[name]:.1e}",
        ]
        for cell in cells
        if cell.parity
        for name, error in cell.parity.errors.items()
    ]
    print(markdown_table(["implementation", "program", "result", "error", "allowed"], rows))
    _heading("Time, median (p10..p90)")
    print(markdown_table(["program", "standard", OURS, "ratio"], _rows(cells, _time, _median)))
    methods = dict.fromkeys(cell.timing.method for cell in cells if cell.timing)
    print(f"method: {'; '.join(methods) or 'none'}")
    _heading("Memory beside inputs and outputs, by the compiler's analysis")
    print(markdown_table(["program", "standard", OURS, "ratio"], _rows(cells, _size, _temporary)))
    problems = [f"{c.implementation}: {c.reason}" for c in cells if c.status == "failed"]
    # The standard attention may not fit; the library's own must always have an answer.
    unmeasured = [c for c in cells if c.implementation == OURS and c.status == "skipped"]
    return problems + [f"{c.implementation} did not run: {c.reason}" for c in unmeasured]


def show_training(config: lm.Config) -> list[str]:
    """Trains the model and prints its loss; returns what is wrong."""
    _heading("Training: a Flax transformer whose attention is jaxflash's")
    print(
        f"task: repeat a random string of {config.length} tokens out of {config.vocabulary}; "
        "loss and accuracy on fresh strings' second half"
    )
    start = time.monotonic()
    reports = []
    for report in lm.train(config):
        reports.append(report)
        print(f"step {report.step:4d}  loss {report.loss:.4f}  accuracy {report.accuracy:6.1%}")
    print(f"{config.steps} steps in {time.monotonic() - start:.0f} s, compiling included")
    return learning_problems(reports)


def learning_problems(reports: Sequence[lm.Report]) -> list[str]:
    """What a run that learned does not have; NaN is a problem."""
    first, last = reports[0], reports[-1]
    problems = []
    if not last.loss < _CHANCE_TO_LEARNED * first.loss:
        problems.append(f"the loss went from {first.loss:.4f} to {last.loss:.4f} only")
    if not last.accuracy > _LEARNED_ACCURACY:
        problems.append(f"final accuracy {last.accuracy:.1%}, expected {_LEARNED_ACCURACY:.0%}")
    return problems


def _heading(text: str) -> None:
    print(f"\n== {text}")


def _median(cell: Cell) -> float | None:
    return cell.timing.median_ms if cell.timing else None


def _temporary(cell: Cell) -> float | None:
    return cell.memory.temporary if cell.memory else None


def _time(cell: Cell) -> str:
    if cell.timing is None:
        return f"- ({cell.reason})"
    return f"{cell.timing.median_ms:.4g} ms ({cell.timing.p10_ms:.4g}..{cell.timing.p90_ms:.4g})"


def _size(cell: Cell) -> str:
    return format_bytes(cell.memory.temporary) if cell.memory else f"- ({cell.reason})"


def _rows(
    cells: Sequence[Cell],
    text: Callable[[Cell], str],
    number: Callable[[Cell], float | None],
) -> list[list[str]]:
    """One row a direction: both implementations, and how many times less ours takes."""
    rows = []
    for direction in DIRECTIONS:
        pair = {cell.implementation: cell for cell in cells if cell.direction == direction}
        theirs, mine = number(pair["standard"]), number(pair[OURS])
        ratio = f"{theirs / mine:.2f}x" if theirs and mine else "-"
        rows.append([direction, text(pair["standard"]), text(pair[OURS]), ratio])
    return rows
