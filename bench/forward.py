"""The forward at shapes and options that users have, against the best peer for each."""

from __future__ import annotations

from collections.abc import Sequence

from bench import comparison
from bench.problems import Problem, common
from bench.shapes import Shape


def problems() -> dict[str, list[Problem]]:
    """What is measured, by heading."""
    shared = common()
    seed = [Problem(Shape(8, t, t, 32, 32, 64)) for t in (512, 1024, 2048, 4096, 8192)]
    few = [Problem(Shape(1, 512, 512, 32, 32, 64, c)) for c in (False, True)]
    few += [Problem(Shape(1, 1024, 1024, 16, 16, 128, c)) for c in (False, True)]
    few += [
        Problem(Shape(1, 1024, 1024, 12, 12, 64, True)),
        Problem(Shape(1, 2048, 2048, 32, 8, 128, True)),
    ]
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
        "16k tokens, 2048 features": shared["16k tokens, 2048 features"],
        "The seed document's shapes": seed,
        "One sequence": few,
        "Grouped heads": shared["Grouped heads"],
        "Windows": windows,
        "Lengths that no tile divides": tails,
        "Head dims": head_dims,
        "Options": options,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; 1 when an implementation gave a wrong answer."""
    table = comparison.Table(
        name="forward",
        title="Attention forward",
        summary="Forward time of this library and of the best peer, by shape and option.",
        cell="median ms / TFLOP/s at 4*B*N*H operations for each visible pair",
        check="the first and the last 128 rows checked against the reference in float32 before "
        "timing",
        problems=problems(),
    )
    return comparison.run(table, argv)
