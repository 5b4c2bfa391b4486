"""Attention problems with options: what a call takes, and how its answer is checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxflash
from bench.parity import tile_error
from bench.results import first_line
from bench.shapes import FLOP_FACTOR, Direction, Shape, random_inputs
from bench.timing import Clock, Compiler, Program, Timing, interleaved
from jaxflash import reference
from jaxflash.arguments import canonicalize
from pallas_kernels.spec import Band

_RANK, _HEADS = 4, 2
_ROWS = 128  # of a check, at either end of the sequence
_EXPECTED = "expected"
_DOCUMENTS = (512, 4096)  # shortest and longest, in tokens


@dataclasses.dataclass(frozen=True)
class Problem:
    """A shape with a window or an option, one of those that `options` and `arrays` know."""

    shape: Shape
    window: tuple[int, int] | None = None
    option: str = ""
    direction: Direction = "forward"

    @property
    def label(self) -> str:
        """As `B4 T4096 N16/16 H128 causal, soft cap`."""
        parts = [self.shape.label.removesuffix(f" {self.shape.dtype}")]
        if self.window is not None:
            parts.append(f"window {self.window[0]}")
        if self.option:
            parts.append(self.option)
        return ", ".join(parts)

    @property
    def visible_pairs(self) -> int:
        """Of one head of one batch element."""
        s = self.shape
        if self.option == "documents":
            return sum(Band.of(s.is_causal, None).area(n, n) for n in document_lengths(s))
        return Band.of(s.is_causal, self.window).area(s.query_length, s.key_length)

    @property
    def flops(self) -> float:
        """4 * B * N * H for each visible pair, 14 with gradients."""
        s = self.shape
        pairs = float(s.batch * s.query_heads * s.head_dim) * self.visible_pairs
        return 4.0 * FLOP_FACTOR[self.direction] * pairs

    def options(self) -> dict[str, Any]:
        """Keywords of the call that are no arrays."""
        options: dict[str, Any] = {"is_causal": self.shape.is_causal}
        if self.window is not None:
            options["local_window_size"] = self.window
        if self.option == "soft cap":
            options["logits_soft_cap"] = 20.0
        if self.option == "dropout":
            options["dropout_rate"] = 0.1
        if self.option == "deterministic":
            options["deterministic"] = True
        return options

    def arrays(self) -> dict[str, jax.Array]:
        """Further arrays of the call."""
        s, key = self.shape, jax.random.key(7)
        matrix = (1, s.query_heads, s.query_length, s.key_length)
        match self.option:
            case "bias":
                found = {"bias": jax.random.normal(key, matrix, s.dtype)}
            case "mask":
                found = {"mask": jax.random.bernoulli(key, 0.9, (1, 1, *matrix[2:]))}
            case "ALiBi":
                slopes = 2.0 ** -jnp.arange(1, s.query_heads + 1, dtype=jnp.float32)
                found = {"alibi_slopes": slopes}
            case "sinks":
                found = {"sinks": jax.random.normal(key, (s.query_heads,))}
            case "dropout":
                found = {"dropout_key": key}
            case "documents":
                lengths = document_lengths(s)
                ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
                ids = np.broadcast_to(ids, (s.batch, s.query_length))
                names = ("query_segment_ids", "key_value_segment_ids")
                found = {name: jnp.asarray(ids) for name in names}
            case _:
                found = {}
        return found

    def call(
        self, attention: Callable[..., jax.Array], arrays: dict[str, Any], *inputs: Any
    ) -> tuple[jax.Array, ...]:
        """The output; or gradients of query, key, value and floating arrays, by ``inputs[3]``."""
        if self.direction == "forward":
            return (attention(*inputs, **self.options(), **arrays),)
        floating = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}

        def of_floating(
            query: jax.Array, key: jax.Array, value: jax.Array, floating: dict[str, jax.Array]
        ) -> jax.Array:
            return attention(query, key, value, **self.options(), **(arrays | floating))

        *found, of_arrays = jax.vjp(of_floating, *inputs[:3], floating)[1](inputs[3])
        return (*found, *of_arrays.values())

    def expected(self, arrays: Any, *inputs: Any) -> tuple[jax.Array, ...]:
        """What `call` should return, for the first batch element, in float32.

        Of the output only the first and the last rows, of gradients only some heads.
        """
        if self.direction == "forward":
            return self._expected_rows(arrays, *(x[:1] for x in inputs))
        wide = (self._checked(x).astype(jnp.float32) for x in inputs)
        arrays = {name: self._checked(x) for name, x in arrays.items()}
        ours = functools.partial(jaxflash.dot_product_attention, implementation="xla")
        with jax.default_matmul_precision("highest"):
            return self.call(ours, arrays, *wide)

    def _checked(self, x: jax.Array) -> jax.Array:
        """Of an operand, or of its gradient, the first batch element and the first key heads."""
        s = self.shape
        kv_heads = min(_HEADS, s.kv_heads)
        heads = kv_heads * s.query_heads // s.kv_heads
        if x.ndim == 1:
            return x[:heads]
        if x.ndim == _RANK and x.shape[-1] == s.head_dim:
            return x[:1, :, : heads if x.shape[2] == s.query_heads else kv_heads]
        if x.ndim == _RANK:
            return x[:1, :heads]
        return x[:1] if x.ndim else x

    def _expected_rows(self, arrays: Any, query: Any, key: Any, value: Any) -> Any:
        """The reference at the first and at the last rows."""
        blocks = []
        for rows in self._checked_rows():
            cut = {name: _rows_of(name, x, rows) for name, x in arrays.items()}
            options = self.options() | cut | {"query_offset": rows.start}
            problem, x = canonicalize(query[:, rows], key, value, **options)
            blocks.append(reference.forward(problem, x)[0])
        return tuple(blocks)

    def fault(self, found: tuple[jax.Array, ...], expected: tuple[jax.Array, ...]) -> str | None:
        """What is wrong with an answer. Dropout, which differs among rows alone, goes unchecked."""
        if self.option == "dropout":
            return None if all(bool(jnp.isfinite(x).all()) for x in found) else "not finite"
        if self.direction == "forward":
            found = tuple(found[0][:1, rows] for rows in self._checked_rows())
        else:
            found = tuple(map(self._checked, found))
        allowed = float(jnp.finfo(self.shape.dtype).eps)
        for got, want in zip(found, expected, strict=True):
            error = _error(np.asarray(got, np.float32), np.asarray(want, np.float32))
            if not error <= allowed:
                return f"wrong: relative error {error:.2e}, allowed {allowed:.2e}"
        return None

    def _checked_rows(self) -> list[slice]:
        T = self.shape.query_length
        return [slice(start, start + _ROWS) for start in (0, max(0, T - _ROWS))]


def common() -> dict[str, list[Problem]]:
    """What the tables of the forward and of gradients both measure, by heading."""
    return {
        "16k tokens, 2048 features": [
            Problem(Shape(b, t, t, 2048 // h, 2048 // h, h, c))
            for h in (64, 128, 256)
            for b, t in ((16, 1024), (4, 4096), (1, 16384))
            for c in (False, True)
        ],
        "Grouped heads": [
            Problem(Shape(4, 2048, 2048, n, k, 128, True)) for n, k in ((32, 32), (64, 8))
        ],
    }


def submit(
    compiler: Compiler,
    problem: Problem,
    functions: Mapping[str, Callable[..., Any]],
    apart: Collection[str] = (),
) -> dict[str, futures.Future[jax.stages.Compiled] | str]:
    """Programs on their way, and the reference's; a refusal at trace time is its reason.

    Those named in ``apart`` are traced in other processes, as the reference is.
    """
    structs = (jax.eval_shape(problem.arrays), *_structs(problem))
    found: dict[str, futures.Future[jax.stages.Compiled] | str] = {
        _EXPECTED: compiler.submit_apart(problem.expected, *structs, is_timed=False)
    }
    for name, function in functions.items():
        submit_one = compiler.submit_apart if name in apart else compiler.submit
        try:
            found[name] = submit_one(function, *structs)
        except (ValueError, NotImplementedError) as error:
            found[name] = first_line(error)
    return found


def measure(
    problem: Problem, submitted: Mapping[str, Any], clock: Clock, repeats: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of what `submit` returned, and why others have none: a wrong answer is not timed."""
    inputs = (problem.arrays(), *random_inputs(problem.shape, problem.direction))
    expected = Program(submitted[_EXPECTED].result(), inputs)()
    programs: dict[str, Program] = {}
    reasons: dict[str, str] = {}
    for name, future in submitted.items():
        if name == _EXPECTED:
            continue
        reason = future if isinstance(future, str) else None
        if reason is None:
            try:
                program = Program(future.result(), inputs)
                reason = problem.fault(program(), expected)
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
                reason = first_line(error)
        if reason is None:
            programs[name] = program
        else:
            reasons[name] = reason
    return interleaved(programs, clock, warmup=1, repeats=repeats), reasons


def _structs(problem: Problem) -> tuple[jax.ShapeDtypeStruct, ...]:
    query, key, value = problem.shape.structs()
    return (query, key, value) if problem.direction == "forward" else (query, key, value, query)


def _error(got: np.ndarray, want: np.ndarray) -> float:
    if got.ndim == _RANK:
        return tile_error(got, want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def document_lengths(shape: Shape) -> list[int]:
    """Random lengths that fill a sequence, the same in every run."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < shape.query_length:
        lengths.append(int(rng.integers(_DOCUMENTS[0], _DOCUMENTS[1] + 1)))
    lengths[-1] -= sum(lengths) - shape.query_length
    return lengths


def _rows_of(name: str, x: jax.Array, rows: slice) -> jax.Array:
    """What an array says of some rows of the first batch element."""
    if name in ("bias", "mask"):
        return x[:1, :, rows]
    if name == "query_segment_ids":
        return x[:1, rows]
    return x[:1] if name == "key_value_segment_ids" else x
