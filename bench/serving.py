"""Users and tokens a second of one model in the same memory: cache in pages, and contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from bench import cli, results
from bench.capacity import format_bytes
from bench.models.config import MODELS, Config
from bench.models.generate import Model, random_model, structure_of
from bench.models.serving import Memory, Served, Server, random_requests

SUMMARY = "Continuous batching of random requests: a cache in pages against a contiguous one."
IN_8_BITS = "pages of 8 bits"
_TINY = Config("tiny", 64, 32, 2, 4, 48, positions=4096)


class Setup(NamedTuple):
    """A model, its memory for keys and values, and the requests."""

    config: Config
    cache_bytes: int
    capacity: int  # tokens that a request may take
    slots: int  # that a cache in pages has; twice as many where they have 8 bits
    page_size: int
    requests: int
    prompts: tuple[int, int]
    tokens: tuple[int, int]
    chunk: int = 512

    @property
    def memories(self) -> dict[str, Memory]:
        """The same memory divided in three ways."""
        tokens = self.cache_bytes // self.config.kv_bytes_per_token
        pages = tokens // self.page_size
        return {
            "pages": Memory(self.slots, self.capacity, pages, self.page_size),
            "contiguous": Memory(tokens // self.capacity, self.capacity, None),
            # Scales are less than a thousandth of a page.
            IN_8_BITS: Memory(
                2 * self.slots, self.capacity, 2 * pages, self.page_size, "float8_e4m3fn"
            ),
        }


_LLAMA = Setup(MODELS["llama-2-7b"], 40 * 10**9, 4096, 96, 64, 256, (64, 1024), (64, 512))
_SMALL = Setup(_TINY, 4 * 128 * 256, 128, 10, 16, 12, (3, 60), (2, 30), chunk=32)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves with each, prints and writes the table."""
    parser = cli.model_parser("serving", SUMMARY)
    parser.add_argument("--requests", type=int)
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    setup = _SMALL if options.tiny else _LLAMA
    requests = random_requests(
        options.requests or setup.requests, setup.config.vocabulary, setup.prompts, setup.tokens
    )
    parameters = random_model(setup.config, None).parameters
    served: dict[str, Served] = {}
    for name, memory in setup.memories.items():
        model = Model(structure_of(setup.config, None), parameters)
        server = Server(model, setup.config, memory, chunk=setup.chunk)
        server.serve(requests[:1])  # compiles
        served[name] = server.serve(requests)
        del server
    generated = sum(request.tokens for request in requests)
    lines, records = [], []
    for name, found in served.items():
        memory = setup.memories[name]
        assert sum(map(len, found.answers)) == generated
        rate = generated / found.seconds
        lines.append([name, str(memory.slots), f"{found.users:.1f}", f"{rate:.0f}"])
        records.append(
            {"cache": name, **memory._asdict(), "users": found.users, "tokens_per_s": rate}
        )
    users, rates = (
        {str(r["cache"]): float(r[key]) for r in records} for key in ("users", "tokens_per_s")
    )
    held = [len(request.prompt) + request.tokens for request in requests]
    sections = [
        f"{setup.config.name} with {format_bytes(setup.cache_bytes)} for keys and values; "
        f"{len(requests)} requests, prompts of {setup.prompts[0]} to {setup.prompts[1]} tokens, "
        f"answers of {setup.tokens[0]} to {setup.tokens[1]}, {np.mean(held):.0f} in all on "
        f"average; {setup.capacity} are allowed. `users`: requests in work at a time. Prompts "
        "are prefilled one by one.",
        results.markdown_table(["cache", "slots", "users", "tokens a second"], lines),
        "Beside the contiguous cache, "
        + "; ".join(
            f"{name} hold {users[name] / users['contiguous']:.2f} times as many users and give "
            f"{rates[name] / rates['contiguous']:.2f} times the tokens a second"
            for name in ("pages", IN_8_BITS)
        )
        + ". The seed claims 2 to 3 times the users.",
    ]
    origin = results.origin(device)
    report = results.Report("serving", "", "Serving", sections, [r | origin for r in records])
    results.publish(report, device, options.out)
    return 0
