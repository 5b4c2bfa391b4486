"""The tables of configurations: what is in them, and what is taken from them."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import tune
from jaxflash import tuning
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper, spec

ROWS = json.loads((tuning.TABLES / "h100.json").read_text())["rows"]


def _problem(T: int, H: int, Hv: int | None = None, N: int = 2048, **options: Any) -> spec.Problem:
    found = []
    q, v = (jax.ShapeDtypeStruct((1, T, N, n), jnp.bfloat16) for n in (H, Hv or H))
    jax.eval_shape(lambda q, v: found.append(canonicalize(q, q, v, **options)[0]), q, v)
    (problem,) = found
    return problem


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['mask']}-{r['head_dim']}-{r['length']}")
def test_rows_are_the_fastest_of_those_measured_and_fit(row: dict[str, Any]) -> None:
    config = hopper.Config(**row["config"])
    assert config.staging(row["head_dim"], row["head_dim"]) is not None
    assert row["median_ms"][tune.text_of(config)] == min(row["median_ms"].values())


@pytest.mark.parametrize(
    ("options", "mask", "length"),
    [
        ({}, "full", 64),
        ({"is_causal": True}, "band", 64),
        ({"local_window_size": 8}, "band", 34),
        ({"is_causal": True, "local_window_size": (40, 0)}, "band", 64),
        ({"is_causal": True, "logits_soft_cap": 5.0}, "modified", 64),
        ({"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}, "modified", 64),
        ({"mask": jnp.ones((1, 1, 64, 64), bool)}, "data", 64),
    ],
)
def test_kind_of_a_problem(options: dict[str, Any], mask: str, length: int) -> None:
    assert tuning.Kind.of(_problem(64, 48, 56, **options)) == tuning.Kind(mask, 56, length)


def _row(mask: str, head_dim: int, length: int) -> hopper.Config:
    (row,) = [
        r for r in ROWS if (r["mask"], r["head_dim"], r["length"]) == (mask, head_dim, length)
    ]
    return hopper.Config(**row["config"])


def test_lookup_takes_the_next_head_dim_and_the_nearest_length() -> None:
    assert tuning.hopper_config(_problem(1024, 64)) == _row("full", 64, 1024)
    assert tuning.hopper_config(_problem(2047, 40)) == _row("full", 64, 2048)
    assert tuning.hopper_config(_problem(2048, 40)) == _row("full", 64, 2048)
    assert tuning.hopper_config(_problem(10**6, 72, is_causal=True)) == _row("band", 128, 16384)
    assert _row("full", 64, 1024) != _row("full", 64, 2048)


@pytest.mark.parametrize(
    ("T", "N", "H", "is_causal", "consumers"),
    [
        (512, 32, 64, False, 2),  # 64 tiles of 256 rows for 132 multiprocessors
        (512, 32, 64, True, 1),  # 256 tiles of 64 rows: the short ones are a round with others
        (1024, 12, 64, True, 1),
        (1024, 32, 64, False, 4),
        (1024, 32, 64, True, 2),
        (512, 8, 128, False, 1),
        (1024, 16, 128, True, 1),
        (1024, 16, 128, False, 2),
        (1024, 32, 128, True, 2),
    ],
)
def test_few_tiles_are_made_more(T: int, N: int, H: int, is_causal: bool, consumers: int) -> None:
    """As measured to be the fastest."""
    problem = _problem(T, H, N=N, is_causal=is_causal)
    config = tuning.hopper_config(problem)
    assert config.consumers == consumers
    assert config.staging(H, H) is not None


@pytest.mark.parametrize(
    ("T", "consumers"), [(1, 1), (64, 1), (65, 2), (192, 3), (193, 4), (512, 4)]
)
def test_consumers_have_rows(T: int, consumers: int) -> None:
    config = tuning.hopper_config(_problem(T, 64, N=1000))
    of_table = _row("full", 64, 512)
    ping_pong = of_table.ping_pong and consumers > 1
    assert config == dataclasses.replace(of_table, consumers=consumers, ping_pong=ping_pong)


def test_consumers_of_the_default_have_rows() -> None:
    problem = _problem(64, 192, 128)
    assert hopper.Config.default(problem).consumers == 2
    assert tuning.hopper_config(problem).consumers == 1


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("H", [64, 128, 192, 256])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"logits_soft_cap": 5.0}], ids=str)
def test_tiles_and_pages_divide_each_other(page_size: int, H: int, options: dict[str, Any]) -> None:
    problem = _problem(2048, H, **options)
    pages = jax.ShapeDtypeStruct((99, page_size, 2048, H), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    x = problem.operands._replace(key=pages, value=pages, page_table=table)
    problem = dataclasses.replace(problem, operands=x)
    assert tuning.hopper_config(problem).divides_pages(problem)


def test_lookup_leaves_what_was_not_measured_to_the_default() -> None:
    problem = _problem(4096, 192, 128)
    assert tuning.hopper_config(problem) == hopper.Config.default(problem)
