"""Attention of one long sequence on several devices: ring, Ulysses, and gathering all keys."""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxflash
from bench import results
from bench.capacity import format_bytes, program_bytes
from bench.shapes import DIRECTIONS, Direction, Shape, flops, random_inputs

SUMMARY = "One causal sequence divided over 1, 2, 4, ... devices: tokens a second, efficiency."
LENGTHS = (32768, 131072, 524288)
_ALONE = 32768  # tokens of the problem that one device's rate is from
_ALONE_NAME = "one device"
_AXIS, _BY_TOKEN = "sequence", P(None, "sequence")
_RUNS, _ENOUGH_S = 4, 1.0  # at the most; what takes so long is run once after the first time
_LONG_S = 5.0  # and what takes so long, only the first
_ALLOWED = 0.01  # relative error: twice that of rounding to bfloat16 and more


def gather(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """What XLA would do by itself: every device gets all keys and values."""
    first = lax.axis_index(_AXIS) * query.shape[1]
    key, value = (lax.all_gather(x, _AXIS, axis=1, tiled=True) for x in (key, value))
    offset = jnp.broadcast_to(first, query.shape[:1]).astype(jnp.int32)
    return jaxflash.dot_product_attention(query, key, value, is_causal=True, query_offset=offset)


_STRIPED = "ring, striped"
METHODS: dict[str, Callable[..., jax.Array]] = {
    _STRIPED: functools.partial(
        jaxflash.ring_attention, axis_name=_AXIS, is_causal=True, layout="striped"
    ),
    "ring": functools.partial(jaxflash.ring_attention, axis_name=_AXIS, is_causal=True),
    "ulysses": functools.partial(jaxflash.ulysses_attention, axis_name=_AXIS, is_causal=True),
    "gather": gather,
}


class Measured(NamedTuple):
    """Of one program on every device."""

    seconds: float
    memory: int | None  # of one device, arguments and results included


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the table; 1 when an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=SUMMARY)
    add = parser.add_argument
    add("--seq", type=int, nargs="+", metavar="T", default=LENGTHS, help="tokens of the whole")
    add("--striped", type=int, nargs="+", metavar="T", default=[], help="more, by one method alone")
    add("--alone", type=int, default=_ALONE, help="tokens of the problem on one device")
    add("--heads", type=int, default=32)
    add("--head-dim", type=int, default=128)
    add("--devices", type=int, nargs="+", help="default: all powers of two that there are")
    add("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    devices = jax.devices()
    counts = options.devices or [2**i for i in range(len(devices).bit_length())]
    counts = [n for n in counts if 1 < n <= len(devices)]
    is_wrong = False

    def shape(length: int) -> Shape:
        return Shape(1, length, length, options.heads, options.heads, options.head_dim, True)

    wanted = [(length, name) for length in options.seq for name in METHODS]
    wanted += [(length, _STRIPED) for length in options.striped]
    with ThreadPoolExecutor() as pool:  # compiling takes longer than running
        for direction in DIRECTIONS:
            pool.submit(_compiled, _ALONE_NAME, shape(options.alone), direction, 1)
            compiled = {(options.alone, name) for name in METHODS} | set(wanted)
            for (length, name), count in itertools.product(compiled, counts):
                pool.submit(_compiled, name, shape(length), direction, count)
    known = shape(options.alone)
    rates = {x: flops(known, x) / _measure(_ALONE_NAME, known, x, 1).seconds for x in DIRECTIONS}
    for count in counts:
        lines, records = [], []
        for direction, (length, name) in itertools.product(DIRECTIONS, wanted):
            rate = rates[direction]
            row = {"direction": direction, "length": length, "devices": count}
            row |= {"method": name, "one_device_tflops": rate / 1e12, "error_at": options.alone}
            try:
                row["error"] = _error(name, known, direction, count)
                found = _measure(name, shape(length), direction, count)
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                records.append(row | {"reason": results.first_line(error)[:200]})
                lines.append(_line(row, None, 0.0))
                continue
            is_wrong |= not row["error"] <= _ALLOWED  # also where it is NaN
            share = flops(shape(length), direction) / count / found.seconds / rate
            records.append(row | found._asdict() | {"efficiency": share, "reason": None})
            lines.append(_line(row, found, share))
            print(" | ".join(lines[-1]), flush=True)
        _publish(count, options, lines, records)
    return int(is_wrong)


def _publish(
    count: int,
    options: argparse.Namespace,
    lines: Sequence[Sequence[str]],
    records: Sequence[dict[str, Any]],
) -> None:
    headers = ["", "T", "devices", "by", "ms", "tokens a second", "efficiency", "memory a device"]
    headers += ["error"]
    sections = [
        f"Causal, batch 1, {options.heads} heads of {options.head_dim}, bfloat16; wall time. "
        "`efficiency`: each device's FLOP/s by those of `dot_product_attention` at "
        f"{options.alone} tokens on one device. Striped arrays are taken as they are. `error`: of "
        "outputs or gradients, the largest, relative to those of one device (root of the sums of "
        f"squares) at {options.alone} tokens.",
        results.markdown_table(headers, lines),
    ]
    device = jax.devices()[0]
    rows = [row | results.origin(device) for row in records]
    report = results.Report("scale", f"-{count}", f"Sequences over {count} devices", sections, rows)
    results.publish(report, device, options.out)


@functools.cache
def _compiled(name: str, shape: Shape, direction: Direction, count: int) -> Any:
    attend: Any = functools.partial(jaxflash.dot_product_attention, is_causal=True)
    sharding = _sharding(count)
    if name != _ALONE_NAME:
        attend = jax.shard_map(
            METHODS[name], mesh=sharding.mesh, in_specs=_BY_TOKEN, out_specs=_BY_TOKEN
        )

    def loss(*qkv: jax.Array) -> jax.Array:
        return jnp.sum(attend(*qkv).astype(jnp.float32))

    function = attend if direction == "forward" else jax.grad(loss, (0, 1, 2))
    options = jaxflash.RING_COMPILER_OPTIONS if jax.default_backend() == "gpu" else None
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shape.structs()]
    return jax.jit(function).lower(*structs).compile(compiler_options=options)


def _sharding(count: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), (_AXIS,)), _BY_TOKEN)


def _measure(name: str, shape: Shape, direction: Direction, count: int) -> Measured:
    compiled = _compiled(name, shape, direction, count)
    arrays = random_inputs(shape, "forward", sharding=_sharding(count))

    def seconds_of(runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs):
            found = compiled(*arrays)
        jax.block_until_ready(found)
        return (time.perf_counter() - start) / runs

    seconds = seconds_of(1)
    if seconds < _LONG_S:
        seconds = seconds_of(1)
    if seconds < _ENOUGH_S:
        seconds = seconds_of(_RUNS)
    memory = program_bytes(compiled)
    return Measured(seconds, None if memory is None else sum(memory))


@functools.cache
def _error(name: str, shape: Shape, direction: Direction, count: int) -> float:
    """The largest relative error of the arrays that a method returns."""
    arrays = random_inputs(shape, "forward", sharding=_sharding(1))
    expected = jax.tree.leaves(_compiled(_ALONE_NAME, shape, direction, 1)(*arrays))
    if name == _STRIPED:
        arrays = tuple(jaxflash.stripe(x, count) for x in arrays)
    given = (jax.device_put(x, _sharding(count)) for x in arrays)
    found = jax.tree.leaves(_compiled(name, shape, direction, count)(*given))
    found = [jax.device_put(x, _sharding(1)) for x in found]
    if name == _STRIPED:
        found = [jaxflash.unstripe(x, count) for x in found]
    return max(float(_distance(*pair)) for pair in zip(found, expected, strict=True))


@jax.jit
def _distance(found: jax.Array, expected: jax.Array) -> jax.Array:
    a, b = (x.astype(jnp.float32) for x in (found, expected))
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())


def _line(row: dict[str, Any], found: Measured | None, share: float) -> list[str]:
    label = [row["direction"], str(row["length"]), str(row["devices"]), row["method"]]
    if found is None:
        return [*label, *"-----"]
    tokens = row["length"] / found.seconds
    memory = "-" if found.memory is None else format_bytes(found.memory)
    measured = [f"{found.seconds * 1e3:.4g}", f"{tokens:.4g}", f"{share:.1%}", memory]
    return [*label, *measured, f"{row['error']:.1e}"]
