"""How far attention is from float64, by precision, on normal inputs and on inputs with outliers."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxflash
from bench import results
from pallas_kernels.spec import narrow
from pallas_kernels.spec.quantization import FP8

SUMMARY = "Root mean square error against float64: bfloat16, FP8 by its scales, rotated."
_RATE, _SIGMA = 0.001, 10.0  # of outliers
_PAGE = 64  # tokens
_BASE = "FP8, a scale for the tensor"


def inputs(shape: tuple[int, ...], *, outliers: bool) -> tuple[np.ndarray, ...]:
    """Query, key and value, rounded to bfloat16, which all implementations are given."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(3):
        x = rng.standard_normal(shape)
        if outliers:
            x += (rng.random(shape) < _RATE) * rng.normal(0, _SIGMA, shape)
        found.append(x.astype(jnp.bfloat16))
    return tuple(found)


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attention in float64, a head after the other."""
    out = np.empty(query.shape)
    for at in np.ndindex(query.shape[0], query.shape[2]):
        q, k, v = (x[at[0], :, at[1]].astype(np.float64) for x in (query, key, value))
        s = q @ k.T * q.shape[1] ** -0.5
        p = np.exp(s - s.max(axis=1, keepdims=True))
        out[at[0], :, at[1]] = p @ v / p.sum(axis=1, keepdims=True)
    return out


def implementations() -> dict[str, Callable[..., jax.Array]]:
    """By what a row of the table says."""

    def quantized(q: Any, k: Any, v: Any, *, per: Any, rotate: bool = False) -> jax.Array:
        q, k = (jaxflash.quantize(x, per=per, rotate=rotate) for x in (q, k))
        return jaxflash.dot_product_attention(q, k, jaxflash.quantize(v, per=per, is_value=True))

    def from_pages(q: Any, k: Any, v: Any, *, dtype: Any) -> jax.Array:
        B, T, N, H = k.shape
        pages = np.arange(B * T // _PAGE, dtype=np.int32).reshape(B, -1)
        cache = jaxflash.PagedKVCache.zeros(
            pages.size, _PAGE, N, H, batch=B, max_pages=pages.shape[1], dtype=dtype
        )
        held = cache.with_tables(pages).append(k, v).gather()
        return jaxflash.dot_product_attention(q, *(x.astype(q.dtype) for x in held))

    return {
        "standard, bfloat16": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
        "jaxflash, bfloat16": jaxflash.dot_product_attention,
        _BASE: functools.partial(quantized, per="tensor"),
        "FP8, a scale for each head": functools.partial(quantized, per="head"),
        'FP8, a scale for each block: `precision="fp8"`': functools.partial(
            jaxflash.dot_product_attention, precision=FP8
        ),
        "FP8, a scale for each block, rotated": functools.partial(
            quantized, per="block", rotate=True
        ),
        **{
            f"bfloat16, keys and values from pages of {dtype}": functools.partial(
                from_pages, dtype=dtype
            )
            for dtype in narrow.DTYPES
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Computes, prints and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=SUMMARY)
    parser.add_argument("--tiny", action="store_true", help="a problem for trying the table out")
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    shape = (1, 256, 1, 64) if options.tiny else (1, 4096, 4, 128)
    errors: dict[str, list[float]] = {name: [] for name in implementations()}
    for outliers in (False, True):
        arrays = inputs(shape, outliers=outliers)
        truth = exact(*arrays)
        for name, function in implementations().items():
            out = np.asarray(jax.jit(function)(*arrays).astype(jnp.float32), np.float64)
            errors[name].append(float(np.sqrt(np.mean((out - truth) ** 2))))
    lines = []
    for name, found in errors.items():
        pairs = zip(found, errors[_BASE], strict=True)
        cells = [(f"{error:.2e}", f"{base / error:.2f}") for error, base in pairs]
        lines.append([name, *cells[0], *cells[1]])
    runs = jaxflash.explain(*(jax.ShapeDtypeStruct(shape, "bfloat16"),) * 3, precision=FP8).runs
    B, T, N, H = shape
    better = "better than a scale for the tensor"
    sections = [
        f"Root mean square error of B{B} T{T} N{N} H{H} against float64. Inputs are normal(0, 1); "
        f"with outliers, {_RATE:.1%} of them have a normal(0, {_SIGMA:g}) added, as in "
        "FlashAttention-3, section 4.3.",
        results.markdown_table(["", "normal", better, "with outliers", better], lines),
        f'8-bit products by the "{runs}" backend.',
    ]
    if runs == "xla":
        sections.append("It rounds query, key and value as FP8 does, but no probabilities.")
    rows = [
        {"implementation": name, "rmse_normal": a, "rmse_outliers": b, "backend": runs}
        | results.origin(device)
        for name, (a, b) in errors.items()
    ]
    report = results.Report("accuracy", "", "Accuracy by precision", sections, rows)
    results.publish(report, device, options.out)
    return 0
