"""Memory of attention and of models."""

from __future__ import annotations

from bench import seed
from bench.capacity import format_bytes
from bench.results import markdown_table
from bench.sections.found import SMALL_CARD, Found, new_curves, picture, section

_TEMPORARIES = (
    "standard, forward", "jaxflash, forward", "standard, forward+backward",
    "jaxflash, forward+backward",
)  # fmt: skip


def attention_memory(found: Found) -> str:
    """What attention allocates, and the cache."""
    lines, curves = [], new_curves(*_TEMPORARIES)
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
    return section(
        "Memory: attention alone, batch 8, 32 heads, head dim 64",
        f"Compiled for {found.device} (`python -m bench footprint`), bfloat16: temporary memory "
        "beside inputs and outputs; the cache is the argument of a decode step.",
        markdown_table(headers, lines),
        picture(found, "memory", "Temporary memory of attention", "MiB", curves),
        "The seed counts one T x T matrix for all heads and batch elements; there is one for each.",
    )


def model_memory(found: Found) -> str:
    """Llama 2 7B in inference and in training."""
    inference, training = [], []
    for length, claim in seed.LLAMA_INFERENCE_MEMORY.items():
        row = found.latest("footprint", table="inference", length=length)
        if row:
            peak = row["peak"]
            fits = [name for name in peak if peak[name] <= SMALL_CARD.memory]
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
        return section("Memory: Llama 2 7B", found.command("footprint"))
    return section(
        "Memory: Llama 2 7B",
        f"Compiled for {found.device} (`python -m bench footprint`). Inference, bfloat16, batch 1: "
        "weights, cache, and a prefill of the whole context.",
        markdown_table(
            ["context", "cache", "standard", "jaxflash", "without weights",
             f"fits {SMALL_CARD.description}", "seed: Standard", "seed: Flash", "seed: fits"],
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
