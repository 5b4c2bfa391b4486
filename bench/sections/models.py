"""Rates of training, generation and serving."""

from __future__ import annotations

from bench import seed
from bench.results import markdown_table
from bench.sections.found import Found, number, number_or_reason, quotient, section, value
from bench.serving import IN_8_BITS


def training_rates(found: Found) -> str:
    """Samples a second of Llama 2."""
    rows = found.rows.get("throughput")
    if not rows:
        return section("Training: Llama 2", found.command("throughput"), _claims_of_training())
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
        seconds = {n: value(r, "seconds") for n, r in of_row.items()}
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
                *(number_or_reason(of_row[n], rate) for n, rate in rates.items()),
                quotient(rates["jaxflash"], rates["standard"]),
                quotient(rates["jaxflash"], rates["cudnn"]), share,
                number(claim.standard), number(claim.flash),
            ]
        )  # fmt: skip
    headers = [
        "model", "batch x length", "", "standard", "cuDNN", "jaxflash", "/ standard", "/ cuDNN",
        "of product", "seed: Standard", "seed: Flash",
    ]  # fmt: skip
    return section(
        "Training: Llama 2, samples a second",
        "`python -m bench throughput`; `scaled` rows name their layers there. Blocks are "
        "rematerialised, but for what jaxflash's attention gives, which has a name by which it can "
        "be kept; the others' is computed again.",
        markdown_table(headers, lines),
    )


def _claims_of_training() -> str:
    lines = [
        [f"{batch} x {length}", number(claim.standard), number(claim.flash)]
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
        rates = [value(row, "tokens_per_s") for row in rows]
        ours = rows[1]
        share = ""
        if ours and ours["tokens_per_s"]:
            share = f"{ours['tokens_per_s'] / ours['bound_tokens_per_s']:.0%}"
        ratio = quotient(rates[1], rates[0])
        matrices = ("packed" if ours.get("is_packed") else "as trained") if ours else ""
        cells = [model, str(context), matrices, *map(number, rates), ratio, share]
        lines.append([*cells, number(claim.standard), number(claim.flash)])
    headers = [
        "model", "context", "matrices", "standard", "jaxflash", "ratio", "of the memory's bound",
        "seed: Standard", "seed: Flash",
    ]  # fmt: skip
    how = (
        "Measured (`python -m bench generation`): decoding at batch 1, random weights. Packed "
        "matrices are turned, and those of one input are one, for both kinds of attention "
        "([packing](models/packing.py))."
    )
    if "generation" not in found.rows:
        how = found.command("generation")
    return section("Generation, tokens a second", how, markdown_table(headers, lines))


def serving_rates(found: Found) -> str:
    """Users and tokens a second in the same memory."""
    caches = "contiguous", "pages", IN_8_BITS
    rows = [found.latest("serving", cache=name) for name in caches]
    if rows[0] is None or rows[1] is None:
        return section("Serving", found.command("serving"))
    lines = [
        [str(row["cache"]), str(row["slots"]), f"{row['users']:.1f}", number(row["tokens_per_s"])]
        for row in rows
        if row
    ]
    return section(
        "Serving: continuous batching in the same memory",
        markdown_table(["cache", "slots", "users", "tokens a second"], lines),
        f"{rows[1]['users'] / rows[0]['users']:.2f} times the users; the seed claims 2 to 3 times.",
    )
