"""The benchmarks' own parts: formulas, timing, parity, skipping, writing."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.mosaic.gpu import profiler

import jaxflash
from bench import __main__ as entry
from bench import (
    baselines,
    capacity,
    cli,
    comparison,
    demo,
    lm,
    parity,
    results,
    runner,
    seed,
    tables,
    timing,
    train,
)
from bench.baselines import Implementation
from bench.parity import Oracle
from bench.problems import Problem
from bench.shapes import DIRECTIONS, Shape, flops, min_bytes, random_inputs, score_matrix_bytes
from bench.timing import WALL, Budget, Clock, compile_program, interleaved, wall_clock

pytestmark = pytest.mark.bench

SMALL = Shape(1, 96, 96, 4, 2, 16, is_causal=True, dtype="float32")
SEED_SHAPE = Shape(8, 512, 512, 32, 32, 64)


def settings(budget_s=None, repeats=3):
    return runner.Settings(
        jax.devices("cpu")[0], wall_clock(), Budget(budget_s), warmup=1, repeats=repeats
    )


def implementation(name="mine", call=None, **changes):
    return Implementation(name, "under test", call or baselines.standard().call, **changes)


# The registry.


def test_listing_names_every_table(capsys):
    assert entry.main([]) == 0
    printed = capsys.readouterr().out
    for name, (_, summary) in entry.TABLES.items():
        assert name in printed
        assert summary in printed
    assert {
        "demo",
        "forward",
        "backward",
        "decode",
        "train",
        "throughput",
        "generation",
        "serving",
        "report",
        "footprint",
        "portable",
        "fp8",
        "accuracy",
        "scale",
        "tune",
        "speed",
        "long",
        "memory",
        "aot",
    } == set(entry.TABLES)


def test_unknown_table_is_refused(capsys):
    assert entry.main(["sped"]) == 2
    assert "unknown table 'sped'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["speed", "long", "memory", "demo"])
def test_table_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main([name, "--help"])
    assert stop.value.code == 0
    assert f"python -m bench {name}" in capsys.readouterr().out


# Formulas, against numbers worked out by hand.


def test_flops():
    full = 4 * 8 * 32 * 512 * 512 * 64
    assert flops(SEED_SHAPE) == full
    causal = sum(min(row + 1, SEED_SHAPE.key_length) for row in range(SEED_SHAPE.query_length))
    per_pair = full / SEED_SHAPE.query_length / SEED_SHAPE.key_length
    assert flops(dataclasses.replace(SEED_SHAPE, is_causal=True)) == per_pair * causal
    assert flops(SEED_SHAPE, "forward+backward") == 3.5 * full


def test_bytes_count_grouped_heads_once():
    shape = Shape(2, 100, 50, 6, 2, 16, dtype="bfloat16")
    query, key = 2 * 100 * 6 * 16 * 2, 2 * 50 * 2 * 16 * 2
    assert min_bytes(shape) == 2 * query + 2 * key
    assert min_bytes(shape, "forward+backward") == 4 * query + 4 * key
    assert score_matrix_bytes(shape) == 2 * 6 * 100 * 50 * 2


def test_shape_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="query_heads must be a multiple of kv_heads; got 6 and 4"):
        Shape(1, 8, 8, 6, 4, 16)


def test_seed_claims_are_this_cards_only_when_it_is_this_card():
    claims, same_card = seed.forward_claims(8, "NVIDIA H100 80GB HBM3")
    assert (claims.card, same_card) == ("H100 80GB", True)
    claims, same_card = seed.forward_claims(4, "NVIDIA A10G")
    assert (claims.card, same_card) == ("A10G 24GB", True)
    assert seed.forward_claims(8, "cpu")[1] is False
    assert seed.forward_claims(4, "NVIDIA H100 80GB HBM3")[1] is False


# Timing.


class FakeDevice:
    """Programs that advance a clock of their own by a fixed time and note their order."""

    def __init__(self):
        self.now_s = 0.0
        self.order = []

    def program(self, name, seconds):
        def run():
            self.now_s += seconds
            self.order.append(name)

        return run

    def clock(self):
        def measure_ms(program):
            before = self.now_s
            program()
            return (self.now_s - before) * 1e3

        return Clock(measure_ms, "fake")


def test_interleaved_takes_turns_after_the_warm_up():
    device = FakeDevice()
    programs = {"a": device.program("a", 0.002), "b": device.program("b", 0.005)}
    timings = interleaved(programs, device.clock(), warmup=1, repeats=4)
    assert device.order == ["a", "b"] * 5
    assert timings["a"].median_ms == pytest.approx(2)
    assert timings["b"].median_ms == pytest.approx(5)
    assert (timings["a"].repeats, timings["a"].warmup, timings["a"].method) == (4, 1, "fake")


def test_budget_ends_the_rounds_but_not_before_the_fewest():
    device = FakeDevice()
    programs = {"a": device.program("a", 1.0)}
    ask = {"warmup": 0, "repeats": 50, "min_repeats": 3, "now": lambda: device.now_s}
    assert interleaved(programs, device.clock(), budget_s=6.5, **ask)["a"].repeats == 7
    assert interleaved(programs, device.clock(), budget_s=0.1, **ask)["a"].repeats == 3


def test_spread_is_ordered_and_drops_an_outlier_from_the_median():
    device = FakeDevice()
    waits = iter([0.001] * 10 + [1.0])

    def program():
        device.now_s += next(waits)

    programs = {"a": program}
    taken = interleaved(programs, device.clock(), warmup=0, repeats=11)["a"]
    assert taken.median_ms == pytest.approx(1)
    assert taken.p10_ms <= taken.median_ms <= taken.p90_ms < max(taken.samples_ms)


def test_wall_time_of_a_real_program_is_positive_and_sane():
    program = compile_program(lambda x: x @ x, (jnp.ones((64, 64)),))
    taken = interleaved({"a": program}, wall_clock(), warmup=1, repeats=5)["a"]
    assert 0 < taken.median_ms < 1000
    assert taken.method == WALL


def test_gpu_time_comes_from_cupti_or_says_why_not(monkeypatch):
    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(timing.jax, "device_put", lambda x, device: jnp.asarray(x))
    monkeypatch.setattr(profiler, "measure", lambda f: lambda *args: (f(*args), 0.25))
    clock = timing.device_clock(gpu)
    assert clock.method == timing.CUPTI
    assert clock.measure_ms(timing.Program(lambda x: x, (1,))) == 0.25

    monkeypatch.setattr(profiler, "measure", lambda f: lambda *args: (f(*args), None))
    method = timing.device_clock(gpu).method
    assert method == f"{WALL} (CUPTI did not answer: CUPTI saw no kernel)"


def test_budget_forecasts_from_the_measured_rate():
    now = [0.0]
    budget = Budget(10.0, lambda: now[0])
    assert budget.refusal(("a",), 1e12, runs=5) is None  # nothing known yet
    budget.record(("a",), flop_count=1e9, seconds=0.1)
    assert budget.refusal(("a",), 1e10, runs=5) is None
    assert "time budget" in budget.refusal(("a",), 1e11, runs=5)
    now[0] = 11.0
    assert budget.refusal(("a",), 1.0, runs=1) == "the time budget of this run was spent"
    assert Budget(None).refusal(("a",), 1e30, runs=5) is None


# Parity.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_standard_attention_passes_parity(dtype):
    direction = "forward+backward"
    shape = dataclasses.replace(SMALL, dtype=dtype)
    cells = runner.run_shape(shape, direction, [implementation()], settings())
    assert [cell.status for cell in cells] == ["measured"], cells[0].reason
    assert set(cells[0].parity.errors) == set(parity.OUTPUTS[direction])
    assert cells[0].timing.repeats == 3


def off_by_one_row(query, key, value, *, is_causal):
    out = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
    return out.at[:, -1].set(0)


def not_causal(query, key, value, *, is_causal):
    return jax.nn.dot_product_attention(query, key, value)


def wrong_scale(query, key, value, *, is_causal):
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, scale=0.26)


def poisoned(query, key, value, *, is_causal):
    out = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
    return out.at[0, 5, 0, 0].set(jnp.nan)


@jax.custom_vjp
def _no_gradient_to_first(x):
    return x


_no_gradient_to_first.defvjp(lambda x: (x, None), lambda _, g: (g.at[:, 0].set(0),))


def wrong_gradient(query, key, value, *, is_causal):
    value = _no_gradient_to_first(value)
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_implementation_is_not_timed(dtype):
    wrong = [off_by_one_row, not_causal, wrong_scale, poisoned]
    offered = [implementation(call.__name__, call) for call in wrong] + [implementation("good")]
    shape = dataclasses.replace(SMALL, dtype=dtype)
    *bad, good = runner.run_shape(shape, "forward", offered, settings())
    for cell in bad:
        assert cell.status == "failed", cell.implementation
        assert cell.timing is None
        assert cell.reason.startswith("wrong answer, not timed: out: relative error")
        assert runner.exit_code([cell]) == 1
    assert good.status == "measured"
    assert runner.exit_code([good]) == 0
    rows = json.dumps(runner.records([*bad, good], settings().device), allow_nan=False)
    assert '"out": "nan"' in rows


def test_wrong_gradient_is_not_timed():
    offered = [implementation(call=wrong_gradient)]
    (cell,) = runner.run_shape(SMALL, "forward+backward", offered, settings())
    assert cell.status == "failed"
    assert "dvalue: relative error" in cell.reason
    assert "dkey" not in cell.reason


def test_reference_agrees_with_float64_by_hand():
    inputs = random_inputs(SMALL, "forward")
    query, key, value = (np.asarray(x, np.float64) for x in inputs)
    want = np.zeros_like(query)
    for head in range(SMALL.query_heads):
        shared = head // (SMALL.query_heads // SMALL.kv_heads)
        for row in range(SMALL.query_length):
            logits = key[0, : row + 1, shared] @ query[0, row, head] / math.sqrt(SMALL.head_dim)
            weights = np.exp(logits - logits.max())
            want[0, row, head] = weights / weights.sum() @ value[0, : row + 1, shared]
    checked = Oracle(SMALL, "forward", inputs).check(jnp.asarray(want, jnp.float32))
    assert checked.worst < 1e-6


def test_reference_rows_come_in_blocks(monkeypatch):
    inputs = random_inputs(SMALL, "forward+backward")
    call = runner.attention_function(baselines.standard().call, True, "forward+backward")
    monkeypatch.setattr(parity, "_ROWS", 48)
    checked = Oracle(SMALL, "forward+backward", inputs).check(jax.jit(call)(*inputs))
    assert not checked.failures


def test_tile_error_sees_one_bad_row_among_many():
    want = np.random.default_rng(0).normal(size=(1, 4096, 1, 8))
    got = want.copy()
    got[0, 4000] = 0
    assert parity.tile_error(got, want) > 0.05
    assert parity.tile_error(np.full_like(want, np.nan), want) != 0
    assert parity.tile_error(want, want) == 0
    assert parity.tile_error(want, np.zeros_like(want)) == math.inf


# Skipping, each with its reason.


def test_what_does_not_fit_is_skipped_with_the_sizes(monkeypatch):
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 1000)
    (cell,) = runner.run_shape(SMALL, "forward", [implementation()], settings())
    assert cell.status == "skipped"
    assert cell.timing is None
    assert "beside its inputs; 1000 B is free" in cell.reason


def test_capacity_compares_outputs_and_temporaries():
    needed = capacity.ProgramBytes(arguments=10**9, outputs=600, temporary=424)
    assert capacity.refusal(needed, 1024) is None
    assert capacity.refusal(needed, 1023) == "needs 1 KiB beside its inputs; 1023 B is free"
    assert capacity.refusal(None, 1) is None
    assert capacity.refusal(needed, None) is None


def test_free_bytes_of_this_machine_are_known():
    free = capacity.free_bytes(jax.devices("cpu")[0])
    assert free is None or free > 2**20


def test_spent_budget_skips():
    (cell,) = runner.run_shape(SMALL, "forward", [implementation()], settings(budget_s=0.0))
    assert (cell.status, cell.reason) == ("skipped", "the time budget of this run was spent")


def test_first_run_that_was_too_slow_is_not_repeated(monkeypatch):
    slow = settings(budget_s=100.0)
    monkeypatch.setattr(Budget, "record", lambda self, key, flop_count, seconds: None)
    monkeypatch.setattr(
        Budget, "refusal", lambda self, key, flop_count, runs: "slow" if runs == 4 else None
    )
    (cell,) = runner.run_shape(SMALL, "forward", [implementation()], slow)
    assert (cell.status, cell.reason, cell.timing) == ("skipped", "slow", None)
    assert cell.parity is not None


def test_unknown_implementation_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["speed", "--impl", "nope"])
    assert stop.value.code == 2
    assert "no implementation ['nope']; choose from" in capsys.readouterr().err


def test_refusal_while_tracing_is_a_skip():
    def refuses(query, key, value, *, is_causal):
        raise NotImplementedError("no such thing\nand a long story")

    (cell,) = runner.run_shape(SMALL, "forward", [implementation(call=refuses)], settings())
    assert (cell.status, cell.reason) == ("skipped", "no such thing")


def test_compiled_ahead_or_not_is_the_same():
    def refuses(query, key, value, *, is_causal):
        raise NotImplementedError("no such thing")

    def breaks(query, key, value, *, is_causal):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    shapes = [SMALL, dataclasses.replace(SMALL, batch=SMALL.batch + 1)]
    calls = {"refuses": refuses, "breaks": breaks, "good": None}
    offered = [implementation(name, call) for name, call in calls.items()]
    ahead = runner.compile_ahead(shapes, "forward", offered, settings())
    assert set(ahead) == {(shape, "good") for shape in shapes}
    assert all(x.done() for x in ahead.values())
    for shape in shapes:
        bad, worse, good = runner.run_shape(shape, "forward", offered, settings(), ahead=ahead)
        assert (bad.status, bad.reason) == ("skipped", "no such thing")
        assert (worse.status, worse.reason) == ("failed", "INTERNAL: no")
        assert (good.status, good.shape) == ("measured", shape)
    assert not runner.compile_ahead(shapes, "forward", offered, settings(budget_s=1.0))


def test_peers_that_cannot_run_say_why():
    device = jax.devices("cpu")[0]
    refusals = {
        offered.name: offered.refusal(SMALL, device)
        for offered in [baselines.cudnn(), baselines.tokamax(), baselines.flash_attn3()]
    }
    assert refusals["cudnn"] == "cuDNN runs on NVIDIA GPUs; this device is cpu"
    assert all(refusals.values())


def test_missing_peer_is_told_from_a_broken_one(tmp_path, monkeypatch):
    assert baselines._peer("no_such_package")[1] == "no_such_package is not installed"
    (tmp_path / "broken_peer.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = baselines._peer("broken_peer")[1]
    assert reason.startswith("broken_peer is installed but does not import")


def test_catalogue_offers_the_librarys_backends_and_not_its_reference():
    names = [offered.name for offered in baselines.catalogue()]
    assert names[0] == "standard"
    assert "jaxflash-xla" in names
    assert "jaxflash-reference" not in names
    with pytest.raises(ValueError, match=r"no implementation \['nope'\]; choose from"):
        baselines.select(["standard", "nope"])


# Writing.


def test_rows_survive_the_round_trip(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    results.append_rows(path, [{"a": 1, "b": None}])
    results.append_rows(path, [{"a": 2.5, "b": "text"}])
    assert results.read_rows(path) == [{"a": 1, "b": None}, {"a": 2.5, "b": "text"}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append_rows(path, [{"a": math.nan}])


def test_markdown_table_is_aligned():
    text = results.markdown_table(["T", "ms"], [["512", "1.5"], ["16384", "2"]])
    assert text.splitlines() == [
        "| T     | ms  |",
        "|-------|-----|",
        "| 512   | 1.5 |",
        "| 16384 | 2   |",
    ]


def test_equal_reasons_share_a_footnote():
    notes = results.Footnotes()
    assert notes.empty_cell("too big") == "- [1]"
    assert notes.empty_cell("too slow") == "- [2]"
    assert notes.empty_cell("too big") == "- [1]"
    assert notes.text() == "- [1] too big\n- [2] too slow"


def test_slug():
    assert results.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_no_number_without_a_measurement():
    skipped = runner.Cell(SMALL, "forward", "a", "skipped", reason="does not fit")
    failed = runner.Cell(SMALL, "forward", "b", "failed", reason="wrong answer")
    notes = results.Footnotes()
    table = tables.comparison([skipped, failed], notes)
    assert table.splitlines()[-1] == "| 96  | - [1] |"
    assert notes.text() == "- [1] wrong answer"
    assert "- a: does not fit" in tables.absent([skipped, failed])
    row = runner.record(skipped, {})
    assert "median_ms" not in row
    assert "tflops" not in row


def test_variant_names_only_what_differs():
    usual = cli.Defaults(seq=(8,), batch=8, heads=32, dtype="bfloat16", budget_s=None)
    options = cli.fill(cli.parser("x", "").parse_args(["--batch", "4"]), usual)
    assert cli.variant(options, usual, ("batch", "heads", "head_dim", "dtype")) == "-batch4"
    options = cli.fill(cli.parser("x", "").parse_args([]), usual)
    assert cli.variant(options, usual, ("batch", "heads", "head_dim", "dtype")) == ""


@pytest.mark.parametrize("name", ["speed", "memory"])
def test_table_end_to_end(name, tmp_path, capsys):
    argv = ["--seq", "64", "--batch", "1", "--heads", "2", "--dtype", "float32"]
    argv += ["--impl", "standard", "jaxflash-xla", "--out", str(tmp_path)]
    assert entry.main([name, *argv]) == 0
    (jsonl,) = tmp_path.glob(f"{name}-*.jsonl")
    (markdown,) = tmp_path.glob(f"{name}*.md")
    rows = results.read_rows(jsonl)
    assert {row["implementation"] for row in rows} == {"standard", "jaxflash-xla"}
    for row in rows:
        assert row["versions"]["jax"] == jax.__version__
        assert {"device", "date", "method", "query_length"} <= set(row)
        if name == "speed":
            assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
    printed = capsys.readouterr().out
    assert "| T " in printed
    assert "| T " in markdown.read_text(encoding="utf-8")


# The demo.


def test_demo_fails_when_the_loss_does_not_fall():
    start = lm.Report(0, 3.5, 0.03)
    assert demo.learning_problems([start, lm.Report(9, 0.01, 1.0)]) == []
    assert len(demo.learning_problems([start, lm.Report(9, 3.4, 0.03)])) == 2
    assert len(demo.learning_problems([start, lm.Report(9, math.nan, 0.0)])) == 2


def test_training_with_a_backend_stays_near_the_reference(tmp_path, capsys):
    options = ["--steps", "3", "--out", str(tmp_path)]
    assert train.main(options) == 0
    assert "Mean distance of xla from the reference" in capsys.readouterr().out
    rows = results.read_rows(tmp_path / f"train-{results.device_slug(jax.devices()[0])}.jsonl")
    curves = 2 + len(train.NUDGES)
    assert len(rows) == curves * 4  # and steps, the one before the first included


@pytest.mark.parametrize("option", ["", "bias", "sinks"])
def test_wrong_gradients_are_found(option):
    shape = Shape(1, 128, 128, 2, 1, 32, True)
    problem = Problem(shape, None, option, "forward+backward")
    inputs = (problem.arrays(), *random_inputs(shape, problem.direction))
    ours = functools.partial(jaxflash.dot_product_attention, implementation="reference")
    found, want = problem.call(ours, *inputs), problem.expected(*inputs)
    assert problem.fault(found, want) is None
    assert len(found) == (3 if not option else 4)
    for i, x in enumerate(found):
        assert "wrong" in problem.fault((*found[:i], x * 1.05, *found[i + 1 :]), want)


def test_what_the_backward_takes_alone():
    both, alone = Problem(SMALL, direction="forward+backward"), Problem(SMALL)
    names = ("cudnn", comparison.OURS)
    row, base = (
        [comparison.Cell(p, n, None, None, ms, p.flops) for n, ms in zip(names, times, strict=True)]
        for p, times in ((both, (7.0, 5.0)), (alone, (2.0, 1.0)))
    )
    assert comparison.ratio(row) == 7 / 5
    less = comparison._less(row, base)
    assert comparison.ratio(less) == 5 / 4
    assert less[0].flops == 2.5 * alone.flops


def test_demo_fails_when_the_answer_is_wrong():
    def cell(name, direction, status):
        return runner.Cell(SMALL, direction, name, status, reason="a reason")

    cells = [cell(name, d, "skipped") for name in ("standard", "jaxflash") for d in DIRECTIONS]
    assert len(demo.show_comparison(cells)) == 2  # ours must run; the standard need not fit
    cells[2] = cell("jaxflash", "forward", "failed")
    assert "jaxflash: a reason" in demo.show_comparison(cells)


def test_model_reads_its_own_past_only():
    config = lm.Config(vocabulary=8, length=8, width=16, heads=2, layers=1, steps=0)
    structure, parameters, _ = lm.initial(config, seed=0)
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16) % config.vocabulary
    changed = tokens.copy()
    changed[:, -1] = 3
    logits = jax.jit(nnx.merge(structure, parameters))
    before, after = logits(tokens), logits(changed)
    np.testing.assert_allclose(before[:, :-1], after[:, :-1], atol=1e-5)
    assert not np.allclose(before[:, -1], after[:, -1], atol=1e-5)


def test_kernels_are_traced_for_a_gpu_in_another_process() -> None:
    shape = Shape(1, 256, 256, 1, 1, 64, is_causal=True)
    attend = functools.partial(Problem(shape).call, jaxflash.dot_product_attention)
    kind = "NVIDIA H100 80GB HBM3"
    with timing._tracers(1) as processes:
        exported = processes.submit(timing._export, attend, ({}, *shape.structs()), kind).result()
    restored = jax.export.deserialize(exported)
    assert restored.platforms == ("cuda",)
    assert "mosaic_gpu" in restored.mlir_module()
