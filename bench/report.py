"""Every table of the seed document, answered from the results of the other tables.

`python -m bench report` reads what is in the results folder, and runs nothing unless asked with
`--run`. A section whose table has no results names the command that makes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxflash
from bench import results, seed
from bench.capacity import format_bytes
from bench.gpus import GPUS, as_if_on
from bench.results import Line, markdown_table
from bench.serving import IN_8_BITS
from pallas_kernels.spec.quantization import FP8

SUMMARY = "Answers every table of the seed document, from results that are there."
REPORT = Path(__file__).parent / "REPORT.md"
_TABLES = (
    "speed", "forward", "fp8", "footprint", "decode", "throughput", "generation", "serving",
)  # fmt: skip
_OURS, _STANDARD = "jaxflash-hopper", "standard"
_SMALL_CARD = GPUS["a10g"]  # the 24 GB card
Row = dict[str, Any]
Curves = dict[str, tuple[list[int], list[float]]]  # lengths and values, by label


@dataclasses.dataclass(frozen=True)
class Found:
    """What has been measured on one kind of device."""

    device: str
    folder: Path
    rows: dict[str, list[Row]]  # by table, oldest first
    plots: Path

    def latest(self, table: str, /, **wanted: Any) -> Row | None:
        """The newest row with these values."""
        matching = [row for row in self.rows.get(table, ()) if _matches(row, wanted)]
        return matching[-1] if matching else None

    def command(self, table: str) -> str:
        """How to get what is not there."""
        return f"`python -m bench {table}` on {self.device} has not been run yet"


def _matches(row: Row, wanted: Row) -> bool:
    return all(row.get(name) == x for name, x in wanted.items())


def read(device: str, folder: Path, plots: Path) -> Found:
    """All rows of a device."""
    place = results.slug(device)
    rows = {}
    for table in _TABLES:
        path = folder / f"{table}-{place}.jsonl"
        if path.exists():
            rows[table] = results.read_rows(path)
    return Found(device, folder, rows, plots)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=SUMMARY)
    parser.add_argument("--device", default="NVIDIA H100 80GB HBM3", help="whose results")
    parser.add_argument("--results", type=Path, default=results.RESULTS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=REPORT, metavar="FILE")
    parser.add_argument("--run", nargs="*", choices=_TABLES, help="tables to run first; all")
    options = parser.parse_args(argv)
    for table in (options.run or _TABLES) if options.run is not None else ():
        command = [sys.executable, "-m", "bench", table, "--out", str(options.results)]
        subprocess.run(command, check=True)
    found = read(options.device, options.results, options.out.parent / "plots")
    text = "\n\n".join([_introduction(found), *(section(found) for section in SECTIONS)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n", encoding="utf-8")
    print(f"Written: {options.out}")
    return 0


def _introduction(found: Found) -> str:
    names = ", ".join(f"[{t}]({_relative(found, t)})" for t in found.rows)
    return (
        "# The seed document's tables, answered\n\n"
        "Written by `python -m bench report` from the results of other tables: "
        f"{names}. They name the command, device and versions of each figure. Columns named `seed` "
        "are the document's own claims; none of them was measured here. *Measured* means run on "
        f"{found.device}; *compiled* means the compiler's memory analysis, for a device that need "
        "not be there; *scaled* means that some layers were run and the rest calculated."
    )


def _relative(found: Found, table: str) -> str:
    return f"{found.folder.name}/{table}-{results.slug(found.device)}.md"


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *(part for part in parts if part)])


# Speed.


def forward_times(found: Found) -> str:
    """Forward time by length, and the share of the product's rate."""
    lengths = list(seed.H100.times_ms)
    times = {T: _forward_ms(found, T) for T in lengths}
    lines, curves = [], _curves("standard", "cuDNN", "jaxflash")
    for length in lengths:
        of_length = times[length]
        lines.append(
            [
                str(length),
                *(_number(of_length[name]) for name in curves),
                _ratio(of_length["standard"], of_length["jaxflash"]),
                *(_number(x, 3) for x in seed.H100.times_ms[length]),
            ]
        )
        for name, (x, y) in curves.items():
            if (milliseconds := of_length[name]) is not None:
                x.append(length)
                y.append(milliseconds)
    headers = ["T", *(f"{n}, ms" for n in curves), "standard / jaxflash"]
    headers += [f"seed: {name}" for name in seed.H100.columns]
    return _section(
        "Speed: forward, batch 8, 32 heads, head dim 64",
        f"Measured on {found.device} (`python -m bench speed` and `forward`), bfloat16, no mask; "
        "jaxflash is `hopper`.",
        markdown_table(headers, lines),
        _picture(found, "forward", "Forward, batch 8, 32 heads, head dim 64", "ms", curves),
        "The seed's FP16 times are "
        f"{_claimed_tflops(4096):.0f} TFLOP/s at T 4096, and its own text says 740: both cannot be "
        "right.",
        "A100 and A10G: not had, there was neither card; their kernels, `triton`, are compiled for "
        "them and not timed. FP8: see the comparison of versions.",
    )


def _forward_ms(found: Found, length: int) -> dict[str, float | None]:
    shape = _measured(8, length)
    problem = f"B8 T{length} N32/32 H64 full"
    standard = found.latest("speed", **shape, implementation=_STANDARD)
    of_table = {"problem": problem, "dtype": "bfloat16"}
    cudnn = found.latest("forward", **of_table, implementation="cudnn")
    cudnn = cudnn or found.latest("speed", **shape, implementation="cudnn")
    ours = found.latest("forward", **of_table, implementation="jaxflash")
    ours = ours or found.latest("speed", **shape, implementation=_OURS)
    rows = {"standard": standard, "cuDNN": cudnn, "jaxflash": ours}
    return {name: _value(row, "median_ms") for name, row in rows.items()}


def _measured(batch: int, length: int) -> dict[str, Any]:
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
    lines = []
    for length, claim in seed.PER_TOKEN.items():
        shape = _measured(1, length)
        rows = [found.latest("speed", **shape, implementation=n) for n in (_STANDARD, _OURS)]
        totals = [_value(row, "median_ms") for row in rows]
        times = [ms / length * 1e3 if ms else None for ms in totals]
        memory = found.latest("footprint", table="attention", length=length)
        held = memory["bytes_per_token"] if memory else {}
        lines.append(
            [
                str(length),
                *map(_number, times),
                _ratio(*times),
                f"{claim.standard_ms / claim.flash_ms:.1f}",
                *(_kib(held.get(name)) for name in ("standard", "jaxflash")),
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
    return _section(
        "Scaling: time and memory a token, batch 1, 32 heads, head dim 64",
        "Forward. Memory: compiled, query, key, value and output included. Time: measured, where "
        f"there are figures; else {found.command('speed --batch 1')}.",
        markdown_table(headers, lines),
        f"The seed gives milliseconds a token; {seed.PER_TOKEN[first].standard_ms} ms for each of "
        f"{first} tokens would be {call_ms:.0f} ms a call, {times_own:.0f} times what its own "
        "table of the forward has for eight such calls, so only ratios can be compared. They grow "
        f"{growth:.0f} times from {first} to {last} tokens, where the work a token grows "
        f"{last // first} times.",
    )


# Memory.

_TEMPORARIES = (
    "standard, forward", "jaxflash, forward", "standard, forward+backward",
    "jaxflash, forward+backward",
)  # fmt: skip


def attention_memory(found: Found) -> str:
    """What attention allocates, and the cache."""
    lines, curves = [], _curves(*_TEMPORARIES)
    for length in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        row = found.latest("footprint", table="temporaries", length=length)
        cache = found.latest("footprint", table="caches", length=length)
        temporary = row["temporary"] if row else {}
        for name, (x, y) in curves.items():
            if temporary.get(name):
                x.append(length)
                y.append(temporary[name] / 2**20)
        claim = seed.MEMORY.get(length)
        claimed = ("",) * 4
        if claim:
            claimed = (
                claim.attention_matrix, claim.kv_cache, claim.standard_total, claim.flash_total
            )  # fmt: skip
        lines.append(
            [
                str(length),
                format_bytes(row["matrix"]) if row else "-",
                *(format_bytes(temporary[n]) if n in temporary else "-" for n in _TEMPORARIES),
                format_bytes(cache["held"]) if cache else "-",
                *claimed,
            ]
        )
    headers = ["T", "a matrix of scores", *_TEMPORARIES, "KV cache"]
    claims = "Attention Matrix", "KV Cache", "Standard total", "Flash total"
    headers += [f"seed: {name}" for name in claims]
    return _section(
        "Memory: attention alone, batch 8, 32 heads, head dim 64",
        f"Compiled for {found.device} (`python -m bench footprint`), bfloat16: temporary memory "
        "beside inputs and outputs; the cache is the argument of a decode step.",
        markdown_table(headers, lines),
        _picture(found, "memory", "Temporary memory of attention", "MiB", curves),
        "The seed counts one T x T matrix for all heads and batch elements; there is one for each.",
    )


def model_memory(found: Found) -> str:
    """Llama 2 7B in inference and in training."""
    inference, training = [], []
    for length, claim in seed.LLAMA_INFERENCE_MEMORY.items():
        row = found.latest("footprint", table="inference", length=length)
        if row:
            peak = row["peak"]
            fits = [name for name in peak if peak[name] <= _SMALL_CARD.memory]
            inference.append(
                [
                    str(length), format_bytes(row["cache"]), *map(format_bytes, peak.values()),
                    format_bytes(peak["jaxflash"] - row["weights"]),
                    ", ".join(fits) or "none",
                    claim.standard, claim.flash, claim.fits,
                ]
            )  # fmt: skip
    for length, claim in seed.LLAMA_TRAINING_MEMORY.items():
        row = found.latest("footprint", table="training", length=length)
        if row:
            peak = row["peak"]
            saved = 1 - peak["jaxflash"] / peak["standard"]
            cells = [str(length), *map(format_bytes, peak.values()), f"{saved:.0%}"]
            training.append([*cells, claim.standard, claim.flash])
    if not inference or not training:
        return _section("Memory: Llama 2 7B", found.command("footprint"))
    return _section(
        "Memory: Llama 2 7B",
        f"Compiled for {found.device} (`python -m bench footprint`). Inference, bfloat16, batch 1: "
        "weights, cache, and a prefill of the whole context.",
        markdown_table(
            ["context", "cache", "standard", "jaxflash", "without weights",
             f"fits {_SMALL_CARD.description}", "seed: Standard", "seed: Flash", "seed: fits"],
            inference,
        ),
        "The weights alone are 12.6 GiB: the seed's figures below that cannot include them. At 32K "
        "the cache alone exceeds the seed's figure for all.",
        "Training at batch 4, AdamW with parameters, gradients and moments in bfloat16, blocks "
        "rematerialised but for attention:",
        markdown_table(
            ["length", "standard", "jaxflash", "less", "seed: Standard", "seed: Flash"], training
        ),
        "Parameters, gradients and moments in 16 bits are 50 GiB: the seed's figures cannot "
        "include them.",
    )  # fmt: skip


# Models.


def training_rates(found: Found) -> str:
    """Samples a second of Llama 2."""
    rows = found.rows.get("throughput")
    if not rows:
        return _section("Training: Llama 2", found.command("throughput"), _claims_of_training())
    lines = []
    wanted = [("llama-2-7b", *size, claim) for size, claim in seed.TRAINING.items()]
    wanted += [
        (name, 4, 2048, claim) for name, claim in seed.LLAMA_MODELS.items() if name != "llama-2-7b"
    ]
    for model, batch, length, claim in wanted:
        of_row = {
            name: found.latest(
                "throughput", model=model, batch=batch, length=length, attention=name
            )
            for name in ("standard", "cudnn", "jaxflash")
        }
        seconds = {n: _value(r, "seconds") for n, r in of_row.items()}
        rates = {n: batch / s if s else None for n, s in seconds.items()}
        ours = of_row["jaxflash"]
        share = ""
        if ours and ours["seconds"]:
            share = f"{ours['flops'] / ours['seconds'] / ours['product_tflops'] / 1e12:.0%}"
        how = "not run yet"
        if ours:
            how = "scaled" if len(ours["layers_measured"]) > 1 else "measured"
        lines.append(
            [
                model, f"{batch} x {length}", how,
                *map(_number, rates.values()), _ratio(rates["jaxflash"], rates["standard"]),
                _ratio(rates["jaxflash"], rates["cudnn"]), share,
                _number(claim.standard), _number(claim.flash),
            ]
        )  # fmt: skip
    headers = [
        "model", "batch x length", "", "standard", "cuDNN", "jaxflash", "/ standard", "/ cuDNN",
        "of product", "seed: Standard", "seed: Flash",
    ]  # fmt: skip
    return _section(
        "Training: Llama 2, samples a second",
        "`python -m bench throughput`; `scaled` rows name their layers there. Blocks are "
        "rematerialised, but for what jaxflash's attention gives, which has a name by which it can "
        "be kept; the others' is computed again.",
        markdown_table(headers, lines),
    )


def _claims_of_training() -> str:
    lines = [
        [f"{batch} x {length}", _number(claim.standard), _number(claim.flash)]
        for (batch, length), claim in seed.TRAINING.items()
    ]
    return markdown_table(["Llama 2 7B", "seed: Standard", "seed: Flash"], lines)


def generation_rates(found: Found) -> str:
    """Tokens a second."""
    wanted = [("llama-2-7b", n, claim) for n, claim in seed.GENERATION.items()]
    wanted += [(name, 1024, claim) for name, claim in seed.GPT_MODELS.items()]
    lines = []
    for model, context, claim in wanted:
        key = {"model": model, "context": context, "kind": "decode"}
        rows = [found.latest("generation", **key, attention=n) for n in ("standard", "jaxflash")]
        rates = [_value(row, "tokens_per_s") for row in rows]
        ours = rows[1]
        share = ""
        if ours and ours["tokens_per_s"]:
            share = f"{ours['tokens_per_s'] / ours['bound_tokens_per_s']:.0%}"
        ratio = _ratio(rates[1], rates[0])
        cells = [model, str(context), *map(_number, rates), ratio, share]
        lines.append([*cells, _number(claim.standard), _number(claim.flash)])
    headers = [
        "model", "context", "standard", "jaxflash", "ratio", "of the memory's bound",
        "seed: Standard", "seed: Flash",
    ]  # fmt: skip
    how = "Measured (`python -m bench generation`): decoding at batch 1, random weights."
    if "generation" not in found.rows:
        how = found.command("generation")
    return _section("Generation, tokens a second", how, markdown_table(headers, lines))


def serving_rates(found: Found) -> str:
    """Users and tokens a second in the same memory."""
    caches = "contiguous", "pages", IN_8_BITS
    rows = [found.latest("serving", cache=name) for name in caches]
    if rows[0] is None or rows[1] is None:
        return _section("Serving", found.command("serving"))
    lines = [
        [str(row["cache"]), str(row["slots"]), f"{row['users']:.1f}", _number(row["tokens_per_s"])]
        for row in rows
        if row
    ]
    return _section(
        "Serving: continuous batching in the same memory",
        markdown_table(["cache", "slots", "users", "tokens a second"], lines),
        f"{rows[1]['users'] / rows[0]['users']:.2f} times the users; the seed claims 2 to 3 times.",
    )


# Versions and features.


def versions(found: Found) -> str:
    """The seed's comparison of versions, as far as its columns exist here."""
    names = {"FA1": "fa1", "FA2": "jaxflash-triton", "FA3 (FP16)": "jaxflash-hopper"}
    rows = {
        version: found.latest("speed", **_measured(8, 4096), implementation=name)
        for version, name in names.items()
    }
    rows["FA3 (FP16)"] = rows["FA3 (FP16)"] or found.latest(
        "forward", problem="B8 T4096 N32/32 H64 full", implementation="jaxflash"
    )
    rows["FA3 (FP8)"] = found.latest(
        "fp8", problem="B8 T4096 N32/32 H64 full", implementation="jaxflash fp8", reason=None
    )
    lines = []
    for name, claim in seed.VERSIONS.items():
        row = rows.get(name)
        cells = ["-", "-"]
        if row and row["median_ms"]:
            cells = [_number(row["median_ms"]), f"{row['tflops']:.0f}"]
        claimed = [_number(claim.forward_ms), _number(claim.tflops), f"{claim.utilisation:.0%}"]
        lines.append([name, *cells, *claimed])
    headers = ["version", "ms", "TFLOP/s", "seed: ms", "seed: TFLOP/s", "seed: utilisation"]
    return _section(
        "Versions: H100, T 4096, batch 8, 32 heads, head dim 64",
        "FA3 (FP16) is `hopper` in bfloat16, FA2 is `triton`, FA1 the same with a program for each "
        "head; measured where there are figures (`python -m bench speed`, `python -m bench fp8`). "
        "FA3 (FP8) is `hopper` with arrays that were quantised before.",
        markdown_table(headers, lines),
    )


def features(found: Found) -> str:
    """What each backend accepts on the device: asked, not written down."""
    with as_if_on(found.device):
        lines = []
        for name, question in _FEATURES.items():
            refusals = question()
            answers = ("yes" if why is None else f"no: {why}" for why in refusals.values())
            lines.append([name, *answers])
    claims = [
        [name, *("yes" if has else "no" for has in versions)]
        for name, versions in seed.FEATURES.items()
    ]
    return _section(
        f"Features on {found.device}",
        "Generated: each backend was asked (`jaxflash.explain`).",
        markdown_table(["", *refusals], lines),
        "The seed's matrix:",
        markdown_table(["", "seed: FA1", "seed: FA2", "seed: FA3"], claims),
    )


def _asking(**options: Any) -> Callable[[], dict[str, str | None]]:
    shape = {"T": 256, "S": 256, "N": 8, "K": 8, "H": 128, "dtype": jnp.bfloat16}
    sizes = {name: options.pop(name, usual) for name, usual in shape.items()}

    def ask() -> dict[str, str | None]:
        q = jax.ShapeDtypeStruct((2, sizes["T"], sizes["N"], sizes["H"]), sizes["dtype"])
        k = jax.ShapeDtypeStruct((2, sizes["S"], sizes["K"], sizes["H"]), sizes["dtype"])
        return jaxflash.explain(q, k, k, **options).refusals

    return ask


def _struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


_FEATURES: dict[str, Callable[[], dict[str, str | None]]] = {
    "Basic attention": _asking(),
    "Causal masking": _asking(is_causal=True),
    "Multi-query attention": _asking(K=1),
    "Grouped queries": _asking(K=2),
    "Sliding window": _asking(local_window_size=(128, 0)),
    "Packed documents": _asking(
        query_segment_ids=_struct(2, 256, dtype=jnp.int32),
        key_value_segment_ids=_struct(2, 256, dtype=jnp.int32),
    ),
    "Any mask": _asking(mask=_struct(2, 1, 256, 256, dtype=jnp.bool_)),
    "Bias with gradient": _asking(bias=_struct(1, 8, 256, 256)),
    "Soft cap": _asking(logits_soft_cap=30.0),
    "ALiBi": _asking(alibi_slopes=_struct(8)),
    "Attention sinks": _asking(sinks=_struct(8)),
    "score_mod": _asking(score_mod=lambda score, b, h, q, k: score * 0.5),
    "Dropout": _asking(dropout_rate=0.1, dropout_key=jax.random.key_data(jax.random.key(0))),
    "Gradients in a fixed order": _asking(deterministic=True),
    "Head dim 256": _asking(H=256),
    "FP8 products": _asking(precision=FP8),
    "float16": _asking(dtype=jnp.float16),
    "float32": _asking(dtype=jnp.float32),
}


# Recommendations.


def recommendations(found: Found) -> str:
    """The seed's advice by use case, with the rows that speak for or against it."""
    parts = []
    forward = _forward_ms(found, 4096)
    if forward["jaxflash"] and forward["standard"]:
        ratio = forward["standard"] / forward["jaxflash"]
        parts.append(
            "**Training large models.** Use `jaxflash` on an H100: at T 4096 the forward of "
            f"attention takes {ratio:.0f} times less than the standard one's"
            + (f", and {forward['cuDNN'] / forward['jaxflash']:.2f} times less than cuDNN's"
               if forward["cuDNN"] else "")
            + ". What that is worth in a whole step is in the table of training."
        )  # fmt: skip
    row = found.latest("footprint", table="inference", length=16384)
    if row:
        standard, ours = row["peak"]["standard"], row["peak"]["jaxflash"]
        parts.append(
            "**Long contexts.** A prefill of 16K tokens of Llama 2 7B needs "
            f"{format_bytes(ours)} in place of {format_bytes(standard)}, the weights of "
            f"{format_bytes(row['weights'])} included."
        )
    short = _forward_ms(found, 512)
    if short["jaxflash"] and short["standard"]:
        parts.append(
            "**Short sequences.** At 512 tokens still worth it: "
            f"{short['standard'] / short['jaxflash']:.1f} times faster than the standard attention "
            "(the seed: 1.2 to 1.5 times)."
        )
    serving = [found.latest("serving", cache=name) for name in ("contiguous", "pages")]
    if serving[0] and serving[1]:
        parts.append(
            "**Many users.** A cache in pages holds "
            f"{serving[1]['users'] / serving[0]['users']:.1f} times as many users in the same "
            f"memory and gives {serving[1]['tokens_per_s'] / serving[0]['tokens_per_s']:.1f} "
            "times the tokens a second."
        )
    else:
        parts.append(f"**Many users.** No figure: {found.command('serving')}.")
    return _section("Recommendations", *parts)


SECTIONS: tuple[Callable[[Found], str], ...] = (
    forward_times,
    attention_memory,
    model_memory,
    per_token,
    training_rates,
    generation_rates,
    serving_rates,
    versions,
    features,
    recommendations,
)


def _value(row: Row | None, name: str) -> float | None:
    return None if row is None else row.get(name)


def _number(x: float | None, digits: int = 4) -> str:
    return "-" if x is None else f"{x:.{digits}g}"


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else "-"


def _kib(x: float | None) -> str:
    return "-" if x is None else f"{x / 1024:.1f}"


def _curves(*names: str) -> Curves:
    return {name: ([], []) for name in names}


def _picture(
    found: Found,
    name: str,
    title: str,
    y_label: str,
    curves: Curves,
) -> str:
    lines: Iterable[Line] = (Line(label, x, y) for label, (x, y) in curves.items() if x)
    path = found.plots / f"{name}.png"
    problem = results.save_plot(path, title, y_label, list(lines))
    return problem or f"![{title}]({path.parent.name}/{path.name})"
