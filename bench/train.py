"""Loss curves of one transformer, trained from one seed with a kernel and with the reference.

How far apart may they be? As far as rounding alone drives them: the model is trained a third time,
with `xla`, which rounds probabilities and their gradients to 16 bits where a kernel does; or, where
`xla` is what is compared, with the reference in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from bench import lm, results

SUMMARY = "Trains a small transformer with a backend and with the reference, and compares losses."
_GPU = lm.Config(length=256, width=512, heads=4, batch=16, steps=200, learning_rate=1e-3)
_CPU = lm.Config(steps=200)
_SHOWN = 20  # steps between the rows of the table
NUDGES = (1, 2, 3)
_NOISE = 2.0  # how many times as far apart as rounding drives them


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; 1 when the curves are further apart than rounding drives them.

    What rounding does is seen in the reference itself, when its first parameters are changed by as
    little.
    """
    parser = argparse.ArgumentParser(prog="python -m bench train", description=SUMMARY)
    parser.add_argument("--impl", help="backend (default: hopper on a GPU, xla elsewhere)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    config = _GPU if on_gpu else _CPU
    config = dataclasses.replace(config, steps=options.steps or config.steps)
    name = options.impl or ("hopper" if on_gpu else "xla")

    def run(implementation: str, nudge: int = 0) -> np.ndarray:
        changed = dataclasses.replace(config, implementation=implementation, nudge=nudge)
        return _losses(dataclasses.replace(changed, attention_dtype="bfloat16"))

    curves = {name: run(name), "reference": run("reference")}
    curves |= {f"reference, nudged {i}": run("reference", i) for i in NUDGES}
    ours, same, *nudged = curves.values()
    apart, *others = (float(np.mean(np.abs(same - other))) for other in (ours, *nudged))
    noise = max(others)
    within = apart <= _NOISE * noise
    _publish(config, curves, apart, noise, device, options.out)
    return int(not within)


def _losses(config: lm.Config) -> np.ndarray:
    """After each step, on the same held-out strings."""
    return np.array([report.loss for report in lm.train(config, report_every=1)])


def _publish(
    config: lm.Config,
    curves: dict[str, np.ndarray],
    apart: float,
    noise: float,
    device: jax.Device,
    out: Path,
) -> None:
    steps = np.arange(config.steps + 1)
    table = [[str(i), *(f"{c[i]:.4f}" for c in curves.values())] for i in steps[::_SHOWN]]
    name = next(iter(curves))
    sections = [
        f"{config.layers} layers, width {config.width}, {config.heads} heads, {config.batch} "
        f"strings of {2 * config.length - 1} tokens a step, Adam, one seed; held-out loss.",
        results.markdown_table(["step", *curves], table),
        f"Mean distance of {name} from the reference, both with attention in bfloat16: "
        f"{apart:.2e}; at most of those whose first parameters were changed by up to bfloat16's "
        f"eps: {noise:.2e}; allowed {_NOISE:g} times as much.",
    ]
    origin = results.origin(device)
    rows = [
        {"implementation": label, "step": int(i), "loss": float(curve[i])} | origin
        for label, curve in curves.items()
        for i in steps
    ]
    lines = [
        results.Line(label, steps.tolist(), curve.tolist(), style="-")
        for label, curve in curves.items()
    ]
    title = "Training with a kernel and with the reference"
    report = results.Report("train", "", title, sections, rows, "held-out loss", lines, "step")
    results.publish(report, device, out)
