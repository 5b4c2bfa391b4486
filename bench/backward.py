"""Gradients at shapes and options that users have, against the best peer for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench import comparison
from bench.problems import Problem, common
from bench.shapes import Shape


def problems() -> dict[str, list[Problem]]:
    """What is measured, by heading."""
    long = Shape(1, 16384, 16384, 16, 16, 128, True)
    square = Shape(1, 4096, 4096, 16, 16, 128)
    return common() | {
        "Windows": [Problem(long, (1024, 0)), Problem(long, (4096, 0))],
        "Other lengths and head dims": [
            Problem(Shape(4, 4095, 4095, 16, 16, 128, True)),
            *(Problem(Shape(4, 4096, 4096, 16, 16, h, True)) for h in (80, 192)),
        ],
        "Options": [
            *(Problem(long, None, o) for o in ("", "soft cap", "ALiBi", "sinks", "documents")),
            *(Problem(square, None, o) for o in ("", "bias", "dropout")),
        ],
        "In any order and in one": [
            Problem(Shape(16384 // t, t, t, 2048 // h, 2048 // h, h, True), None, o)
            for h, t in ((64, 1024), (128, 1024), (128, 4096), (128, 16384), (256, 1024))
            for o in ("", "deterministic")
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; 1 when an implementation gave a wrong answer."""
    forward = problems()
    both = {
        heading: [dataclasses.replace(p, direction="forward+backward") for p in list_]
        for heading, list_ in forward.items()
    }
    table = comparison.Table(
        name="backward",
        title="Attention forward and backward",
        summary="Time with gradients of this library and of the best peer, by shape and option.",
        cell="median ms / TFLOP/s at 14*B*N*H operations for each visible pair, 10 of them for the "
        "backward alone; gradients of query, key, value, and of bias, slopes and sinks where there "
        "are some",
        check="gradients of the first batch element and two key heads checked in float32 "
        "before timing",
        problems=both,
        base=forward,
        base_title="The backward alone: forward and backward less forward",
    )
    return comparison.run(table, argv)
