"""Which algorithm, feature or implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxflash
from bench import seed
from bench.capacity import format_bytes
from bench.gpus import as_if_on
from bench.results import markdown_table
from bench.sections.found import Found, number, section
from bench.sections.speed import forward_ms, label, measured
from pallas_kernels.spec.quantization import FP8


def versions(found: Found) -> str:
    """The seed's comparison of versions, as far as its columns exist here."""
    names = {"FA1": "fa1", "FA2": "jaxflash-triton", "FA3 (FP16)": "jaxflash-hopper"}
    rows = {
        version: found.latest("speed", **measured(8, 4096), implementation=name)
        for version, name in names.items()
    }
    rows["FA3 (FP16)"] = rows["FA3 (FP16)"] or found.latest(
        "forward", problem=label(4096), implementation="jaxflash"
    )
    rows["FA3 (FP8)"] = found.latest(
        "fp8", problem=label(4096), implementation="jaxflash fp8", reason=None
    )
    lines = []
    for name, claim in seed.VERSIONS.items():
        row = rows.get(name)
        cells = ["-", "-"]
        if row and row["median_ms"]:
            cells = [number(row["median_ms"]), f"{row['tflops']:.0f}"]
        claimed = [number(claim.forward_ms), number(claim.tflops), f"{claim.utilisation:.0%}"]
        lines.append([name, *cells, *claimed])
    headers = ["version", "ms", "TFLOP/s", "seed: ms", "seed: TFLOP/s", "seed: utilisation"]
    return section(
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
    return section(
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


def recommendations(found: Found) -> str:
    """The seed's advice by use case, with the rows that speak for or against it."""
    parts = []
    forward = forward_ms(found, 4096)
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
    short = forward_ms(found, 512)
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
    return section("Recommendations", *parts)
