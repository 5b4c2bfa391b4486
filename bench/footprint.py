"""Memory of caches, of attention, and of Llama 2 7B, compiled for a GPU that need not be here.

Whole programs are compiled, a prefill of the whole context and a training step, with caches and
parameters donated; the compiler says how much memory each takes. Nothing is run.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxflash
from bench import aot, results, seed
from bench.capacity import format_bytes
from bench.gpus import GPUS, MIB
from bench.models import training
from bench.models.config import MODELS
from bench.models.decoder import Decoder
from bench.models.generate import contiguous_caches, structure_of
from bench.shapes import DIRECTIONS, Shape, score_matrix_bytes
from jaxflash.api import Implementation

SUMMARY = "Memory of caches, and of Llama 2 7B in inference and training, by the compiler."
_SMALL_CARD = GPUS["a10g"]  # the 24 GB card
_CONFIG = MODELS["llama-2-7b"]
_LONGEST = 16384  # of attention alone


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints and writes the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench footprint", description=SUMMARY)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--only", nargs="+", choices=_TABLES)
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    if reason := aot.missing_packages():
        print(reason, file=sys.stderr)
        return 1
    gpu = GPUS[options.gpu]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # that a program would not fit is a result
    sections = [
        "Peak memory of compiled programs, arguments and results included (memory_analysis). "
        f'`jaxflash` is its backend `{_ours(options.gpu)}`; `standard` is jax.nn, "xla".'
    ]
    records: list[dict[str, Any]] = []
    for name in options.only or _TABLES:
        table, rows = _TABLES[name](options.gpu)
        print(table, flush=True)
        sections.append(table)
        records += [
            {"table": name, "gpu": gpu.description, "jax": jax.__version__} | r for r in rows
        ]
    title = f"Memory, compiled for {gpu.description}"
    origin = f"Compiled for {gpu.description} by JAX {jax.__version__}; nothing was run."
    results.write(
        results.Report("footprint", results.part(options.only), title, sections, records),
        results.slug(gpu.description),
        origin,
        options.out,
    )
    return 0


def _ours(gpu: str) -> Implementation:
    return "hopper" if GPUS[gpu].capability == (9, 0) else "triton"


Table = tuple[str, list[dict[str, Any]]]  # markdown, rows


def of_caches(gpu: str) -> Table:
    """A cache of 8 sequences, 32 heads of 64, and what a decode step takes beside it."""
    lines, records = [], []
    B, N, H = seed.MEMORY_BATCH, seed.HEADS, seed.HEAD_DIM
    for length in (512, 2048, 8192, 32768):
        make = functools.partial(jaxflash.KVCache.zeros, B, length, N, H, dtype=jnp.bfloat16)
        cache = jax.eval_shape(make)
        query = jax.ShapeDtypeStruct((B, 1, N, H), jnp.bfloat16)

        def step(query: jax.Array, cache: Any) -> jax.Array:
            return jaxflash.decode_attention(
                query, cache.key, cache.value, cache.lengths, implementation=_ours(gpu)
            )

        program = aot.compile_for(step, query, cache, gpu=gpu)
        counted = 2 * B * length * N * H * 2
        held = program.argument_bytes - query.size * 2
        claim = seed.MEMORY[length]
        lines.append(
            [
                str(length),
                format_bytes(counted),
                format_bytes(held),
                format_bytes(program.temp_bytes),
                claim.kv_cache,
                claim.flash_total,
            ]
        )
        records.append(
            {"length": length, "counted": counted, "held": held, "temporary": program.temp_bytes}
        )
    headers = [
        "T",
        "by formula",
        "cache",
        "a decode step's own",
        "seed: KV Cache",
        "seed: Total",
    ]
    title = f"### KV cache: batch {B}, {N} heads, head dim {H}, bfloat16"
    return f"{title}\n\n{results.markdown_table(headers, lines)}", records


def of_temporaries(gpu: str) -> Table:
    """What attention alone allocates beside its inputs and outputs."""
    lines, records = [], []
    B, N, H = seed.MEMORY_BATCH, seed.HEADS, seed.HEAD_DIM
    both = {"standard": aot.standard_attention, "jaxflash": _attention(gpu)}
    for length in (512, 1024, 2048, 4096, 8192, 16384, 32768):
        shape = Shape(B, length, length, N, N, H)
        found = {
            f"{name}, {direction}": aot.temp_bytes(attention, shape, direction, gpu)
            for direction in DIRECTIONS
            for name, attention in both.items()
        }
        matrix = score_matrix_bytes(shape)
        lines.append([str(length), format_bytes(matrix), *map(format_bytes, found.values())])
        records.append({"length": length, "matrix": matrix, "temporary": found})
    title = f"### Temporary memory of attention: batch {B}, {N} heads, head dim {H}, bfloat16"
    headers = ["T", "a matrix of scores", *found]
    return f"{title}\n\n{results.markdown_table(headers, lines)}", records


def of_attention(gpu: str) -> Table:
    """The forward of attention alone, per token."""
    lines, records = [], []
    for length in (512, 1024, 2048, 4096, 8192, _LONGEST):
        shape = Shape(1, length, length, seed.HEADS, seed.HEADS, seed.HEAD_DIM)
        found = {}
        both = {"standard": aot.standard_attention, "jaxflash": _attention(gpu)}
        for name, attention in both.items():
            function = functools.partial(attention, is_causal=False)
            program = aot.compile_for(function, *shape.structs(), gpu=gpu)
            total = program.argument_bytes + program.output_bytes + program.temp_bytes
            found[name] = total / length
        claim = seed.PER_TOKEN[length]
        cells = [f"{x / MIB:.4f}" for x in found.values()]
        lines.append([str(length), *cells, str(claim.standard_mb), str(claim.flash_mb)])
        records.append({"length": length, "bytes_per_token": found})
    headers = ["T", "standard", "jaxflash", "seed: Standard", "seed: Flash Attn 2"]
    title = (
        f"### MiB a token of attention alone: batch 1, {seed.HEADS} heads, head dim "
        f"{seed.HEAD_DIM}, bfloat16, forward; query, key, value and output included"
    )
    return f"{title}\n\n{results.markdown_table(headers, lines)}", records


def _attention(gpu: str) -> Callable[..., jax.Array]:
    def attention(*operands: jax.Array, is_causal: bool) -> jax.Array:
        return jaxflash.dot_product_attention(
            *operands, is_causal=is_causal, implementation=_ours(gpu)
        )

    return attention


def of_inference(gpu: str) -> Table:
    """A prefill of the whole context, with weights and cache."""
    lines, records = [], []
    weights = _CONFIG.weights * 2
    for length, claim in seed.LLAMA_INFERENCE_MEMORY.items():
        peaks = {
            name: _prefill_bytes(attention, length, gpu)
            for name, attention in (("standard", "standard"), ("jaxflash", _ours(gpu)))
        }
        cache = _CONFIG.kv_bytes_per_token * length
        fits = [name for name, peak in peaks.items() if peak <= _SMALL_CARD.memory]
        lines.append(
            [
                str(length),
                format_bytes(cache),
                *map(format_bytes, peaks.values()),
                format_bytes(peaks["jaxflash"] - weights),
                ", ".join(fits) or "none",
                claim.standard,
                claim.flash,
                claim.fits,
            ]
        )
        records.append({"length": length, "cache": cache, "weights": weights, "peak": peaks})
    small = f"fits {_SMALL_CARD.description}"
    claimed = ["seed: Standard", "seed: Flash", "seed: fits"]
    headers = ["context", "cache", "standard", "jaxflash", "without weights", small, *claimed]
    title = (
        f"### Llama 2 7B, inference, bfloat16, batch 1; its weights are {format_bytes(weights)}, "
        "so the seed's figures cannot include them"
    )
    return f"{title}\n\n{results.markdown_table(headers, lines)}", records


def _prefill_bytes(attention: Any, length: int, gpu: str) -> int:
    structure = structure_of(_CONFIG, attention)
    parameters = jax.eval_shape(
        lambda: nnx.state(Decoder(_CONFIG, attention=attention, rngs=nnx.Rngs(0)))
    )
    caches = jax.eval_shape(lambda: contiguous_caches(_CONFIG, 1, length))

    def prefill(parameters: Any, caches: Any, tokens: jax.Array) -> Any:
        return nnx.merge(structure, parameters).extend(tokens, caches)

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return aot.compile_for(prefill, parameters, caches, tokens, gpu=gpu, donated=(1,)).peak_bytes


def of_training(gpu: str) -> Table:
    """A training step: AdamW, everything in bfloat16, blocks rematerialised but for attention."""
    lines, records = [], []
    batch = seed.LLAMA_TRAINING_BATCH
    for length, claim in seed.LLAMA_TRAINING_MEMORY.items():
        peaks = {
            name: _training_bytes(attention, batch, length, gpu)
            for name, attention in (("standard", "standard"), ("jaxflash", _ours(gpu)))
        }
        cells = map(format_bytes, peaks.values())
        lines.append([str(length), *cells, claim.standard, claim.flash])
        records.append({"length": length, "peak": peaks})
    headers = ["length", "standard", "jaxflash", "seed: Standard", "seed: Flash"]
    state = format_bytes(3 * _CONFIG.weights * 2)
    title = (
        f"### Llama 2 7B, training, batch {batch}, AdamW in bfloat16; parameters and moments alone "
        f"are {state}, gradients {format_bytes(_CONFIG.weights * 2)} more"
    )
    return f"{title}\n\n{results.markdown_table(headers, lines)}", records


def _training_bytes(attention: Any, batch: int, length: int, gpu: str) -> int:
    setup = training.trainer(_CONFIG, attention)
    state = jax.eval_shape(lambda: training.initial(_CONFIG, setup))
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)

    def step(state: training.State, tokens: jax.Array) -> Any:
        return training.step(setup, state, tokens)

    return aot.compile_for(step, state, tokens, gpu=gpu, donated=(0,)).peak_bytes


_TABLES: dict[str, Callable[[str], Table]] = {
    "caches": of_caches,
    "temporaries": of_temporaries,
    "attention": of_attention,
    "inference": of_inference,
    "training": of_training,
}
