"""The tables of real models, and the report that answers the seed document."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import __main__ as entry
from bench import portable, report, results, scale, seed, throughput
from bench.models.config import MODELS

pytestmark = pytest.mark.bench

DEVICE = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("name", ["throughput", "generation", "serving"])
def test_tables_of_models_end_to_end(name: str, tmp_path: Path) -> None:
    assert entry.main([name, "--tiny", "--out", str(tmp_path)]) == 0
    (jsonl,) = tmp_path.glob(f"{name}-*.jsonl")
    rows = results.read_rows(jsonl)
    rate = {"throughput": "seconds", "generation": "tokens_per_s", "serving": "tokens_per_s"}[name]
    assert len(rows) >= 2
    for row in rows:
        assert row["reason"] is None if name != "serving" else row["users"] > 0
        # What is scaled from a tiny model's few layers is noise.
        assert row[rate] > 0 or len(row.get("layers_measured", ())) > 1
        assert row["versions"]["jax"]


def test_table_of_the_triton_kernels_end_to_end(tmp_path: Path) -> None:
    """Interpreted: every configuration that is worth trying gives the right answer."""
    assert entry.main(["portable", "--tiny", "--repeats", "1", "--out", str(tmp_path)]) == 0
    (jsonl,) = tmp_path.glob("portable-*.jsonl")
    rows = {(row["direction"], row["name"]): row for row in results.read_rows(jsonl)}
    for problem in portable.problems(tiny=True):
        for name in ("default", *portable.candidates(problem)):
            assert rows[problem.direction, name]["reason"] is None


@pytest.mark.parametrize("name", ["fp8", "accuracy"])
def test_tables_of_fp8_end_to_end(name: str, tmp_path: Path) -> None:
    assert entry.main([name, "--tiny", "--out", str(tmp_path)]) == 0
    (jsonl,) = tmp_path.glob(f"{name}-*.jsonl")
    rows = results.read_rows(jsonl)
    if name == "fp8":
        reasons = {row["implementation"]: row["reason"] for row in rows}
        assert reasons.pop("cudnn fp8")
        assert not any(reasons.values())
        return
    by_name = {row["implementation"]: row["rmse_outliers"] for row in rows}
    assert by_name["jaxflash, bfloat16"] < by_name["FP8, a scale for each block, rotated"]
    assert by_name["FP8, a scale for each block, rotated"] < by_name["FP8, a scale for the tensor"]


def test_table_of_several_devices_end_to_end(tmp_path: Path) -> None:
    argv = ["--seq", "512", "--alone", "256", "--heads", "2", "--head-dim", "16", "--devices", "2"]
    argv += ["--striped", "768"]
    assert entry.main(["scale", *argv, "--out", str(tmp_path)]) == 0
    (jsonl,) = tmp_path.glob("scale-*.jsonl")
    rows = results.read_rows(jsonl)
    assert {row["method"] for row in rows if row["length"] == 512} == set(scale.METHODS)
    assert {row["method"] for row in rows if row["length"] == 768} == {"ring, striped"}
    for row in rows:
        assert row["reason"] is None
        assert row["seconds"] > 0


def test_layers_that_were_not_run_are_scaled() -> None:
    config = MODELS["llama-2-70b"]
    problem = throughput.Problem(config, 4, 2048, None, (1, 4))
    assert problem.scaled([1.0, 2.5]) == pytest.approx(0.5 + 0.5 * config.layers)
    assert throughput.Problem(config, 4, 2048, None, (80,)).scaled([3.0]) == 3.0


def test_flops_of_a_model() -> None:
    """Six operations a weight and token with gradients; attention's four a pair become 14."""
    config = MODELS["llama-2-7b"]
    weights = config.layers * config.block_weights + config.vocabulary * config.width
    pairs = 2048 * 2049 / 2
    attention = 14 * config.layers * config.width * pairs
    expected = 4 * (6 * weights * 2048 + attention)
    assert config.flops(4, 2048, with_gradients=True) == pytest.approx(expected)


def _write(tmp_path: Path, table: str, *rows: dict[str, object]) -> None:
    results.append_rows(tmp_path / f"{table}-{results.slug(DEVICE)}.jsonl", rows)


def test_report_without_results_says_what_to_run(tmp_path: Path) -> None:
    out = tmp_path / "REPORT.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    for table in ("footprint", "throughput", "generation", "serving"):
        assert f"`python -m bench {table}` on {DEVICE} has not been run yet" in text
    for claims in (seed.TRAINING.values(), seed.GENERATION.values()):
        for claim in claims:
            assert f" {claim.flash:g} " in text


def test_report_shows_the_newest_figures(tmp_path: Path) -> None:
    """Figures in the report are those of the results, with ratios of them."""
    key = {
        "model": "llama-2-7b",
        "kind": "decode",
        "context": 2048,
        "bound_tokens_per_s": 200.0,
        "is_packed": True,
    }
    _write(
        tmp_path,
        "generation",
        key | {"attention": "jaxflash", "tokens_per_s": 1.0},
        key | {"attention": "jaxflash", "tokens_per_s": 180.0},
        key | {"attention": "standard", "tokens_per_s": 120.0},
    )
    common = {"model": "llama-2-13b", "batch": 4, "length": 2048, "layers_measured": [4, 12]}
    common |= {"flops": 3e14, "product_tflops": 600.0}
    _write(
        tmp_path,
        "throughput",
        common | {"attention": "jaxflash", "seconds": 1.0},
        common | {"attention": "standard", "seconds": 2.0},
    )
    out = tmp_path / "REPORT.md"
    assert report.main(["--results", str(tmp_path), "--out", str(out)]) == 0
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    assert ["llama-2-7b", "2048", "packed", "120", "180", "1.50", "90%", "42", "62"] in cells
    row = ["llama-2-13b", "4 x 2048", "scaled", "2", "-", "4", "2.00", "-", "50%", "0.6", "1.7"]
    assert row in cells


def test_report_asks_backends_for_features(tmp_path: Path) -> None:
    found = report.read(DEVICE, tmp_path, tmp_path)
    text = report.features(found)
    assert re.search(r"\| Causal masking +\| yes +\| yes", text)
    assert re.search(r"\| float32 +\| no: multiplies bfloat16 and float16", text)
    elsewhere = report.features(report.read("NVIDIA A100-SXM4-80GB", tmp_path, tmp_path))
    assert re.search(r"\| Causal masking +\| no: needs a Hopper GPU", elsewhere)


def test_committed_report_is_that_of_the_committed_results(tmp_path: Path) -> None:
    out = tmp_path / "REPORT.md"
    assert report.main(["--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == report.REPORT.read_text(encoding="utf-8")


def test_footprint_in_the_results_adds_up() -> None:
    """The committed memory of Llama 2 7B is at least that of weights and cache."""
    path = results.RESULTS / f"footprint-{results.slug(DEVICE)}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    inference = [row for row in rows if row["table"] == "inference"]
    assert inference
    for row in inference:
        least = row["weights"] + row["cache"]
        assert least < row["peak"]["jaxflash"] < 1.3 * least
        assert row["peak"]["jaxflash"] < row["peak"]["standard"]
