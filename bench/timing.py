"""How long compiled programs take: device time on GPUs, wall time elsewhere, interleaved."""

from __future__ import annotations

import dataclasses
import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from bench import results
from bench.gpus import as_if_on

WALL = "wall time around block_until_ready"
CUPTI = "CUPTI device time, summed over the kernels of a call"


class Program(NamedTuple):
    """A compiled function and its arguments; calling it runs it to the end."""

    compiled: Any
    args: tuple[Any, ...]

    def __call__(self) -> Any:
        return jax.block_until_ready(self.compiled(*self.args))


class Clock(NamedTuple):
    """Runs a program once and returns milliseconds, with the name of the method."""

    measure_ms: Callable[[Program], float]
    method: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """Samples of one program's time, in milliseconds."""

    samples_ms: tuple[float, ...]
    method: str
    warmup: int

    @property
    def repeats(self) -> int:
        return len(self.samples_ms)

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.samples_ms, percent))

    @property
    def median_ms(self) -> float:
        return self.percentile_ms(50)

    @property
    def p10_ms(self) -> float:
        return self.percentile_ms(10)

    @property
    def p90_ms(self) -> float:
        return self.percentile_ms(90)

    def record(self) -> dict[str, Any]:
        """As a part of a JSON row."""
        return {
            "method": self.method,
            "warmup": self.warmup,
            "repeats": self.repeats,
            "median_ms": self.median_ms,
            "p10_ms": self.p10_ms,
            "p90_ms": self.p90_ms,
        }


def compile_program(function: Callable[..., Any], args: tuple[Any, ...]) -> Program:
    """Compiles once; the result serves the memory analysis, the parity check and the timing."""
    return Program(jax.jit(function).lower(*args).compile(), args)


class Compiler:
    """Compiles in other threads while this one goes on to lower the next function.

    Tracing a kernel takes longer than compiling it, and a process traces one at a time: with
    ``processes`` there are others for functions that can be pickled.
    """

    def __init__(self, *, processes: int = 0) -> None:
        self._threads = futures.ThreadPoolExecutor(max(1, results.usable_cores() - 2))
        self._processes = _tracers(processes) if processes else None
        self._lowering = threading.Lock()

    @classmethod
    def for_device(cls, device: jax.Device) -> Compiler:
        """With processes where they can trace: for a GPU."""
        return cls(processes=results.usable_cores() - 2 if device.platform == "gpu" else 0)

    def submit(
        self,
        function: Callable[..., Any],
        *args: Any,
        is_timed: bool = True,
        donated: tuple[int, ...] = (),
    ) -> futures.Future[jax.stages.Compiled]:
        """Lowers here, for lowering keeps to one thread; arguments may be without contents.

        What is not timed is compiled without a search for the fastest products.
        """
        with self._lowering:
            lowered = jax.jit(function, donate_argnums=donated).lower(*args)
        return self._threads.submit(lowered.compile, compiler_options=_options(is_timed))

    def submit_apart(
        self, function: Callable[..., Any], *structs: Any, is_timed: bool = True
    ) -> futures.Future[jax.stages.Compiled]:
        """Traces in another process, if there are any; what fails there fails in the result."""
        if self._processes is None:
            return self.submit(function, *structs, is_timed=is_timed)
        device = jax.devices()[0]
        traced = self._processes.submit(_export, function, structs, device.device_kind)

        def finish() -> jax.stages.Compiled:
            restored = jax.export.deserialize(traced.result())
            with self._lowering:
                lowered = jax.jit(restored.call).lower(*structs)
            return lowered.compile(compiler_options=_options(is_timed))

        return self._threads.submit(finish)


def _options(is_timed: bool) -> Any:
    return None if is_timed else {"xla_gpu_autotune_level": 0}


def _tracers(processes: int) -> futures.ProcessPoolExecutor:
    """Processes that trace on the CPU."""
    return futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_gpu_alone,
    )


def _leave_gpu_alone() -> None:
    jax.config.update("jax_platforms", "cpu")


def _export(function: Callable[..., Any], structs: Any, device_kind: str) -> bytearray:
    """A function lowered for a kind of GPU, in bytes."""
    with as_if_on(device_kind):
        return jax.export.export(jax.jit(function), platforms=["cuda"])(*structs).serialize()


def wall_clock(method: str = WALL) -> Clock:
    """Host time from the call to the end of the device's work."""

    def measure_ms(program: Program) -> float:
        start = time.perf_counter()
        program()
        return (time.perf_counter() - start) * 1e3

    return Clock(measure_ms, method)


def cupti_clock() -> Clock:
    """Kernel time by CUPTI; each sample is preceded by one unmeasured run of the same program."""
    # Here, because a jaxlib without CUDA may lack what it imports.
    from jax.experimental.mosaic.gpu import profiler  # noqa: PLC0415

    def measure_ms(program: Program) -> float:
        _, milliseconds = profiler.measure(program.compiled)(*program.args)
        if milliseconds is None:
            raise RuntimeError("CUPTI saw no kernel")
        return float(milliseconds)

    return Clock(measure_ms, CUPTI)


def device_clock(device: jax.Device) -> Clock:
    """CUPTI where it answers, else wall time; the method says which, and why not CUPTI."""
    if device.platform != "gpu":
        return wall_clock()
    try:
        clock = cupti_clock()
        x = jax.device_put(np.ones((256, 256), np.float32), device)
        clock.measure_ms(compile_program(lambda x: x @ x, (x,)))
    except (ImportError, RuntimeError) as error:
        return wall_clock(f"{WALL} (CUPTI did not answer: {results.first_line(error)})")
    return clock


def interleaved(
    programs: Mapping[str, Program],
    clock: Clock,
    *,
    warmup: int = 2,
    repeats: int = 12,
    min_repeats: int = 3,
    budget_s: float | None = None,
    now: Callable[[], float] = time.monotonic,
) -> dict[str, Timing]:
    """Times the programs in rounds of one sample each, so that drift hits all of them alike.

    After `budget_s` seconds no further round starts, once there are `min_repeats` of them.
    """
    if min(repeats, min_repeats) < 1:
        raise ValueError(f"{repeats=} and {min_repeats=} must be at least 1")
    start = now()
    for program in programs.values():
        for _ in range(warmup):
            program()
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for done in range(repeats):
        if budget_s is not None and done >= min_repeats and now() - start > budget_s:
            break
        for name, program in programs.items():
            samples[name].append(clock.measure_ms(program))
    return {name: Timing(tuple(times), clock.method, warmup) for name, times in samples.items()}


class Budget:
    """A time limit for a whole table, with a forecast of what a larger problem would take."""

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = None if seconds is None else now() + seconds
        self._seconds_per_flop: dict[tuple[str, ...], float] = {}

    def left_s(self) -> float | None:
        """Seconds left, never below zero; None without a limit."""
        return None if self._end is None else max(0.0, self._end - self._now())

    def record(self, key: tuple[str, ...], flop_count: float, seconds: float) -> None:
        """Keeps the latest measured rate of one kind of call."""
        self._seconds_per_flop[key] = seconds / flop_count

    def refusal(self, key: tuple[str, ...], flop_count: float, runs: int) -> str | None:
        """The reason why `runs` calls would not end in time, judged by the last measured rate."""
        left = self.left_s()
        if left is None:
            return None
        if left == 0:
            return "the time budget of this run was spent"
        if key not in self._seconds_per_flop:
            return None
        forecast = self._seconds_per_flop[key] * flop_count * runs
        if forecast <= left:
            return None
        return "would not end within the time budget of this run, judged by the runs before it"
