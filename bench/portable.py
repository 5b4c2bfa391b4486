"""The Triton kernels beside torch's FlashAttention-2 and tokamax's Triton kernel, by configuration.

Each problem is measured with every configuration that is worth trying; the fastest ones are what
`pallas_kernels/triton/config.py` should name.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import results
from bench.problems import Problem, measure, submit
from bench.shapes import DIRECTIONS, Shape
from bench.timing import Compiler, Timing, device_clock
from jaxflash.arguments import canonicalize
from pallas_kernels import triton
from pallas_kernels.triton import Config

SUMMARY = "The Triton kernels against torch's FlashAttention-2, with every configuration."
TOKENS, FEATURES = 16384, 2048
_DEFAULT, _TOKAMAX, _TORCH = "default", "tokamax", "torch"
_TORCH_RUNS = 20

# Block of queries, block of keys, warps, stages, by head dim: of the forward, and of the backward's
# kernels, that of keys and that of rows, which are tried one at a time.
FORWARD = {
    64: (
        Config(128, 64, 4, 2), Config(128, 64, 4, 3), Config(128, 64, 4, 4), Config(128, 128, 8, 2),
        Config(64, 64, 4, 3), Config(128, 32, 4, 4),
    ),
    128: (
        Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(128, 64, 4, 2), Config(64, 64, 4, 3),
        Config(128, 128, 8, 2), Config(128, 32, 4, 3),
    ),
    256: (
        Config(128, 64, 8, 2), Config(128, 32, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 3),
    ),
}  # fmt: skip
OF_KEYS = {
    64: (
        Config(64, 64, 4, 3), Config(64, 128, 8, 2), Config(64, 128, 8, 3), Config(32, 128, 4, 3),
        Config(128, 128, 8, 2),
    ),
    128: (
        Config(64, 64, 4, 2), Config(32, 128, 4, 2), Config(32, 128, 8, 3), Config(64, 128, 8, 2),
        Config(64, 64, 4, 3), Config(128, 64, 8, 2),
    ),
    256: (
        Config(64, 64, 8, 1), Config(64, 32, 8, 2), Config(64, 32, 4, 2), Config(64, 32, 4, 1),
        Config(128, 32, 8, 1), Config(128, 32, 8, 2), Config(64, 64, 4, 1),
    ),
}  # fmt: skip
OF_ROWS = {
    64: (
        Config(128, 64, 4, 2), Config(128, 64, 4, 3), Config(128, 64, 8, 2), Config(128, 32, 4, 3),
        Config(128, 128, 8, 2),
    ),
    128: (
        Config(64, 64, 4, 2), Config(128, 32, 4, 2), Config(128, 32, 8, 3), Config(128, 64, 8, 2),
        Config(64, 64, 4, 3), Config(64, 128, 8, 2),
    ),
    256: (
        Config(64, 32, 4, 2), Config(64, 32, 4, 3), Config(64, 64, 4, 1), Config(128, 32, 8, 2),
        Config(128, 64, 8, 1),
    ),
}  # fmt: skip


def problems(*, tiny: bool) -> list[Problem]:
    """The shapes of the tables of the Hopper kernels, fewer."""
    if tiny:
        shape = Shape(1, 128, 128, 2, 2, 64, True)
        return [Problem(shape, direction=direction) for direction in DIRECTIONS]
    shapes = [
        Shape(TOKENS // length, length, length, FEATURES // h, FEATURES // h, h, is_causal)
        for h, lengths in ((64, (1024, 4096)), (128, (1024, 4096, 16384)), (256, (4096,)))
        for length in lengths
        for is_causal in (False, True)
    ]
    return [Problem(shape, direction=direction) for direction in DIRECTIONS for shape in shapes]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the table; 1 when the default gave a wrong answer."""
    parser = argparse.ArgumentParser(prog="python -m bench portable", description=SUMMARY)
    parser.add_argument("--tiny", action="store_true", help="a problem for trying the table out")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="problems that contain a word")
    parser.add_argument("--defaults", action="store_true", help="no other configurations")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too
    device = jax.devices()[0]
    chosen = [
        p
        for p in problems(tiny=options.tiny)
        if not options.only or any(word in p.label for word in options.only)
    ]
    here = contextlib.nullcontext() if device.platform == "gpu" else triton.interpreting()
    compiler, clock = Compiler(), device_clock(device)
    lines, records = [], []
    with here:
        waiting = {p: submit(compiler, p, functions(p, options.defaults)) for p in chosen}
        for p, submitted in waiting.items():
            timings, reasons = measure(p, submitted, clock, options.repeats)
            times = {name: timing.median_ms for name, timing in timings.items()}
            if (milliseconds := torch_ms(p, device)) is not None:
                times[_TORCH] = milliseconds
            lines.append(_line(p, times))
            print(" | ".join(lines[-1]), reasons, flush=True)
            records += _records(p, times, timings, reasons)
    headers = ["", "", "torch", "tokamax", "default", "fastest", "which", "torch / fastest"]
    sections = [
        "Median ms / TFLOP/s. `torch` is its FlashAttention-2 (scaled_dot_product_attention, by "
        "CUDA events), `tokamax` its Triton kernel, both others by CUPTI; `which`: block of "
        "queries, block of keys, warps, stages; of one of the backward's kernels, that of keys or "
        "that of rows, the other being the default.",
        results.markdown_table(headers, lines),
    ]
    origin = results.origin(device)
    report = results.Report(
        "portable",
        results.part(options.only),
        "The Triton kernels",
        sections,
        [r | origin for r in records],
    )
    results.publish(report, device, options.out)
    return int(any(r["name"] == _DEFAULT and r["reason"] for r in records))


def functions(p: Problem, only_defaults: bool) -> dict[str, Callable[..., Any]]:
    """Of a problem: tokamax's forward, the default, and other configurations by their text."""
    found: dict[str, Callable[..., Any]] = {_DEFAULT: functools.partial(_ours, p, {})}
    if not only_defaults:
        found |= {n: functools.partial(_ours, p, change) for n, change in candidates(p).items()}
    if p.direction == "forward" and (attention := _tokamax()) is not None:
        found[_TOKAMAX] = functools.partial(p.call, attention)
    return found


def candidates(p: Problem) -> dict[str, dict[str, Config]]:
    """What to try in place of the default of a kernel, by its text."""
    width = p.shape.head_dim
    if p.direction == "forward":
        return {_text(config): {"forward": config} for config in FORWARD[width]}
    of_keys = {f"keys {_text(config)}": {"of_keys": config} for config in OF_KEYS[width]}
    return of_keys | {f"rows {_text(config)}": {"of_rows": config} for config in OF_ROWS[width]}


def _text(config: Config) -> str:
    return f"{config.block_q} {config.block_kv} {config.num_warps} {config.num_stages}"


def _tokamax() -> Callable[..., jax.Array] | None:
    try:
        module = importlib.import_module("tokamax")
    except (ImportError, AttributeError, OSError):  # absent, or built for another JAX
        return None
    return functools.partial(module.dot_product_attention, implementation="triton")


def _ours(
    p: Problem, change: dict[str, Config], arrays: Any, *inputs: jax.Array
) -> tuple[jax.Array, ...]:
    query, key, value = inputs[:3]
    asked, operands = canonicalize(query, key, value, **p.options(), **arrays)
    if p.direction == "forward":
        return triton.forward(asked, operands, change.get("forward"))[:1]
    out, lse = triton.forward(asked, operands)
    config = dataclasses.replace(triton.backward_config(asked), **change)
    found = triton.backward(asked, operands, out, lse, inputs[3], jnp.zeros_like(lse), config)
    return found.query, found.key, found.value


def torch_ms(p: Problem, device: jax.Device) -> float | None:
    """Median time of torch's FlashAttention-2, by CUDA events; None where there is no torch."""
    if device.platform != "gpu":
        return None
    try:
        torch = importlib.import_module("torch")
        attention = importlib.import_module("torch.nn.attention")
    except ImportError:
        return None
    s = p.shape
    sizes = [(s.batch, n, s.query_length, s.head_dim) for n in (s.query_heads, s.kv_heads)]
    on = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v, dout = (torch.randn(size, **on) for size in (sizes[0], *sizes[1:] * 2, sizes[0]))
    with_gradients = p.direction != "forward"
    for x in (q, k, v):
        x.requires_grad_(with_gradients)

    def run() -> None:
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=s.is_causal)
        if with_gradients:
            torch.autograd.grad(out, (q, k, v), dout)

    samples = []
    for i in range(_TORCH_RUNS + 3):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        if i >= 3:
            samples.append(events[0].elapsed_time(events[1]))
    return float(np.median(samples))


def _line(p: Problem, times: Mapping[str, float]) -> list[str]:
    configs = {n: t for n, t in times.items() if n not in (_TORCH, _TOKAMAX)}
    fastest = min(configs, key=lambda n: configs[n]) if configs else None

    def entry(name: str | None) -> str:
        if name is None or name not in times:
            return "-"
        return f"{times[name]:.4g} / {p.flops / times[name] / 1e9:.0f}"

    ratio = "-"
    if fastest is not None and _TORCH in times:
        ratio = f"{times[_TORCH] / times[fastest]:.3f}"
    cells = [entry(name) for name in (_TORCH, _TOKAMAX, _DEFAULT, fastest)]
    return [p.label, p.direction, *cells, fastest or "-", ratio]


def _records(
    p: Problem,
    times: Mapping[str, float],
    timings: Mapping[str, Timing],
    reasons: Mapping[str, str],
) -> list[dict[str, Any]]:
    common = {
        "problem": p.label,
        "direction": p.direction,
        "flops": p.flops,
        **dataclasses.asdict(p.shape),
    }
    found = [
        common | {"name": n, "median_ms": t, "reason": None}
        | (timings[n].record() if n in timings else {})
        for n, t in times.items()
    ]  # fmt: skip
    return found + [
        common | {"name": n, "median_ms": None, "reason": r} for n, r in reasons.items()
    ]
