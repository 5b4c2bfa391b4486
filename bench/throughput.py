"""Training throughput of real models: samples a second by attention, beside the seed's claims."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench import cli, results, seed
from bench.models import training
from bench.models.config import MODELS, Config
from bench.models.decoder import Attention
from bench.timing import Compiler, Program, device_clock, interleaved

SUMMARY = "Samples a second in training: Llama 2 by batch and length, 13B and 70B from few layers."
_STEPS = 3  # that are timed, after one that is not
_SIDE = 8192  # of the product that utilisation refers to
_TINY = Config("tiny", 64, 32, 4, 4, 48)


class Problem(NamedTuple):
    """A training step, and what the seed document claims of it."""

    config: Config
    batch: int
    length: int
    claim: seed.RateClaim | None
    layers: tuple[int, ...]  # that are measured: all, or two numbers from which the rest follows

    @property
    def label(self) -> str:
        return f"{self.config.name}, {self.batch} x {self.length}"

    def cut(self, layers: int) -> Config:
        """The model with so many layers."""
        return dataclasses.replace(self.config, layers=layers)

    def scaled(self, seconds: Sequence[float]) -> float:
        """Seconds of all layers, from those of the layers measured."""
        if len(self.layers) == 1:
            return seconds[0]
        (few, many), (short, long) = self.layers, seconds
        return short + (self.config.layers - few) * (long - short) / (many - few)

    @property
    def flops(self) -> float:
        return self.config.flops(self.batch, self.length, with_gradients=True)


def problems(*, tiny: bool) -> list[Problem]:
    """The seed's rows."""
    if tiny:
        return [Problem(_TINY, 2, 16, None, (4,)), Problem(_TINY, 2, 16, None, (1, 2))]
    whole = MODELS["llama-2-7b"]
    rows = [
        Problem(whole, batch, length, claim, (whole.layers,))
        for (batch, length), claim in seed.TRAINING.items()
    ]
    for name, layers in (("llama-2-13b", (4, 12)), ("llama-2-70b", (1, 4))):
        rows.append(Problem(MODELS[name], 4, 2048, seed.LLAMA_MODELS[name], layers))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles everything, then runs it; prints and writes the table."""
    parser = cli.model_parser("throughput", SUMMARY)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows that contain a word")
    parser.add_argument("--attention", nargs="+", help="default: ours and jax.nn's")
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    names = options.attention or (
        ["jaxflash", "cudnn", "standard"] if on_gpu else ["jaxflash", "standard"]
    )
    rows = [
        p for p in problems(tiny=options.tiny)
        if not options.only or any(word in p.label for word in options.only)
    ]  # fmt: skip
    peak = product_tflops(device, _SIDE if on_gpu else 256)
    compiler = Compiler()
    waiting: dict[Any, futures.Future[jax.stages.Compiled]] = {}
    starts: dict[Config, futures.Future[jax.stages.Compiled]] = {}
    refused: dict[Any, str] = {}
    for p in rows:
        for config in map(p.cut, p.layers):
            if config not in starts:  # parameters are the same whatever the attention
                starts[config] = compiler.submit(_start(config), is_timed=False)
        for name in names:
            try:
                for layers in p.layers:
                    waiting[p, name, layers] = _submit(compiler, p, name, layers)
            except (ValueError, NotImplementedError) as error:
                refused[p, name] = results.first_line(error)
    footnotes, lines, records = results.Footnotes(), [], []
    for p in rows:
        seconds: dict[str, float] = {}
        reasons = {name: refused[p, name] for name in names if (p, name) in refused}
        for name in names:
            if name in reasons:
                continue
            try:
                parts = [
                    _seconds(p, starts[p.cut(n)].result(), waiting.pop((p, name, n)).result())
                    for n in p.layers
                ]
                seconds[name] = p.scaled(parts)
            except jax.errors.JaxRuntimeError as error:
                reasons[name] = results.first_line(error)[:200]
        lines.append(_line(p, names, seconds, reasons, peak, footnotes))
        print(" | ".join(lines[-1]), flush=True)
        records += _records(p, names, seconds, reasons, peak)
    headers = ["", *names, "/ standard", "/ cudnn", "of product", "seed: Standard", "seed: Flash"]
    sections = [
        "Samples a second of a training step: AdamW, parameters, gradients and moments in "
        "bfloat16, blocks rematerialised, but for what jaxflash's attention gives: cuDNN's and the "
        "standard one's has no name by which it could be kept, and is computed again. Models that "
        "do not fit are scaled from steps with the layers named. `of product`: matrix products of "
        "the model (attention counts what is visible) by the rate of a product of side "
        f"{_SIDE} in the same run, {peak:.0f} TFLOP/s.",
        results.markdown_table(headers, lines),
        footnotes.text(),
    ]
    origin = results.origin(device)
    report = results.Report(
        "throughput",
        results.part(options.only),
        "Training throughput",
        sections,
        [r | origin for r in records],
    )
    results.publish(report, device, options.out)
    return 0


def product_tflops(device: jax.Device, side: int) -> float:
    """The rate of a square product in bfloat16."""
    x = jnp.ones((side, side), jnp.bfloat16)
    program = Program(jax.jit(jnp.matmul).lower(x, x).compile(), (x, x))
    timing = interleaved({"product": program}, device_clock(device), repeats=5)["product"]
    return 2 * side**3 / timing.median_ms / 1e9


def _submit(
    compiler: Compiler, p: Problem, name: Any, layers: int
) -> futures.Future[jax.stages.Compiled]:
    config = p.cut(layers)
    setup = training.trainer(config, attention_of(name))
    state = jax.eval_shape(_start(config))
    tokens = jax.ShapeDtypeStruct((p.batch, p.length + 1), jnp.int32)
    return compiler.submit(
        lambda state, tokens: training.step(setup, state, tokens), state, tokens, donated=(0,)
    )


def _start(config: Config) -> Callable[[], training.State]:
    """Makes what the first step begins with."""
    return lambda: training.initial(config, training.trainer(config, None))


def _seconds(p: Problem, initial: jax.stages.Compiled, step: jax.stages.Compiled) -> float:
    """Of one step."""
    state = initial()
    shape = (p.batch, p.length + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, p.config.vocabulary)
    state, loss = step(state, tokens)
    jax.block_until_ready(loss)
    start = time.perf_counter()
    for _ in range(_STEPS):
        state, loss = step(state, tokens)
    jax.block_until_ready(loss)
    return (time.perf_counter() - start) / _STEPS


def attention_of(name: Any) -> Attention:
    """By its name in the tables; "jaxflash" chooses its backend by itself."""
    return None if name == "jaxflash" else name


def _line(
    p: Problem,
    names: Sequence[str],
    seconds: dict[str, float],
    reasons: dict[str, str],
    peak: float,
    footnotes: results.Footnotes,
) -> list[str]:
    ours = names[0]

    def rate(name: str) -> str:
        if name in reasons:
            return footnotes.empty_cell(reasons[name])
        return f"{p.batch / seconds[name]:.3g}"

    def ratio(name: str) -> str:
        if name not in seconds or ours not in seconds:
            return ""
        return f"{seconds[name] / seconds[ours]:.2f}"

    scaled = "" if len(p.layers) == 1 else f" (from {' and '.join(map(str, p.layers))} layers)"
    share = f"{p.flops / seconds[ours] / peak / 1e12:.1%}" if ours in seconds else ""
    claimed = ["", ""] if p.claim is None else p.claim.cells()
    ratios = ratio("standard"), ratio("cudnn")
    return [p.label + scaled, *map(rate, names), *ratios, share, *claimed]


def _records(
    p: Problem,
    names: Sequence[str],
    seconds: dict[str, float],
    reasons: dict[str, str],
    peak: float,
) -> list[dict[str, Any]]:
    return [
        {
            "model": p.config.name,
            "batch": p.batch,
            "length": p.length,
            "layers_measured": p.layers,
            "attention": name,
            "seconds": seconds.get(name),
            "reason": reasons.get(name),
            "flops": p.flops,
            "product_tflops": peak,
        }
        for name in names
    ]
