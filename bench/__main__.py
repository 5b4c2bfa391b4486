"""`python -m bench` lists the tables; `python -m bench NAME [options]` runs one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# The registry: table name -> (module, summary). Modules are imported only when they run, so listing
# needs neither JAX nor the packages that one table alone uses. Each has `main(argv) -> int`.
TABLES: dict[str, tuple[str, str]] = {
    "demo": (
        "bench.demo",
        "the main job in two minutes: parity, time, memory, a model that learns",
    ),
    "speed": ("bench.speed", "forward time of every implementation at the seed document's shapes"),
    "forward": ("bench.forward", "the forward by shape and option, against the best peer of each"),
    "backward": ("bench.backward", "the same with gradients, and the backward alone"),
    "decode": ("bench.decode", "new tokens against a cache, contiguous and in pages: TB/s"),
    "train": ("bench.train", "loss curves of a transformer with a kernel and with the reference"),
    "portable": ("bench.portable", "the Triton kernels against torch's, with every configuration"),
    "fp8": ("bench.fp8", "the forward in 8-bit floating point, against cuDNN's and bfloat16"),
    "accuracy": ("bench.accuracy", "error against float64 by precision, with and without outliers"),
    "throughput": ("bench.throughput", "training of Llama 2: samples a second by attention"),
    "generation": ("bench.generation", "tokens a second of Llama 2 7B and GPT models, batch 1"),
    "serving": ("bench.serving", "continuous batching: users and tokens a second with pages"),
    "scale": ("bench.scale", "one long sequence over several devices: ring, Ulysses, gathering"),
    "report": ("bench.report", "every table of the seed document, from the results that are there"),
    "tune": ("bench.tune", "measure configurations of the Hopper forward for the library's table"),
    "long": ("bench.long", "time at long sequences, causal and full, forward and with gradients"),
    "memory": ("bench.memory", "temporary memory of the compiled programs, T 512 to 32768"),
    "footprint": ("bench.footprint", "memory of caches and of Llama 2 7B, compiled for a GPU"),
    "aot": ("bench.aot", "programs compiled for GPUs that are not here: registers, spills, memory"),
}


def listing() -> str:
    """Returns the text that lists every table with its summary."""
    width = max(map(len, TABLES))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in TABLES.items()]
    return "\n".join(
        ["usage: python -m bench NAME [options]   (NAME --help lists them)", "", *lines]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one table, or lists them all."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = arguments
    if name not in TABLES:
        print(f"unknown table {name!r}\n\n{listing()}", file=sys.stderr)
        return 2
    module = importlib.import_module(TABLES[name][0])
    return int(module.main(rest))


if __name__ == "__main__":
    raise SystemExit(main())
