"""The Mosaic harness on a CPU: right answers, and races that are reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from tests import small_kernel
from tests.small_kernel import TILE, Config, Fault, Form

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parent.parent


def _operands(T: int = 64, S: int = 192, H: int = 64) -> tuple[jax.Array, jax.Array]:
    q_key, k_key = jax.random.split(jax.random.key(0))
    q = jax.random.normal(q_key, (T, H), jnp.bfloat16)
    return q, jax.random.normal(k_key, (S, H), jnp.bfloat16)


def _dense_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return q.astype(jnp.float32) @ k.astype(jnp.float32).T


def test_scores_agree_with_dense_and_have_no_race() -> None:
    q, k = _operands(T=128)
    with mosaic.interpreting():
        out = small_kernel.scores(q, k)
    np.testing.assert_allclose(out, _dense_scores(q, k), rtol=1e-5, atol=1e-4)


def test_one_tile_needs_no_refill() -> None:
    q, k = _operands(T=64, S=64)
    with mosaic.interpreting():
        out = small_kernel.scores(q, k)
    np.testing.assert_allclose(out, _dense_scores(q, k), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("fault", ["late_wait", "early_free"])
def test_missing_wait_is_reported(fault: Fault) -> None:
    q, k = _operands()
    reported = pytest.raises(mosaic.RaceError, match="race in interpreted kernel scores_kernel")
    with reported, mosaic.interpreting():
        small_kernel.scores(q, k, Config(fault=fault))
    with mosaic.interpreting():
        pass  # the verdict does not leak into the next context


def test_race_of_an_earlier_kernel_is_not_forgotten() -> None:
    q, k = _operands()
    results = []

    def racy_then_sound() -> None:
        with mosaic.interpreting():
            results.append(small_kernel.scores(q, k, Config(fault="early_free")))
            results.append(jax.jit(small_kernel.scores)(q, k[:TILE]))

    with pytest.raises(mosaic.RaceError, match="scores_kernel"):
        racy_then_sound()
    np.testing.assert_allclose(results[1], _dense_scores(q, k[:TILE]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", small_kernel.FORMS)
def test_every_form_of_product(form: Form) -> None:
    a, b = _operands(T=TILE, S=TILE, H=TILE)
    row = jnp.arange(TILE, dtype=jnp.float32)
    with mosaic.interpreting():
        out = small_kernel.product(a, b, row, form)
    want = small_kernel.product_reference(a, b, row, form)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-4)


def test_failed_kernel_leaves_the_interpreter_usable() -> None:
    def unbalanced_kernel(x_gmem: mosaic.Ref, out_gmem: mosaic.Ref, barrier: mosaic.Ref) -> None:
        out_gmem[...] = x_gmem[...]
        mosaic.barrier_arrive(barrier)
        mosaic.barrier_arrive(barrier)  # an error: nobody has waited for the first arrival

    launch = mosaic.kernel(
        unbalanced_kernel,
        out_type=jax.ShapeDtypeStruct((8,), jnp.float32),
        scratch_types=[mosaic.Barrier()],
        grid={"block": 1},
        threads=("warpgroup", 1),
    )
    with pytest.raises(jax.errors.JaxRuntimeError), mosaic.interpreting():
        launch(jnp.ones(8))
    test_every_form_of_product("fresh")


def test_switch_is_part_of_the_jit_cache_key() -> None:
    mode = jax.jit(lambda: jnp.int32(mosaic.is_interpreting()))
    assert mode() == 0
    with mosaic.interpreting():
        assert mode() == 1
    assert mode() == 0


def test_interpreting_does_not_nest() -> None:
    with mosaic.interpreting():
        with pytest.raises(RuntimeError, match="does not nest"), mosaic.interpreting():
            pass
        assert mosaic.is_interpreting()


def test_options_reach_the_interpreter() -> None:
    with pytest.raises(TypeError, match="no_such_option"), mosaic.interpreting(no_such_option=1):
        pass
    assert not mosaic.is_interpreting()
    with mosaic.interpreting(detect_races=False):
        small_kernel.scores(*_operands(S=64), Config(fault="late_wait"))


def test_compiler_params_default_to_warpgroup_semantics() -> None:
    params = mosaic.compiler_params(unsafe_no_auto_barriers=True)
    assert params.lowering_semantics.name == "Warpgroup"
    assert params.approx_math
    assert params.unsafe_no_auto_barriers


@pytest.mark.parametrize(
    ("shape", "swizzle", "message"),
    [
        ((64, 64), 256, r"swizzle must be one of \(128, 64, 32\) bytes; got 256"),
        ((64, 80), 128, "multiples of 8 and 64 for bfloat16 and swizzle 128; got shape"),
        ((60, 64), 128, "multiples of 8 and 64"),
        ((64,), 128, "multiples of 8 and 64"),
    ],
)
def test_tiled_smem_refuses(shape: tuple[int, ...], swizzle: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mosaic.tiled_smem(shape, jnp.bfloat16, swizzle)


@pytest.mark.parametrize(("columns", "swizzle"), [(64, 128), (96, 64), (80, 32)])
def test_tiled_smem_keeps_the_logical_shape(columns: int, swizzle: int) -> None:
    assert mosaic.tiled_smem((2, 64, columns), jnp.bfloat16, swizzle).shape == (2, 64, columns)


def test_import_needs_no_cuda_packages() -> None:
    program = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nvidia", "jax_cuda12_plugin", "jax_cuda13_plugin") or (
            name.startswith("jax_plugins.")
        ):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import pallas_kernels.mosaic
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
