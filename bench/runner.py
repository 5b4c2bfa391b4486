"""One shape through every implementation: refuse, compile, fit, check, then time together."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from types import MappingProxyType
from typing import Any, Literal

import jax

from bench import capacity, results
from bench.baselines import Attention, Implementation
from bench.parity import Oracle, Parity
from bench.shapes import (
    INPUT_DISTRIBUTION,
    Direction,
    Shape,
    flops,
    random_inputs,
)
from bench.timing import Budget, Clock, Compiler, Program, Timing, compile_program, interleaved

Status = Literal["measured", "skipped", "failed"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure; one for a whole table."""

    device: jax.Device
    clock: Clock
    budget: Budget
    warmup: int = 2
    repeats: int = 12
    min_repeats: int = 3

    @property
    def repeats_s(self) -> float | None:
        """Seconds after which a shape gets no more repeats than it must have.

        A quarter of what is left: the next shape of a table is often four times as large.
        """
        left = self.budget.left_s()
        return None if left is None else left / 4

    @property
    def runs(self) -> int:
        """The fewest calls of one program, the parity check's included."""
        return 1 + self.warmup + self.min_repeats


@dataclasses.dataclass(frozen=True)
class Cell:
    """What became of one implementation at one shape; `reason` is why there is no time."""

    shape: Shape
    direction: Direction
    implementation: str
    status: Status
    reason: str | None = None
    note: str | None = None
    parity: Parity | None = None
    memory: capacity.ProgramBytes | None = None
    timing: Timing | None = None

    @property
    def tflops(self) -> float | None:
        if self.timing is None:
            return None
        return flops(self.shape, self.direction) / self.timing.median_ms / 1e9


def attention_function(
    call: Attention, is_causal: bool, direction: Direction
) -> Callable[..., Any]:
    """The function that is compiled: the output, and the three gradients when asked for."""

    def forward(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return call(query, key, value, is_causal=is_causal)

    def both(
        query: jax.Array, key: jax.Array, value: jax.Array, dout: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(forward, query, key, value)
        return (out, *pull_back(dout))

    return forward if direction == "forward" else both


_REFUSALS = (ValueError, NotImplementedError)  # while a call is traced
Ahead = Mapping[tuple[Shape, str], futures.Future[jax.stages.Compiled]]


def compile_ahead(
    shapes: Sequence[Shape],
    direction: Direction,
    implementations: Sequence[Implementation],
    settings: Settings,
) -> Ahead:
    """Compiles all that can run at once, and waits for it, so that nothing compiles beside timing.

    What fails, alone or because all come at once, is left to `run_shape`. With a budget, what is
    too slow is not compiled: then nothing is compiled ahead.
    """
    found: dict[tuple[Shape, str], futures.Future[jax.stages.Compiled]] = {}
    if settings.budget.left_s() is not None:
        return found
    compiler = Compiler()
    for shape in shapes:
        structs = jax.eval_shape(lambda shape=shape: random_inputs(shape, direction))
        for each in implementations:
            if each.call is None or each.refusal(shape, settings.device):
                continue
            function = attention_function(each.call, shape.is_causal, direction)
            with contextlib.suppress(*_REFUSALS, jax.errors.JaxRuntimeError):
                found[shape, each.name] = compiler.submit(function, *structs)
    futures.wait(found.values())
    return found


def run_shape(
    shape: Shape,
    direction: Direction,
    implementations: Sequence[Implementation],
    settings: Settings,
    advance: Callable[[str], None] = lambda what: None,
    ahead: Ahead = MappingProxyType({}),
) -> list[Cell]:
    """Measures one shape; every implementation gets a cell, with a time or with a reason."""
    inputs = random_inputs(shape, direction)
    oracle: Oracle | None = None
    cells: dict[str, Cell] = {}
    programs: dict[str, Program] = {}
    for implementation in implementations:
        advance(f"{shape.label} {direction}: {implementation.name}")
        cell, program = _prepare(implementation, shape, direction, inputs, settings, ahead)
        if program is not None:
            # Made when first needed: a shape that nothing can run costs no reference.
            oracle = oracle or Oracle(shape, direction, inputs)
            cell, program = _checked(cell, program, oracle, settings)
        cells[implementation.name] = cell
        if program is not None:
            programs[implementation.name] = program
    timings = interleaved(
        programs,
        settings.clock,
        warmup=settings.warmup,
        repeats=settings.repeats,
        min_repeats=settings.min_repeats,
        budget_s=settings.repeats_s,
    )
    for name, timing in timings.items():
        cells[name] = dataclasses.replace(cells[name], timing=timing)
    return list(cells.values())


def _prepare(
    implementation: Implementation,
    shape: Shape,
    direction: Direction,
    inputs: tuple[jax.Array, ...],
    settings: Settings,
    ahead: Ahead,
) -> tuple[Cell, Program | None]:
    """Compiles what can run, fits and would end in time, unless it has been compiled."""
    cell = Cell(shape, direction, implementation.name, "measured", note=implementation.note(shape))
    reason = implementation.refusal(shape, settings.device) or settings.budget.refusal(
        _budget_key(cell), flops(shape, direction), settings.runs
    )
    if reason or implementation.call is None:
        return dataclasses.replace(cell, status="skipped", reason=reason), None
    function = attention_function(implementation.call, shape.is_causal, direction)
    try:
        compiled = ahead.get((shape, implementation.name))
        if compiled is None or compiled.exception() is not None:
            program = compile_program(function, inputs)
        else:
            program = Program(compiled.result(), inputs)
    except _REFUSALS as error:
        return dataclasses.replace(cell, status="skipped", reason=results.first_line(error)), None
    except jax.errors.JaxRuntimeError as error:
        reason = capacity.compile_refusal(error, shape, capacity.free_bytes(settings.device))
        if reason is None:
            return _runtime_failure(cell, error), None
        return dataclasses.replace(cell, status="skipped", reason=reason), None
    memory = capacity.program_bytes(program.compiled)
    cell = dataclasses.replace(cell, memory=memory)
    reason = capacity.refusal(memory, capacity.free_bytes(settings.device))
    if reason:
        return dataclasses.replace(cell, status="skipped", reason=reason), None
    return cell, program


def _checked(
    cell: Cell, program: Program, oracle: Oracle, settings: Settings
) -> tuple[Cell, Program | None]:
    """Runs once and compares; a wrong answer is not timed."""
    start = time.monotonic()
    try:
        outputs = program()
    except jax.errors.JaxRuntimeError as error:
        return _runtime_failure(cell, error), None
    settings.budget.record(
        _budget_key(cell), flops(cell.shape, cell.direction), time.monotonic() - start
    )
    parity = oracle.check(outputs)
    cell = dataclasses.replace(cell, parity=parity)
    if parity.failures:
        reason = "wrong answer, not timed: " + "; ".join(parity.failures)
        return dataclasses.replace(cell, status="failed", reason=reason), None
    # The forecast came from a shorter sequence, whose matrix may have sat in the cache.
    too_slow = settings.budget.refusal(
        _budget_key(cell), flops(cell.shape, cell.direction), settings.runs - 1
    )
    if too_slow:
        return dataclasses.replace(cell, status="skipped", reason=too_slow), None
    return cell, program


def _runtime_failure(cell: Cell, error: jax.errors.JaxRuntimeError) -> Cell:
    """Out of memory is a skip; anything else an implementation raises is its failure."""
    status: Status = "skipped" if results.is_out_of_memory(str(error)) else "failed"
    return dataclasses.replace(cell, status=status, reason=results.first_line(error))


def _budget_key(cell: Cell) -> tuple[str, ...]:
    return (cell.implementation, cell.direction, str(cell.shape.is_causal))


def record(cell: Cell, origin: dict[str, Any]) -> dict[str, Any]:
    """The cell as one JSON row; times appear only where they were measured."""
    row: dict[str, Any] = {
        **dataclasses.asdict(cell.shape),
        "direction": cell.direction,
        "implementation": cell.implementation,
        "status": cell.status,
        "reason": cell.reason,
        "note": cell.note,
        "input_distribution": INPUT_DISTRIBUTION,
        "flops": flops(cell.shape, cell.direction),
        "parity_error": _finite(cell.parity.errors) if cell.parity else None,
        "parity_limit": cell.parity.limits if cell.parity else None,
        "temporary_bytes": cell.memory.temporary if cell.memory else None,
    }
    if cell.timing is not None:
        row |= cell.timing.record() | {"tflops": cell.tflops}
    return row | origin


def _finite(errors: dict[str, float]) -> dict[str, float | str]:
    """JSON has no NaN: an error that is none is written as text."""
    return {name: e if abs(e) < float("inf") else str(e) for name, e in errors.items()}


def exit_code(cells: Sequence[Cell]) -> int:
    """1 when an implementation failed, so that a script notices."""
    return int(any(cell.status == "failed" for cell in cells))


def records(cells: Sequence[Cell], device: jax.Device) -> list[dict[str, Any]]:
    """JSON rows of a table."""
    origin = results.origin(device)
    return [record(cell, origin) for cell in cells]
