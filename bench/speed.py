"""The seed document's forward-time table, for every implementation there is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

from bench import cli, results, seed, tables
from bench.progress import progress
from bench.runner import Cell, compile_ahead, exit_code, records, run_shape
from bench.shapes import Direction

SUMMARY = "Time of every implementation at the seed document's shapes."
GPU = cli.Defaults(
    seq=(512, 1024, 2048, 4096, 8192), batch=8, heads=32, dtype="bfloat16", budget_s=None
)
# A CPU has about a thousandth of the rate: the same lengths, fewer heads, float32 as CPUs compute.
CPU = cli.Defaults(
    seq=(512, 1024, 2048, 4096),
    batch=1,
    heads=4,
    dtype="float32",
    budget_s=100,
    warmup=1,
    repeats=7,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; 1 when an implementation gave a wrong answer."""
    parser = cli.parser("speed", SUMMARY)
    cli.add_timing_options(parser)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--grad", action="store_true", help="forward and backward together")
    device = jax.devices()[0]
    usual = CPU if device.platform == "cpu" else GPU
    options = cli.fill(parser.parse_args(argv), usual)
    direction: Direction = "forward+backward" if options.grad else "forward"
    implementations = cli.implementations(parser, options)
    shapes = cli.shapes(options, options.causal)
    settings = cli.settings(options, device)
    cells: list[Cell] = []
    with progress(len(shapes) * len(implementations), "speed") as advance:
        ahead = compile_ahead(shapes, direction, implementations, settings)
        for shape in shapes:
            cells += run_shape(shape, direction, implementations, settings, advance, ahead)
    names = ("batch", "heads", "kv_heads", "head_dim", "dtype", "causal", "grad")
    expected = argparse.Namespace(**vars(options) | {"kv_heads": None})
    chosen = options if options.kv_heads != options.heads else expected
    publish(cells, options, direction, cli.variant(chosen, usual, names), device)
    return exit_code(cells)


def publish(
    cells: Sequence[Cell],
    options: argparse.Namespace,
    direction: Direction,
    variant: str,
    device: jax.Device,
) -> None:
    """Prints and writes the table with the seed's claims beside it."""
    footnotes = results.Footnotes()
    mask = "causal" if options.causal else "full"
    size = f"batch {options.batch}, heads {options.heads}, head dim {options.head_dim}"
    title = f"Attention {direction} time, {size}, {options.dtype}, {mask}"
    claims, same_card = seed.forward_claims(options.batch, device.device_kind)
    beside = same_card and _is_seed_shape(options, claims) and direction == "forward"
    headers = [f"seed: {column}" for column in claims.columns] if beside else []
    sections = [
        _caption(options, device),
        tables.comparison(
            cells, footnotes, headers, lambda length: _claimed(claims, length) if beside else ()
        ),
        footnotes.text(),
        tables.absent(cells),
        tables.details(cells),
        tables.method_line(cells),
        "" if beside else _reference(claims),
    ]
    report = results.Report(
        "speed", variant, title, sections, records(cells, device), "median ms", tables.curves(cells)
    )
    results.publish(report, device, options.out)


def _caption(options: argparse.Namespace, device: jax.Device) -> str:
    text = (
        "Each cell: median ms / TFLOP/s, at 4*B*N*H operations for each visible pair forward, x3.5 "
        "with gradients."
    )
    if device.platform == "cpu" and (options.batch, options.heads) != (GPU.batch, GPU.heads):
        text += (
            f" Reduced for a CPU: batch {options.batch} and {options.heads} heads, where the seed "
            f"document's table has batch {GPU.batch} and {GPU.heads} heads on a GPU."
        )
    return text


def _is_seed_shape(options: argparse.Namespace, claims: seed.ForwardClaims) -> bool:
    asked = (options.batch, options.heads, options.kv_heads, options.head_dim, options.causal)
    return asked == (claims.batch, seed.HEADS, seed.HEADS, seed.HEAD_DIM, False)


def _claimed(claims: seed.ForwardClaims, length: int) -> list[str]:
    times = claims.times_ms.get(length, (None,) * len(claims.columns))
    return ["N/A" if time is None else str(time) for time in times]


def _reference(claims: seed.ForwardClaims) -> str:
    """The claims apart, when what was measured is another card or another problem."""
    heading = (
        f"For reference, the seed document's claims for {claims.card} (forward, ms, batch "
        f"{claims.batch}, heads {seed.HEADS}, head dim {seed.HEAD_DIM}); not measured here, and "
        "another device or problem than above:"
    )
    rows = [[str(length), *_claimed(claims, length)] for length in claims.times_ms]
    return f"{heading}\n\n{results.markdown_table(['T', *claims.columns], rows)}"
