"""Configurations of the Hopper forward, measured; the fastest go into the library's table."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bench import results
from bench.problems import Problem, measure, submit
from bench.shapes import Shape
from bench.timing import Compiler, device_clock
from jaxflash import tuning
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper, mosaic
from pallas_kernels.hopper import Config

SUMMARY = "Measure configurations of the Hopper forward and write the fastest into the table."
TOKENS = 16384
FEATURES = 2048  # heads x head dim

# By head dim, what is worth trying.
CANDIDATES: dict[int, tuple[Config, ...]] = {
    64: (
        Config(stages=4),
        Config(stages=4, q_stages=1),
        Config(consumers=3),
        Config(consumers=4, block_kv=64, stages=4),
        Config(block_kv=64, stages=6),
    ),
    128: (Config(), Config(q_stages=1), Config(block_kv=64, stages=4)),
    192: (
        Config(block_kv=64, q_stages=1),
        Config(block_kv=64, stages=3, q_stages=1),
        Config(block_kv=64),
    ),
    256: (Config(block_kv=64, q_stages=1),),
}
LENGTHS: dict[int, tuple[int, ...]] = {
    64: (512, 1024, 2048, 4096, 16384),
    128: (1024, 4096),
    192: (4096,),
    256: (4096,),
}


def problem_of(mask: str, head_dim: int, length: int) -> Problem:
    """One that stands for its kind."""
    heads = FEATURES // head_dim
    shape = Shape(TOKENS // length, length, length, heads, heads, head_dim, mask != "full")
    return Problem(shape, option={"modified": "soft cap", "data": "documents"}.get(mask, ""))


def kinds() -> list[tuple[str, int, int]]:
    """Mask, head dim and length of all that is measured."""
    by_length = [(m, h, n) for h in CANDIDATES for m in ("full", "band") for n in LENGTHS[h]]
    return by_length + [(m, h, 4096) for h in CANDIDATES for m in ("modified", "data")]


def candidates(mask: str, head_dim: int) -> list[Config]:
    """Those that are worth trying, with both times of waiting where it is not clear which."""
    found = list(CANDIDATES[head_dim])
    if mask == "modified":
        # Three or four warpgroups have too few registers for it.
        found = [c for c in found if c.consumers == 2]
        found += [dataclasses.replace(c, late_wait=True) for c in found]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every kind and writes the table of this GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=SUMMARY)
    parser.add_argument("--gpu", default="h100", help="name of the table, a part of the device's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=tuning.TABLES, metavar="DIR")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    if options.gpu not in device.device_kind.lower():
        print(f"this device is {device.device_kind}, not {options.gpu}")
        return 1
    compiler, clock = Compiler(), device_clock(device)
    waiting = {kind: _submit(compiler, *kind) for kind in kinds()}
    rows = []
    for kind, submitted in waiting.items():
        problem = problem_of(*kind)
        timings, faults = measure(problem, submitted, clock, options.repeats)
        for name, reason in faults.items():
            print(f"{problem.label} {name}: {reason}")
        ranked = sorted(timings, key=lambda name: timings[name].median_ms)
        print(problem.label, {name: round(timings[name].median_ms, 4) for name in ranked})
        mask, head_dim, length = kind
        rows.append(
            {
                "mask": mask,
                "head_dim": head_dim,
                "length": length,
                "config": dataclasses.asdict(candidates(mask, head_dim)[int(ranked[0])]),
                "median_ms": {
                    text_of(c): timings[str(i)].median_ms
                    for i, c in enumerate(candidates(mask, head_dim))
                    if str(i) in timings
                },
            }
        )
    table = {"command": f"python -m bench tune --gpu {options.gpu}", **results.origin(device)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.gpu}.json"
    path.write_text(json.dumps(table | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")
    return 0


def _submit(compiler: Compiler, mask: str, head_dim: int, length: int) -> dict[str, Any]:
    problem = problem_of(mask, head_dim, length)
    tried = enumerate(candidates(mask, head_dim))
    functions = {str(i): functools.partial(_run, problem, config) for i, config in tried}
    return submit(compiler, problem, functions)


def _run(
    problem: Problem, config: Config, query: Any, key: Any, value: Any, arrays: Any
) -> jax.Array:
    asked, operands = canonicalize(query, key, value, **problem.options(), **arrays)
    assert mosaic.is_interpreting() or hopper.supports(asked) is None
    return hopper.forward(asked, operands, config)[0]


def text_of(config: Config) -> str:
    """What a configuration is made of, in a short form."""
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
