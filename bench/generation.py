"""Tokens a second of real models: decoding at batch 1, against the memory's speed, and prefill."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench import cli, decode, results, seed
from bench.models.config import MODELS, Config
from bench.models.generate import Caches, Model, contiguous_caches, random_model, structure_of
from bench.models.generate import decode as decode_steps
from bench.models.generate import prefill as prefill_step
from bench.throughput import attention_of

SUMMARY = "Tokens a second in generation: Llama 2 7B by context, GPT-2, GPT-J and GPT-NeoX."
_STEPS, _RUNS = 128, 3
_TINY = Config("tiny", 64, 32, 2, 4, 48, positions=4096)


class Problem(NamedTuple):
    """A model at the end of a context, and what the seed document claims of it."""

    config: Config
    context: int
    claim: seed.RateClaim | None

    @property
    def label(self) -> str:
        return f"{self.config.name}, {self.context}"

    @property
    def bytes_per_token(self) -> int:
        """Weights, but for the rows of embeddings that are not looked up, and the cache."""
        c = self.config
        unread = 0 if c.is_tied else c.vocabulary * c.width
        unread += max(0, c.positions - 1) * c.width
        return 2 * (c.weights - unread) + c.kv_bytes_per_token * self.context


def problems(*, tiny: bool) -> list[Problem]:
    """The seed's rows."""
    if tiny:
        return [Problem(_TINY, 512, None)]
    llama = [Problem(MODELS["llama-2-7b"], n, claim) for n, claim in seed.GENERATION.items()]
    return llama + [Problem(MODELS[name], 1024, claim) for name, claim in seed.GPT_MODELS.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, prints and writes the table."""
    parser = cli.model_parser("generation", SUMMARY)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows that contain a word")
    parser.add_argument("--attention", nargs="+", help="default: ours and jax.nn's")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    names = options.attention or ["jaxflash", "standard"]
    read = decode.ceilings(device)["read"]
    footnotes, lines, records = results.Footnotes(), [], []
    model: Model | None = None
    held = ""
    for p in problems(tiny=options.tiny):
        if options.only and not any(word in p.label for word in options.only):
            continue
        if p.config.name != held:
            model = None  # before the next one takes its place
            model, held = random_model(p.config, None, packed=True), p.config.name
        assert model is not None
        rates, reasons = {}, {}
        for name in names:
            structure = structure_of(p.config, attention_of(name), packed=True)
            own = Model(structure, model.parameters)
            for kind, measure in (("decode", decoding), ("prefill", prefilling)):
                try:
                    rates[name, kind] = measure(own, p)
                except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
                    reasons[name, kind] = results.first_line(error)[:200]
        bound = read * 1e12 / p.bytes_per_token
        lines.append(_line(p, names, rates, reasons, bound, footnotes))
        print(" | ".join(lines[-1]), flush=True)
        records += [
            {
                "model": p.config.name,
                "context": p.context,
                "attention": name,
                "kind": kind,
                "is_packed": True,
                "tokens_per_s": rates.get((name, kind)),
                "reason": reasons.get((name, kind)),
                "bound_tokens_per_s": bound,
                "read_tbps": read,
            }
            for name in names
            for kind in ("decode", "prefill")
        ]
    headers = [
        "model, context",
        *(f"decode, {n}" for n in names),
        "bound",
        "of bound",
        "/ standard",
    ]
    headers += [f"prefill, {n}" for n in names] + ["seed: Standard", "seed: Flash"]
    sections = [
        "Tokens a second, batch 1, bfloat16, random weights, matrices packed for decoding, the "
        f"median of {_RUNS} runs. Decoding: {_STEPS} tokens up to the context, one program. "
        f"`bound`: weights and cache read once a token at {read:.2f} TB/s, the rate of reading an "
        "array in the same run. Prefill: the whole context at once.",
        results.markdown_table(headers, lines),
        footnotes.text(),
    ]
    origin = results.origin(device)
    variant = results.part(options.only)
    report = results.Report(
        "generation", variant, "Generation", sections, [r | origin for r in records]
    )
    results.publish(report, device, options.out)
    return 0


def decoding(model: Model, p: Problem) -> float:
    """Tokens a second, up to the context: the median of some runs."""
    caches = _filled(p)
    logits = jnp.zeros((1, p.config.vocabulary), jnp.float32)
    seconds = []
    for _ in range(1 + _RUNS):  # the first compiles
        caches = jax.block_until_ready(_holding(caches, p.context - _STEPS))
        start = time.perf_counter()
        tokens, logits, caches = jax.block_until_ready(
            decode_steps(*model, caches, logits, jax.random.key(0), _STEPS)
        )
        seconds.append(time.perf_counter() - start)
    assert tokens.shape == (1, _STEPS)
    return _STEPS / statistics.median(seconds[1:])


def prefilling(model: Model, p: Problem) -> float:
    """Tokens a second of a prompt as long as the context."""
    prompt = jnp.zeros((1, p.context), jnp.int32)
    counts = jnp.array([p.context], jnp.int32)
    seconds = []
    for _ in range(1 + _RUNS):
        caches = contiguous_caches(p.config, 1, p.context)
        jax.block_until_ready(caches)
        start = time.perf_counter()
        jax.block_until_ready(prefill_step(*model, caches, prompt, counts))
        seconds.append(time.perf_counter() - start)
    return p.context / statistics.median(seconds[1:])


def _filled(p: Problem) -> Caches:
    """Caches of random tokens, on which what decoding costs does not depend; none counts yet."""

    def fill(cache: Any, seed: int) -> Any:
        keys = jax.random.split(jax.random.key(seed, impl="rbg"))
        key, value = (
            jax.random.normal(k, x.shape, x.dtype)
            for k, x in zip(keys, (cache.key, cache.value), strict=True)
        )
        return dataclasses.replace(cache, key=key, value=value)

    empty = contiguous_caches(p.config, 1, p.context)
    return tuple(jax.jit(fill)(cache, i) for i, cache in enumerate(empty))


def _holding(caches: Caches, tokens: int) -> Caches:
    """The same, of which so many tokens count: arrays of their own, since they are donated."""
    return tuple(dataclasses.replace(x, lengths=jnp.full(1, tokens, jnp.int32)) for x in caches)


def _line(
    p: Problem,
    names: Sequence[str],
    rates: dict[tuple[str, str], float],
    reasons: dict[tuple[str, str], str],
    bound: float,
    footnotes: results.Footnotes,
) -> list[str]:
    def rate(name: str, kind: str) -> str:
        if (name, kind) in rates:
            return f"{rates[name, kind]:.4g}"
        return footnotes.empty_cell(reasons[name, kind])

    ours, standard = (rates.get((name, "decode")) for name in (names[0], "standard"))
    claimed = ["", ""] if p.claim is None else p.claim.cells()
    return [
        p.label,
        *(rate(name, "decode") for name in names),
        f"{bound:.4g}",
        f"{ours / bound:.1%}" if ours else "",
        f"{ours / standard:.2f}" if ours and standard else "",
        *(rate(name, "prefill") for name in names),
        *claimed,
    ]
