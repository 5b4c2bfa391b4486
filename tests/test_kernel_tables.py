"""The tables of the kernels: what is measured, what is not, and how ratios are formed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import baselines, comparison, decode, forward, results, tune
from bench.problems import Problem, document_lengths
from bench.shapes import Shape

pytestmark = pytest.mark.bench

_SMALL = Shape(1, 256, 256, 2, 1, 16, True)


def test_forward_measures_every_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("", "soft cap", "ALiBi", "sinks", "bias", "mask", "dropout", "documents")
    asked = [Problem(_SMALL, None, option) for option in options]
    asked.append(Problem(_SMALL, (100, 0)))
    monkeypatch.setattr(forward, "problems", lambda: {"All": asked})
    assert forward.main(["--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = results.read_rows(next(tmp_path.glob("forward-*.jsonl")))
    ours = [row for row in rows if row["implementation"] == "jaxflash"]
    assert [row["problem"] for row in ours] == [problem.label for problem in asked]
    assert all(row["median_ms"] > 0 for row in ours)
    assert {row["implementation"] for row in rows if "median_ms" not in row} == {"cudnn", "tokamax"}
    assert "| B1 T256 N2/1 H16 causal, soft cap " in capsys.readouterr().out


def test_forward_does_not_time_a_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(query: jax.Array, *args: object, **options: object) -> jax.Array:
        return jnp.zeros_like(query)

    implementation = baselines.Implementation("jaxflash", "zeros", wrong)
    monkeypatch.setattr(forward, "problems", lambda: {"One": [Problem(_SMALL)]})
    monkeypatch.setattr(baselines, "best_of_ours", lambda: implementation)
    assert forward.main(["--repeats", "1", "--out", str(tmp_path)]) == 1
    (row,) = [
        row
        for row in results.read_rows(next(tmp_path.glob("forward-*.jsonl")))
        if row["implementation"] == "jaxflash"
    ]
    assert row["reason"].startswith("wrong: relative error")
    assert "median_ms" not in row


def test_forward_ratio_is_to_the_best_peer() -> None:
    def cell(name: str, ms: float | None) -> comparison.Cell:
        return comparison.Cell(Problem(_SMALL), name, None, None, ms, 1.0)

    row = [cell("cudnn", 3.0), cell("fa3", 2.0), cell("tokamax", None), cell("jaxflash", 4.0)]
    assert comparison.ratio(row) == 0.5
    assert comparison.ratio(row[:3]) is None


def test_decode_counts_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ragged = decode.Problem((200, 300), 4, 2, head_dim=32, paged_only=True)
    assert ragged.bytes() == 500 * 2 * 32 * 2 * 2  # heads, columns, K and V, bytes of each
    chunk = decode.Problem((100, 100), 4, 2, T=20, head_dim=32)
    assert chunk.flops == 2 * 4 * 4 * 32 * sum(range(81, 101))
    monkeypatch.setattr(decode, "problems", lambda: {"All": [ragged, chunk]})
    assert decode.main(["--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = results.read_rows(next(tmp_path.glob("decode-*.jsonl")))
    assert [row["implementation"] for row in rows] == [
        decode.OURS_PAGED, decode.OURS, decode.OURS_PAGED,
    ]  # fmt: skip
    assert all(row["median_ms"] > 0 and row["read"] > 0 for row in rows)
    assert "| B2 S200..300 N4/2 H32 " in capsys.readouterr().out


def test_decode_compares_pages_of_8_bits_with_those_of_16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = decode.Problem((200, 150), 4, 2, head_dim=32, in_8_bits=True)
    monkeypatch.setattr(decode, "problems", lambda: {"All": [problem]})
    assert decode.main(["--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = results.read_rows(next(tmp_path.glob("decode-*.jsonl")))
    assert [row["implementation"] for row in rows] == [decode.OURS_PAGED, *decode.NARROW.values()]
    assert rows[0]["bytes"] == 2 * rows[1]["bytes"] == 2 * rows[2]["bytes"]
    assert all(row["median_ms"] > 0 for row in rows)
    assert "| jaxflash, pages of int8 | ratio |" in capsys.readouterr().out


def test_decode_does_not_time_a_wrong_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(query: jax.Array, *cache: jax.Array) -> jax.Array:
        return query * cache[-1].sum()

    problem = decode.Problem((100,), 2, 1, head_dim=16)
    monkeypatch.setattr(decode, "problems", lambda: {"One": [problem]})
    monkeypatch.setattr(decode, "functions", lambda *_: {decode.OURS: (wrong, decode.CONTIGUOUS)})
    assert decode.main(["--repeats", "1", "--out", str(tmp_path)]) == 1
    (row,) = results.read_rows(next(tmp_path.glob("decode-*.jsonl")))
    assert row["reason"].startswith("wrong: relative error")
    assert "median_ms" not in row


def test_documents_fill_the_sequence() -> None:
    shape = Shape(2, 16384, 16384, 2, 2, 16, True)
    lengths = document_lengths(shape)
    assert sum(lengths) == 16384
    problem = Problem(shape, None, "documents")
    ids = np.asarray(problem.arrays()["query_segment_ids"])
    seen = [int(np.sum(ids[0, : i + 1] == ids[0, i])) for i in range(16384)]
    assert problem.visible_pairs == sum(seen)


def test_tune_needs_the_gpu_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--gpu", "h100"]) == 1
    assert "this device is cpu, not h100" in capsys.readouterr().out


def test_tune_tries_what_fits() -> None:
    for mask, head_dim, length in tune.kinds():
        problem = tune.problem_of(mask, head_dim, length)
        assert problem.shape.query_length * problem.shape.batch == tune.TOKENS
        for config in tune.candidates(mask, head_dim):
            assert config.staging(head_dim, head_dim) is not None
