"""New tokens against a cache: how near to the memory's speed, beside the best peer."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxflash
from bench import baselines, results
from bench.parity import tile_error
from bench.timing import Compiler, Program, Timing, device_clock, interleaved
from pallas_kernels.spec import Band, narrow

SUMMARY = "Effective TB/s of decoding and paged attention, and TFLOP/s of prefill in chunks."
OURS, OURS_PAGED = "jaxflash", "jaxflash, pages"
CONTIGUOUS, PAGES = "contiguous", "pages"
NARROW = {str(dtype): f"jaxflash, pages of {dtype}" for dtype in narrow.DTYPES}  # by what they hold
PAGE_SIZE = 64
_SPLITS = (4, 16)  # of FA3, which does not choose by itself here: the better one counts
_FEW = 16  # new tokens: with more, operations are what counts
_CEILING_BYTES = 2**32


@dataclasses.dataclass(frozen=True)
class Problem:
    """Caches of some sequences, and the new tokens that look at them."""

    lengths: tuple[int, ...]  # tokens held, the new ones included
    query_heads: int
    kv_heads: int
    T: int = 1
    head_dim: int = 128
    paged_only: bool = False
    in_8_bits: bool = False  # pages of 8 bits, beside those of 16

    @property
    def label(self) -> str:
        """As `B8 S8192 N32/8 H128`."""
        low, high = min(self.lengths), max(self.lengths)
        length = f"S{high}" if low == high else f"S{low}..{high}"
        new = f" T{self.T}" if self.T > 1 else ""
        heads = f"N{self.query_heads}/{self.kv_heads}"
        return f"B{len(self.lengths)} {length}{new} {heads} H{self.head_dim}"

    @property
    def is_even(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def capacity(self) -> int:
        return -(-max(self.lengths) // PAGE_SIZE) * PAGE_SIZE

    def bytes(self, held: str = PAGES) -> int:
        """Of keys and values that are needed."""
        itemsize = 1 if held in NARROW else 2
        return sum(self.lengths) * self.kv_heads * self.head_dim * 2 * itemsize

    @property
    def flops(self) -> float:
        """4 * N * H for each visible pair."""
        pairs = sum(Band(None, n - self.T).area(self.T, n) for n in self.lengths)
        return 4.0 * self.query_heads * self.head_dim * pairs

    def arrays(self, held: str) -> tuple[Any, ...]:
        """Query, keys, values, lengths; the same in pages in random order, with their table.

        Of pages of 8 bits, also their scales.
        """
        B, K, H = len(self.lengths), self.kv_heads, self.head_dim
        M = self.capacity // PAGE_SIZE
        used = [-(-n // PAGE_SIZE) for n in self.lengths]
        shape = (B, self.capacity, K, H) if held == CONTIGUOUS else (sum(used), PAGE_SIZE, K, H)
        keys = [jax.random.key(i, impl="rbg") for i in range(3)]
        query = jax.random.normal(keys[0], (B, self.T, self.query_heads, H), jnp.bfloat16)
        cache = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys[1:])
        lengths = jnp.array(self.lengths, jnp.int32)
        if held == CONTIGUOUS:
            return query, *cache, lengths
        scales: tuple[Any, ...] = ()
        if held in NARROW:
            rounded = jax.jit(narrow.of_pages, static_argnums=1)
            cache, scales = zip(*(rounded(x, jnp.dtype(held)) for x in cache), strict=True)
        pages = np.random.default_rng(0).permutation(sum(used)).astype(np.int32)
        table = np.full((B, M), -1, np.int32)
        for b, run in enumerate(np.split(pages, np.cumsum(used)[:-1])):
            table[b, : len(run)] = run
        return query, *cache, jnp.asarray(table), lengths, *scales


def problems() -> dict[str, list[Problem]]:
    """What is measured, by heading."""
    rng = np.random.default_rng(0)
    ragged = tuple(int(n) for n in rng.permutation(np.linspace(1024, 65536, 64).astype(int)))
    even = (sum(ragged) // len(ragged),) * len(ragged)
    return {
        "One new token": [
            Problem((32768,), 32, 8),
            Problem((8192,) * 8, 32, 8),
            Problem((8192,) * 32, 32, 8),
            Problem((2048,) * 64, 64, 8),
            Problem((16384,) * 4, 32, 32),
            Problem((131072,), 64, 8),
        ],
        "Several new tokens, other heads": [
            Problem((8192,) * 8, 32, 8, T=4),
            Problem((8192,) * 8, 32, 8, T=16),
            Problem((8192,) * 8, 32, 8, head_dim=64),
            Problem((8192,) * 8, 16, 4, head_dim=256),
        ],
        "Lengths that differ, and their mean": [
            Problem(ragged, 32, 8, paged_only=True),
            Problem(even, 32, 8, paged_only=True),
        ],
        "Prefill in chunks": [Problem((8192,) * 4, 32, 8, T=512)],
        "Pages of 8 bits": [
            Problem((32768,), 32, 8, in_8_bits=True),
            Problem((32768,) * 4, 32, 8, in_8_bits=True),
            Problem((8192,) * 8, 32, 8, in_8_bits=True),
            Problem((8192,) * 32, 32, 8, in_8_bits=True),
            Problem((2048,) * 64, 64, 8, in_8_bits=True),
            Problem((32768,) * 4, 32, 8, head_dim=64, in_8_bits=True),
        ],
    }


def functions(problem: Problem, device: jax.Device) -> dict[str, tuple[Callable[..., Any], str]]:
    """Implementations, and what each takes: `Problem.arrays`."""
    found: dict[str, tuple[Callable[..., Any], str]] = {}
    if not (problem.paged_only or problem.in_8_bits):
        found[OURS] = (jaxflash.decode_attention, CONTIGUOUS)
    found[OURS_PAGED] = (jaxflash.paged_attention, PAGES)
    if problem.in_8_bits:
        return found | {name: (_ours_in_8_bits, held) for held, name in NARROW.items()}
    if device.platform != "gpu":
        return found
    if problem.is_even and problem.T == 1 and not problem.paged_only:
        found["cudnn"] = (_cudnn, CONTIGUOUS)
    kvcache, _ = baselines.fa3_kvcache()
    if kvcache is not None and problem.head_dim == baselines.FA3_HEAD_DIM:
        for splits in _SPLITS if problem.T <= _FEW else (1,):
            call = functools.partial(_fa3, kvcache, splits)
            if not problem.paged_only:
                found[f"fa3, {splits} splits"] = (call, CONTIGUOUS)
            found[f"fa3, {splits} splits, pages"] = (functools.partial(_fa3_paged, call), PAGES)
    return found


def _ours_in_8_bits(*arrays: Any) -> jax.Array:
    *others, key_scale, value_scale = arrays
    return jaxflash.paged_attention(*others, key_scale=key_scale, value_scale=value_scale)


def _cudnn(query: Any, key: Any, value: Any, lengths: Any) -> jax.Array:
    del lengths  # all as long as the cache
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _fa3(
    kvcache: Callable[..., Any], splits: int, query: Any, key: Any, value: Any, lengths: Any,
    page_table: Any = None,
) -> Any:  # fmt: skip
    return kvcache(
        query, key, value, cache_seqlens=lengths, page_table=page_table, is_causal=True,
        num_splits=splits,
    )  # fmt: skip


def _fa3_paged(
    call: Callable[..., Any], query: Any, key: Any, value: Any, table: Any, lengths: Any
) -> Any:
    return call(query, key, value, lengths, jnp.maximum(table, 0))


def expected(problem: Problem, arrays: tuple[Any, ...], held: str) -> np.ndarray:
    """The first sequence's output for the first head of the keys, in float32."""
    query, key, value = (np.asarray(x) for x in _first(problem, arrays, held))
    groups, n = problem.query_heads // problem.kv_heads, problem.lengths[0]
    logits = np.einsum("tgh,sh->gts", query[:, :groups], key) * problem.head_dim**-0.5
    seen = Band(None, 0).allowed(n - problem.T + np.arange(problem.T)[:, None], np.arange(n))
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("gts,sh->tgh", weights, value)[None]


def _first(problem: Problem, arrays: tuple[Any, ...], held: str) -> tuple[Any, ...]:
    n = problem.lengths[0]
    query, *cache = arrays[:3]
    if held == CONTIGUOUS:
        cache = [x[0, :, 0].astype(jnp.float32) for x in cache]
    else:
        pages = arrays[3][0, : -(-n // PAGE_SIZE)]
        cache = [x[pages, :, 0].astype(jnp.float32) for x in cache]  # [pages, PAGE_SIZE, H]
        for i, scale in enumerate(arrays[5:]):
            cache[i] *= scale[pages, 0][:, None, None]
        cache = [x.reshape(-1, problem.head_dim) for x in cache]
    return query[0].astype(jnp.float32), *(x[:n] for x in cache)


def measure(
    problem: Problem, compiler: Compiler, repeats: int, device: jax.Device
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times, and why others have none: a wrong answer is not timed."""
    programs, reasons = {}, {}
    wanted_by = functions(problem, device)
    inputs = {held: problem.arrays(held) for held in {held for _, held in wanted_by.values()}}
    wanted = {held: expected(problem, arrays, held) for held, arrays in inputs.items()}
    waiting = {}
    for name, (function, held) in wanted_by.items():
        try:
            waiting[name] = compiler.submit(function, *inputs[held]), held
        except (ValueError, NotImplementedError) as error:
            reasons[name] = results.first_line(error)
    groups = problem.query_heads // problem.kv_heads
    for name, (future, held) in waiting.items():
        try:
            program = Program(future.result(), inputs[held])
            out = program()
        except jax.errors.JaxRuntimeError as error:
            reasons[name] = results.first_line(error)
            continue
        out = out[0] if isinstance(out, tuple) else out
        off = tile_error(np.asarray(out[:1, :, :groups], np.float32), wanted[held])
        if off <= float(jnp.finfo(jnp.bfloat16).eps):
            programs[name] = program
        else:
            reasons[name] = f"wrong: relative error {off:.2e}"
    return interleaved(programs, device_clock(device), warmup=1, repeats=repeats), reasons


def ceilings(device: jax.Device) -> dict[str, float]:
    """TB/s of reading an array, and of copying one (bytes read and written)."""
    x = jnp.ones(_CEILING_BYTES // 4 if device.platform == "gpu" else 2**20, jnp.float32)
    programs = {
        "read": Program(jax.jit(jnp.sum).lower(x).compile(), (x,)),
        "copy": Program(jax.jit(lambda x: x + 1).lower(x).compile(), (x,)),
    }
    timed = interleaved(programs, device_clock(device), warmup=1, repeats=5)
    return {
        name: (1 + (name == "copy")) * x.nbytes / timing.median_ms / 1e9
        for name, timing in timed.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the table; 1 when an implementation gave a wrong answer."""
    parser = argparse.ArgumentParser(prog="python -m bench decode", description=SUMMARY)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="headings that contain a word")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="DIR")
    options = parser.parse_args(argv)
    device, compiler, footnotes = jax.devices()[0], Compiler(), results.Footnotes()
    limits = ceilings(device)
    sections = [
        "Each cell: median us / TB/s of the keys and values needed; prefill: TFLOP/s. FA3 is given "
        f"{' and '.join(map(str, _SPLITS))} splits, the better one counts. Ratios: the best peer's "
        f"time over ours, contiguous to contiguous and pages ({PAGE_SIZE} tokens) to pages; for "
        "pages of 8 bits the time of our own pages of 16 over theirs.",
        f"In the same run an array is read at {limits['read']:.2f} TB/s and copied at "
        f"{limits['copy']:.2f} (read and written).",
    ]
    records: list[dict[str, Any]] = []
    for heading, rows in problems().items():
        if options.only and not any(word.lower() in heading.lower() for word in options.only):
            continue
        lines, in_8_bits = [], rows[0].in_8_bits
        for problem in rows:
            timings, reasons = measure(problem, compiler, options.repeats, device)
            line = _line_in_8_bits if in_8_bits else _line
            lines.append(line(problem, timings, reasons, footnotes))
            print(" | ".join(lines[-1]), flush=True)
            records += _records(problem, timings, reasons)
        headers = _HEADERS_IN_8_BITS if in_8_bits else _HEADERS
        sections += [f"### {heading}", results.markdown_table(headers, lines)]
    sections.append(footnotes.text())
    origin = results.origin(device)
    title = "Decoding and paged attention"
    found = [r | limits | origin for r in records]
    report = results.Report("decode", results.part(options.only), title, sections, found)
    results.publish(report, device, options.out)
    return int(any(str(r["reason"]).startswith("wrong") for r in records))


_HEADERS = ["", "cudnn", "fa3", OURS, "ratio", "fa3, pages", OURS_PAGED, "ratio"]


def _line(
    problem: Problem,
    timings: Mapping[str, Timing],
    reasons: Mapping[str, str],
    footnotes: results.Footnotes,
) -> list[str]:
    def best(paged: bool) -> str:
        names = [
            n for n in (*timings, *reasons) if n.startswith("fa3") and n.endswith("pages") == paged
        ]
        timed = [n for n in names if n in timings]
        return min(timed, key=lambda n: timings[n].median_ms) if timed else (names or [""])[0]

    def entry(name: str) -> str:
        if name in timings:
            return _entry(problem, timings[name].median_ms)
        return footnotes.empty_cell(reasons[name]) if name in reasons else ""

    def ratio(ours: str, *peers: str) -> str:
        found = [timings[p].median_ms for p in peers if p in timings]
        return f"{min(found) / timings[ours].median_ms:.3f}" if found and ours in timings else ""

    fa3, fa3_paged = best(False), best(True)
    return [
        problem.label,
        *map(entry, ("cudnn", fa3, OURS)),
        ratio(OURS, "cudnn", fa3),
        *map(entry, (fa3_paged, OURS_PAGED)),
        ratio(OURS_PAGED, fa3_paged),
    ]


_HEADERS_IN_8_BITS = ["", OURS_PAGED, *(x for name in NARROW.values() for x in (name, "ratio"))]


def _line_in_8_bits(
    problem: Problem,
    timings: Mapping[str, Timing],
    reasons: Mapping[str, str],
    footnotes: results.Footnotes,
) -> list[str]:
    """Ratios are to our own pages of 16 bits."""
    line = [problem.label]
    for held, name in ({PAGES: OURS_PAGED} | NARROW).items():
        timed = name in timings
        text = _entry(problem, timings[name].median_ms, held) if timed else reasons[name]
        line.append(text if timed else footnotes.empty_cell(text))
        if held != PAGES:
            both = timed and OURS_PAGED in timings
            ratio = timings[OURS_PAGED].median_ms / timings[name].median_ms if both else None
            line.append(f"{ratio:.3f}" if ratio else "")
    return line


def _entry(problem: Problem, ms: float, held: str = PAGES) -> str:
    if problem.T > _FEW:
        return f"{ms * 1e3:.4g} / {problem.flops / ms / 1e9:.0f}"
    return f"{ms * 1e3:.4g} / {problem.bytes(held) / ms / 1e9:.2f}"


def _records(
    problem: Problem, timings: Mapping[str, Timing], reasons: Mapping[str, str]
) -> list[dict[str, Any]]:
    held_by = {name: held for held, name in NARROW.items()}
    records = []
    for name in (*timings, *reasons):
        needed = problem.bytes(held_by.get(name, PAGES))
        record = {"problem": problem.label, "bytes": needed, "flops": problem.flops}
        record |= {"implementation": name, "reason": reasons.get(name)}
        records.append(record | (timings[name].record() if name in timings else {}))
    return records
