"""Time by length."""

from __future__ import annotations

from typing import Any

from bench import seed
from bench.results import markdown_table
from bench.sections.found import (
    OURS,
    STANDARD,
    Found,
    Row,
    kib,
    new_curves,
    number,
    picture,
    quotient,
    section,
    value,
)


def forward_times(found: Found) -> str:
    """Forward time by length, and the share of the product's rate."""
    lengths = list(seed.H100.times_ms)
    times = {T: forward_ms(found, T) for T in lengths}
    lines, curves = [], new_curves("standard", "cuDNN", "jaxflash")
    for length in lengths:
        of_length = times[length]
        lines.append(
            [
                str(length),
                *(number(of_length[name]) for name in curves),
                quotient(of_length["standard"], of_length["jaxflash"]),
                *(number(x, 3) for x in seed.H100.times_ms[length]),
            ]
        )
        for name, (x, y) in curves.items():
            if (milliseconds := of_length[name]) is not None:
                x.append(length)
                y.append(milliseconds)
    headers = ["T", *(f"{n}, ms" for n in curves), "standard / jaxflash"]
    headers += [f"seed: {name}" for name in seed.H100.columns]
    return section(
        "Speed: forward, batch 8, 32 heads, head dim 64",
        f"Measured on {found.device} (`python -m bench speed` and `forward`), bfloat16, no mask; "
        "jaxflash is `hopper`.",
        markdown_table(headers, lines),
        picture(found, "forward", "Forward, batch 8, 32 heads, head dim 64", "ms", curves),
        "The seed's FP16 times are "
        f"{_claimed_tflops(4096):.0f} TFLOP/s at T 4096, and its own text says 740: both cannot be "
        "right.",
        "A100 and A10G: not had, there was neither card; their kernels, `triton`, are compiled for "
        "them and not timed. FP8: see the comparison of versions.",
    )


def forward_ms(found: Found, length: int) -> dict[str, float | None]:
    """Of batch 8, 32 heads of 64, by who."""
    shape = measured(8, length)
    standard = found.latest("speed", **shape, implementation=STANDARD)
    of_table = {"problem": label(length), "dtype": "bfloat16"}
    cudnn = found.latest("forward", **of_table, implementation="cudnn")
    cudnn = cudnn or found.latest("speed", **shape, implementation="cudnn")
    ours = found.latest("forward", **of_table, implementation="jaxflash")
    ours = ours or found.latest("speed", **shape, implementation=OURS)
    rows = {"standard": standard, "cuDNN": cudnn, "jaxflash": ours}
    return {name: value(row, "median_ms") for name, row in rows.items()}


def label(length: int) -> str:
    """The same problem's in other tables."""
    return f"B8 T{length} N32/32 H64 full"


def measured(batch: int, length: int) -> dict[str, Any]:
    """Rows of `speed` that have a time."""
    shape: Row = {"batch": batch, "query_length": length, "query_heads": 32, "head_dim": 64}
    shape |= {"key_length": length, "kv_heads": 32, "dtype": "bfloat16"}
    return {**shape, "is_causal": False, "direction": "forward", "status": "measured"}


def _claimed_tflops(length: int) -> float:
    milliseconds = seed.H100.times_ms[length][2]
    assert milliseconds is not None
    return 4 * 8 * 32 * 64 * length**2 / milliseconds / 1e9


def per_token(found: Found) -> str:
    """Time and memory of attention alone, per token."""
    lines, command = [], "speed --batch 1"
    how = found.command(command)
    for length, claim in seed.PER_TOKEN.items():
        shape = measured(1, length)
        rows = [found.latest("speed", **shape, implementation=n) for n in (STANDARD, OURS)]
        totals = [value(row, "median_ms") for row in rows]
        times = [ms / length * 1e3 if ms else None for ms in totals]
        if any(times):
            how = f"measured (`python -m bench {command}`)"
        memory = found.latest("footprint", table="attention", length=length)
        held = memory["bytes_per_token"] if memory else {}
        lines.append(
            [
                str(length),
                *map(number, times),
                quotient(*times),
                f"{claim.standard_ms / claim.flash_ms:.1f}",
                *(kib(held.get(name)) for name in ("standard", "jaxflash")),
                str(claim.standard_mb),
                str(claim.flash_mb),
            ]
        )
    headers = [
        "T", "standard, us", "jaxflash, us", "ratio", "seed: ratio", "standard, KiB",
        "jaxflash, KiB", "seed: Standard, MB", "seed: Flash, MB",
    ]  # fmt: skip
    first, last = (512, 16384)
    growth = seed.PER_TOKEN[last].standard_ms / seed.PER_TOKEN[first].standard_ms
    call_ms = seed.PER_TOKEN[first].standard_ms * first
    times_own = call_ms / (seed.A100.times_ms[first][0] or 1)
    return section(
        "Scaling: time and memory a token, batch 1, 32 heads, head dim 64",
        f"Forward. Memory: compiled, query, key, value and output included. Time: {how}.",
        markdown_table(headers, lines),
        f"The seed gives milliseconds a token; {seed.PER_TOKEN[first].standard_ms} ms for each of "
        f"{first} tokens would be {call_ms:.0f} ms a call, {times_own:.0f} times what its own "
        "table of the forward has for eight such calls, so only ratios can be compared. They grow "
        f"{growth:.0f} times from {first} to {last} tokens, where the work a token grows "
        f"{last // first} times.",
    )
