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
from bench.timing import Clock, Compiler, device_clock
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
        Config(stages=4, ping_pong=True),
        Config(consumers=3),
        Config(consumers=3, ping_pong=True),
        Config(consumers=4, block_kv=64, stages=4),
        Config(consumers=4, block_kv=64, stages=4, ping_pong=True),
        Config(consumers=4, block_kv=96, stages=3, ping_pong=True, overlaps=False, parts=3),
        Config(consumers=3, stages=3, ping_pong=True, overlaps=False, parts=2),
        Config(consumers=3, block_kv=192, ping_pong=True, overlaps=False, parts=3),
    ),
    128: (
        Config(),
        Config(ping_pong=True),
        Config(block_kv=160, q_stages=1),
        Config(consumers=3, q_stages=1, ping_pong=True, overlaps=False, parts=2),
    ),
    192: (Config(block_kv=96, q_stages=1), Config(block_kv=64)),
    256: (Config(block_kv=64, q_stages=1),),
}
LENGTHS: dict[int, tuple[int, ...]] = {
    64: (512, 1024, 2048, 4096, 16384),
    128: (1024, 4096, 16384),
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
    parser.add_argument("--only", metavar="WORDS", help="problems that contain these, as printed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=tuning.TABLES, metavar="DIR")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    if options.gpu not in device.device_kind.lower():
        print(f"this device is {device.device_kind}, not {options.gpu}")
        return 1
    chosen = [kind for kind in kinds() if (options.only or "") in problem_of(*kind).label]
    compiler, clock = Compiler.for_device(device), device_clock(device)
    waiting = {kind: _submit(compiler, *kind) for kind in chosen}
    rows = _measured_before(options.gpu) if options.only else {}
    for kind, submitted in waiting.items():
        rows[kind] = _measure(kind, submitted, clock, options.repeats) | results.origin(device)
    table = {"command": f"python -m bench tune --gpu {options.gpu}", "rows": list(rows.values())}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.gpu}.json"
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"Written: {path}")
    return 0


def _measured_before(gpu: str) -> dict[tuple[str, int, int], dict[str, Any]]:
    return {(r["mask"], r["head_dim"], r["length"]): r for r in tuning.table(gpu)}


def _measure(
    kind: tuple[str, int, int], submitted: dict[str, Any], clock: Clock, repeats: int
) -> dict[str, Any]:
    """A row of the table."""
    problem, (mask, head_dim, length) = problem_of(*kind), kind
    timings, faults = measure(problem, submitted, clock, repeats)
    for name, reason in faults.items():
        print(f"{problem.label} {name}: {reason}")
    configs = dict(enumerate(candidates(mask, head_dim)))
    times = {i: timings[str(i)].median_ms for i in configs if str(i) in timings}
    fastest = configs[min(times, key=lambda i: times[i])]
    print(f"{problem.label}: {text_of(fastest)}", sorted(round(t, 4) for t in times.values()))
    return {
        "mask": mask,
        "head_dim": head_dim,
        "length": length,
        "config": _varied(fastest),
        "median_ms": {text_of(configs[i]): t for i, t in times.items()},
    }


def _submit(compiler: Compiler, mask: str, head_dim: int, length: int) -> dict[str, Any]:
    problem = problem_of(mask, head_dim, length)
    tried = enumerate(candidates(mask, head_dim))
    functions = {str(i): functools.partial(_run, problem, config) for i, config in tried}
    return submit(compiler, problem, functions, apart=functions)


def _run(
    problem: Problem, config: Config, arrays: Any, query: Any, key: Any, value: Any
) -> tuple[jax.Array]:
    asked, operands = canonicalize(query, key, value, **problem.options(), **arrays)
    assert mosaic.is_interpreting() or hopper.supports(asked) is None
    return hopper.forward(asked, operands, config)[:1]


def text_of(config: Config) -> str:
    """What a configuration is made of, in a short form."""
    return " ".join(f"{k}={v}" for k, v in _varied(config).items())


def _varied(config: Config) -> dict[str, Any]:
    """The fields that are tuned; rows are fewer, and tiles turned, in decoding alone.

    That products of visits overlap goes without saying, and so does that a visit is one part.
    """
    usual = {"overlaps": True, "parts": 1}
    left_out = {"rows", "turned"} | {k for k, v in usual.items() if getattr(config, k) == v}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
