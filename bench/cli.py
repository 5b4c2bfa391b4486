"""Options that the attention tables share."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from bench import results
from bench.baselines import Implementation, select
from bench.runner import Settings
from bench.shapes import Shape
from bench.timing import Budget, device_clock


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a table does on one kind of device when no option says otherwise."""

    seq: tuple[int, ...]
    batch: int
    heads: int
    dtype: str
    budget_s: float | None
    head_dim: int = 64
    warmup: int = 2
    repeats: int = 12


def parser(table: str, summary: str) -> argparse.ArgumentParser:
    """The options of every table; None means the default for the device."""
    result = argparse.ArgumentParser(prog=f"python -m bench {table}", description=summary)
    add = result.add_argument
    add("--seq", type=int, nargs="+", metavar="T", help="sequence lengths")
    add("--batch", type=int)
    add("--heads", type=int, help="query heads")
    add("--kv-heads", type=int, help="key-value heads (default: as many as query heads)")
    add("--head-dim", type=int)
    add("--dtype", choices=("bfloat16", "float16", "float32"))
    add("--impl", nargs="+", metavar="NAME", help="implementations (default: all)")
    add("--out", type=Path, default=results.RESULTS, metavar="DIR", help="where results go")
    return result


def model_parser(table: str, summary: str) -> argparse.ArgumentParser:
    """The options of the tables of real models, which are given nearly all of the memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # read when JAX first runs
    result = argparse.ArgumentParser(prog=f"python -m bench {table}", description=summary)
    result.add_argument("--tiny", action="store_true", help="a model for trying the table out")
    result.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    return result


def add_timing_options(options: argparse.ArgumentParser) -> None:
    """Options of the tables that run what they compile."""
    add = options.add_argument
    add("--warmup", type=int, help="unmeasured runs of each program")
    add("--repeats", type=int, help="measured runs of each program")
    add("--budget-s", type=float, help="seconds after which nothing new starts; 0 for no limit")


def implementations(
    options_parser: argparse.ArgumentParser, options: argparse.Namespace
) -> list[Implementation]:
    """What `--impl` asks for; an unknown name is a usage error."""
    try:
        return select(options.impl)
    except ValueError as error:
        options_parser.error(str(error))


def fill(options: argparse.Namespace, defaults: Defaults) -> argparse.Namespace:
    """Puts the device's defaults where no option was given."""
    merged = {**vars(options)}
    for field in dataclasses.fields(defaults):
        if merged.get(field.name) is None:
            merged[field.name] = getattr(defaults, field.name)
    merged["kv_heads"] = merged["kv_heads"] or merged["heads"]
    return argparse.Namespace(**merged)


def settings(options: argparse.Namespace, device: jax.Device) -> Settings:
    """How to measure, from filled options."""
    return Settings(
        device=device,
        clock=device_clock(device),
        budget=Budget(options.budget_s or None),
        warmup=options.warmup,
        repeats=options.repeats,
        min_repeats=min(3, options.repeats),
    )


def shapes(options: argparse.Namespace, is_causal: bool) -> list[Shape]:
    """One shape for each sequence length, shortest first."""
    return [
        Shape(
            options.batch,
            length,
            length,
            options.heads,
            options.kv_heads,
            options.head_dim,
            is_causal,
            options.dtype,
        )
        for length in sorted(options.seq)
    ]


def variant(options: argparse.Namespace, usual: Defaults, names: Sequence[str]) -> str:
    """File-name part for what differs from the usual run, as `-batch4-causal`."""
    parts: list[str] = []
    for name in names:
        value: Any = getattr(options, name)
        if value is True:
            parts.append(name)
        elif value is not False and value != getattr(usual, name, None):
            parts.append(f"{name}{value}".replace("_", ""))
    return "".join(f"-{part}" for part in parts)
