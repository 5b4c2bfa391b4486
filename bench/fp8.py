"""The forward in 8-bit floating point, beside cuDNN's and beside this library's in bfloat16."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxflash
from bench import results
from bench.problems import Problem
from bench.shapes import INPUT_DISTRIBUTION, Shape, random_inputs
from bench.timing import Compiler, Program, Timing, device_clock, interleaved
from pallas_kernels.spec.quantization import DTYPE, FP8

SUMMARY = "The forward in 8-bit floating point, against cuDNN's, with and without quantising."
_CUDNN, _OURS, _WHOLE, _HALF = "cudnn fp8", "jaxflash fp8", "with quantising", "jaxflash bfloat16"
_ROWS = 128  # of a check, the last ones of the first batch element
_OF_P, _OF_OUTPUT = 256.0, 32.0  # by which cuDNN is told to multiply what it rounds
_ALLOWED = float(jnp.finfo(DTYPE).eps) / 2  # by how much a probability may be rounded


def shapes(*, tiny: bool) -> list[Shape]:
    """The seed's, full, and 16k tokens with 2048 features."""
    if tiny:
        return [Shape(1, 256, 256, 1, 1, 64)]
    of_seed = [Shape(8, t, t, 32, 32, 64) for t in (512, 1024, 2048, 4096, 8192)]
    return of_seed + [
        Shape(b, t, t, 2048 // h, 2048 // h, h, c)
        for h in (128, 256)
        for b, t in ((4, 4096), (1, 16384))
        for c in (False, True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the table; 1 when an answer was wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench fp8", description=SUMMARY)
    parser.add_argument("--tiny", action="store_true", help="a problem for trying the table out")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    compiler, clock = Compiler.for_device(device), device_clock(device)
    chosen = shapes(tiny=options.tiny)
    waiting = {shape: _submit(compiler, shape, device) for shape in chosen}
    footnotes, lines, records, is_wrong = results.Footnotes(), [], [], False
    for shape, submitted in waiting.items():
        arrays = _arrays(shape)
        expected = Program(submitted.pop("expected").result(), arrays["expected"])()
        programs, reasons = {}, {}
        for name, found in submitted.items():
            if isinstance(found, str):
                reasons[name] = found
                continue
            program = Program(found.result(), arrays[name])
            if reason := _fault(name, program(), expected):
                reasons[name], is_wrong = reason, True
            else:
                programs[name] = program
        timings = interleaved(programs, clock, warmup=1, repeats=options.repeats)
        lines.append(_line(shape, timings, reasons, footnotes))
        print(*lines[-1], sep="  ", flush=True)
        records += [_record(shape, name, timings.get(name), reasons.get(name)) for name in arrays]
    headers = ["", _CUDNN, _OURS, "ratio", _WHOLE, _HALF, "ratio of both"]
    sections = [
        "Each cell: median ms / TFLOP/s at 4*B*N*H operations for each visible pair. `ratio`: "
        "cuDNN's time over this library's, both of quantised arrays (cuDNN has one scale for all "
        "and returns 8 bits; this library one for each block of 128 tokens, and returns "
        "bfloat16); `ratio of both`: the time in bfloat16 over that in 8 bits with quantising.",
        results.markdown_table(headers, lines),
        footnotes.text(),
        f"Method: {clock.method}; implementations interleaved; inputs {INPUT_DISTRIBUTION}; the "
        f"last {_ROWS} rows of the first batch element checked in float32 before timing: a "
        f"relative error of {_ALLOWED:g} is allowed, by which e4m3 rounds probabilities.",
    ]
    origin = results.origin(device)
    report = results.Report("fp8", "", "Attention in FP8", sections, [r | origin for r in records])
    results.publish(report, device, options.out)
    return int(is_wrong)


def _submit(compiler: Compiler, shape: Shape, device: jax.Device) -> dict[str, Any]:
    """Programs on their way, or why there is none."""
    structs = jax.eval_shape(functools.partial(_arrays, shape))
    attend = functools.partial(jaxflash.dot_product_attention, is_causal=shape.is_causal)
    functions: dict[str, Callable[..., Any]] = {
        _OURS: attend,
        _WHOLE: functools.partial(attend, precision=FP8),
        _HALF: attend,
    }
    found: dict[str, Any] = {}
    for name, function in functions.items():
        # Quantised arrays are no arguments that another process could export.
        submit = compiler.submit if name == _OURS else compiler.submit_apart
        found[name] = submit(function, *structs[name])
    if device.platform == "gpu":
        found[_CUDNN] = compiler.submit(functools.partial(_cudnn, shape), *structs[_CUDNN])
    else:
        found[_CUDNN] = "cuDNN runs on NVIDIA GPUs"
    expected = functools.partial(_expected, shape)
    waiting = compiler.submit_apart(expected, *structs["expected"], is_timed=False)
    return found | {"expected": waiting}


def _arrays(shape: Shape) -> dict[str, tuple[Any, ...]]:
    """What each implementation is given."""
    query, key, value = random_inputs(shape, "forward")
    quantized = [jaxflash.quantize(x, is_value=x is value) for x in (query, key, value)]
    return {
        _CUDNN: tuple(x.astype(DTYPE) for x in (query, key, value)),
        _OURS: tuple(quantized),
        _WHOLE: (query, key, value),
        _HALF: (query, key, value),
        "expected": (query, key, value),
    }


def _expected(shape: Shape, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The last rows of the first batch element, in float32."""
    rows = slice(max(0, shape.query_length - _ROWS), None)
    return jaxflash.dot_product_attention(
        query[:1, rows].astype(jnp.float32),
        key[:1].astype(jnp.float32),
        value[:1].astype(jnp.float32),
        is_causal=shape.is_causal,
        query_offset=rows.start,
        precision="highest",
        implementation="xla",
    )


def _cudnn(shape: Shape, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """JAX's own call of it, which has no public name."""
    calls: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    masks = calls.MaskType
    scales = dict.fromkeys(calls.fp8_params_keys, 1.0)
    scales |= {"scale_s": _OF_P, "descale_s": 1 / _OF_P, "scale_o": _OF_OUTPUT}
    out: jax.Array = calls.dot_product_attention(
        query,
        key,
        value,
        fp8_params={name: jnp.full((1, 1, 1, 1), x) for name, x in scales.items()},
        scale=shape.head_dim**-0.5,
        mask_type=masks.CAUSAL if shape.is_causal else masks.NO_MASK,
        use_fp8=True,
    )[0]
    return out


def _fault(name: str, found: jax.Array, expected: jax.Array) -> str | None:
    """What is wrong with an answer; cuDNN's is rounded to 8 bits."""
    got = np.asarray(found[:1, -expected.shape[1] :].astype(jnp.float32))
    got = got / (_OF_OUTPUT if name == _CUDNN else 1)
    want = np.asarray(expected)
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    allowed = 2 * _ALLOWED if name == _CUDNN else _ALLOWED
    return None if error <= allowed else f"wrong: relative error {error:.2e}, allowed {allowed:.2e}"


def _line(
    shape: Shape,
    timings: dict[str, Timing],
    reasons: dict[str, str],
    footnotes: results.Footnotes,
) -> list[str]:
    flops = Problem(shape).flops

    def cell(name: str) -> str:
        if name not in timings:
            return footnotes.empty_cell(reasons[name])
        ms = timings[name].median_ms
        return f"{ms:.4g} / {flops / ms / 1e9:.0f}"

    def ratio(name: str, other: str) -> str:
        if not {name, other} <= timings.keys():
            return ""
        return f"{timings[name].median_ms / timings[other].median_ms:.3f}"

    of_cudnn, of_half = ratio(_CUDNN, _OURS), ratio(_HALF, _WHOLE)
    label = Problem(shape).label
    return [label, cell(_CUDNN), cell(_OURS), of_cudnn, cell(_WHOLE), cell(_HALF), of_half]


def _record(shape: Shape, name: str, timing: Timing | None, reason: str | None) -> dict[str, Any]:
    problem = Problem(shape)
    row: dict[str, Any] = {
        "problem": problem.label,
        "implementation": name,
        "reason": reason,
        "flops": problem.flops,
    }
    if timing is not None:
        row |= timing.record() | {"tflops": problem.flops / timing.median_ms / 1e9}
    return row
