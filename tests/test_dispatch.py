"""Which backend runs, what the package holds, and that imports go one way."""

import ast
import doctest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxflash
from jaxflash import api, dispatch, xla
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper, mosaic
from pallas_kernels.common import evaluate

ROOT = Path(__file__).resolve().parent.parent
X = jax.ShapeDtypeStruct((2, 8, 4, 16), jnp.float32)
(_XLA,) = (backend for backend in dispatch.BACKENDS if backend.name == "xla")


def test_explain_names_what_runs() -> None:
    explanation = jaxflash.explain(X, X, X, is_causal=True)
    assert explanation.runs == "xla"
    why = "needs a Hopper GPU (H100, H200); this device is cpu"
    whynot = "needs an NVIDIA GPU, Ampere or later; this device is cpu"
    refusals = {"hopper": why, "triton": whynot, "xla": None, "reference": None}
    assert explanation.refusals == refusals
    chosen = jaxflash.explain(X, X, X, implementation="reference")
    assert str(chosen).splitlines() == [
        f"hopper     refuses: {why}",
        f"triton     refuses: {whynot}",
        "xla        would run if asked for",
        "reference  runs",
    ]


def test_explain_accepts_arrays_and_abstract_arrays() -> None:
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    bias = jnp.zeros((4, 8, 8))
    assert jaxflash.explain(X, X, X, bias, key_value_seq_lengths=lengths).runs == "xla"
    with pytest.raises(TypeError, match="mask must be boolean"):
        jaxflash.explain(X, X, X, mask=X)
    with pytest.raises(TypeError, match="dot_product_attention has no argument causal"):
        jaxflash.explain(X, X, X, causal=True)


def test_refusals_are_raised_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named backend never falls back; None takes the first that accepts."""
    picky = _XLA._replace(name="picky", supports=lambda problem: "it is Monday")
    monkeypatch.setattr(dispatch, "BACKENDS", (picky, *dispatch.BACKENDS))
    x = jnp.ones((1, 4, 1, 8))
    assert "picky      refuses: it is Monday" in str(jaxflash.explain(x, x, x))
    jaxflash.dot_product_attention(x, x, x)
    with pytest.raises(ValueError, match="'picky' refuses: it is Monday"):
        jaxflash.dot_product_attention(x, x, x, implementation="picky")
    monkeypatch.setattr(dispatch, "BACKENDS", (picky,))
    with pytest.raises(ValueError, match="no implementation supports this call"):
        jaxflash.dot_product_attention(x, x, x)


def test_gradients_of_another_backend_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = _XLA._replace(name="partial", lacks_gradients=hopper.supports_backward)
    monkeypatch.setattr(dispatch, "BACKENDS", (backend, *dispatch.BACKENDS))
    table = jnp.ones(4)

    def modified(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + table[h]

    found = jaxflash.explain(X, X, X, score_mod=modified)
    if mosaic.Sums.exist():
        assert found.gradients == "differentiates no arrays that score_mod captures"
        assert jaxflash.explain(X, X, X).gradients is None
    else:
        assert found.gradients == "needs JAX 0.11 or newer"
    assert f"partial    runs; gradients by xla: {found.gradients}" in str(found)


def test_gradients_are_not_asked_for_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may need the derivative of a function that is never differentiated."""

    def lacks(problem: Any) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr(dispatch, "BACKENDS", (_XLA._replace(lacks_gradients=lacks),))
    x = jnp.ones((1, 4, 1, 8))
    jaxflash.dot_product_attention(x, x, x)
    with pytest.raises(AssertionError, match="asked"):
        jaxflash.explain(x, x, x)


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(api)
    assert result.attempted > 5
    assert result.failed == 0


def test_score_mod_is_compiled_once_a_function() -> None:
    """Eager calls with equal functions reuse the compiled program."""
    x = jnp.ones((1, 4, 1, 8))
    table = jnp.arange(1.0)

    forward: Any = xla.forward  # jitted
    jaxflash.dot_product_attention(
        x, x, x, score_mod=lambda s, b, h, q, k: s + table[h], implementation="xla"
    )
    before = forward._cache_size()
    jaxflash.dot_product_attention(
        2 * x, x, x, score_mod=lambda s, b, h, q, k: s + table[h], implementation="xla"
    )
    assert forward._cache_size() == before


# The folders of each layer, and the layers that a layer may import.
_ALLOWED = {
    "pallas_kernels/spec": {"pallas_kernels/spec"},
    "pallas_kernels/mosaic": {"pallas_kernels/mosaic", "pallas_kernels/spec"},
    "pallas_kernels/common": {"pallas_kernels", "pallas_kernels/common", "pallas_kernels/spec"},
    "pallas_kernels/hopper": {
        "pallas_kernels",
        "pallas_kernels/common",
        "pallas_kernels/hopper",
        "pallas_kernels/mosaic",
        "pallas_kernels/spec",
    },
    "pallas_kernels/triton": {
        "pallas_kernels",
        "pallas_kernels/common",
        "pallas_kernels/spec",
        "pallas_kernels/triton",
    },
    "pallas_kernels": {"pallas_kernels", "pallas_kernels/spec", "pallas_kernels/mosaic"},
    "jaxflash": {"jaxflash", "pallas_kernels", "pallas_kernels/spec"},
    "jaxflash/xla": {"jaxflash", "jaxflash/xla", "pallas_kernels/spec"},
}


def _layer(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in ("bench", "tests"):
        return parts[0]
    for name in ("/".join(parts[:2]), parts[0]):
        if name in _ALLOWED:
            return name
    return None


@pytest.mark.parametrize("layer", _ALLOWED)
def test_imports_go_one_way(layer: str) -> None:
    files = [
        path
        for path in ROOT.joinpath(layer).rglob("*.py")
        if _layer(".".join(path.relative_to(ROOT).with_suffix("").parts)) == layer
    ]
    assert files
    for path in files:
        for module in _imported(path):
            target = _layer(module)
            assert target is None or target in _ALLOWED[layer] | _entry(layer), (path, module)


def _entry(layer: str) -> set[str]:
    """Dispatch and tuning, in jaxflash, name backends; nothing else does."""
    return {"jaxflash/xla", "pallas_kernels/hopper"} if layer == "jaxflash" else set()


def test_only_dispatch_and_tuning_name_backends() -> None:
    package = ROOT / "jaxflash"
    importers = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if _layer(f"jaxflash.{path.parent.name}") != "jaxflash/xla"
        and any(
            _layer(m) in ("jaxflash/xla", "pallas_kernels/hopper") or m == "jaxflash.reference"
            for m in _imported(path)
        )
    }
    assert importers == {"dispatch.py", "native.py", "portable.py", "tuning/__init__.py"}


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_private_jax_stays_in_mosaic() -> None:
    for package in ("jaxflash", "pallas_kernels"):
        for path in ROOT.joinpath(package).rglob("*.py"):
            if "mosaic" not in path.parts:
                assert "jax._src" not in path.read_text(), path


def test_kernels_refuse_captured_arrays_with_more_elements_than_they_count() -> None:
    x, table = jnp.ones((1, 64, 2, 64), jnp.bfloat16), jnp.ones((2, 64, 64), jnp.float32)
    problem, operands = canonicalize(x, x, x, score_mod=lambda s, b, h, q, k: s + table[h, q, k])
    assert evaluate.refused_functions(problem) is None
    large = jax.ShapeDtypeStruct((2, 2**16, 2**14), jnp.float32)
    problem = problem.of(operands._replace(score_consts=(large,)))
    assert "in 32 bits; got (2, 65536, 16384)" in str(evaluate.refused_functions(problem))
