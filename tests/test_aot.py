"""Compiling for GPUs that are not here, and what it proves of kernels and of memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxflash
from bench import aot
from bench.gpus import GPUS
from bench.shapes import Shape, score_matrix_bytes
from tests import small_kernel
from tests.small_kernel import TILE, Form

NEEDS_COMPILER = aot.missing_packages()


def needs_compiler(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(NEEDS_COMPILER is not None, reason=str(NEEDS_COMPILER))
    return pytest.mark.aot(skip(test))


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _assert_fast(kernel: aot.Kernel) -> None:
    assert kernel.spill_store_bytes == kernel.spill_load_bytes == 0
    assert not [warning for warning in kernel.warnings if "serialized" in warning]
    assert 0 < kernel.registers <= 255


_SEGMENTS = jnp.zeros((1, 4096), jnp.int32)
# Every default configuration of the Hopper forward, by what leads to it.
FORWARDS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "h64_short": (64, 1024, {}),
    "h64_long": (64, 4096, {}),
    "h64_window": (64, 4096, {"local_window_size": (512, 0)}),
    "h64_causal": (64, 1024, {"is_causal": True}),
    "h64_causal_cap": (64, 4096, {"is_causal": True, "logits_soft_cap": 20.0}),
    "h64_segments": (
        64,
        4096,
        {"query_segment_ids": _SEGMENTS, "key_value_segment_ids": _SEGMENTS},
    ),
    "h128": (128, 4096, {}),
    "h128_causal": (128, 4096, {"is_causal": True}),
    "h128_tail": (128, 4088, {"is_causal": True}),
    "h128_window": (128, 4096, {"is_causal": True, "local_window_size": (512, 0)}),
    "h128_cap": (128, 4096, {"logits_soft_cap": 20.0}),
    "h128_causal_alibi": (128, 4096, {"is_causal": True, "alibi_slopes": jnp.ones(4)}),
    "h128_sinks": (128, 4096, {"is_causal": True, "sinks": jnp.ones(4)}),
    "h192": (192, 4096, {}),
    "h256": (256, 4096, {}),
    "h256_causal": (256, 4096, {"is_causal": True}),
}


@needs_compiler
@pytest.mark.parametrize("name", FORWARDS)
def test_hopper_forward_compiles_without_spills(name: str) -> None:
    head_dim, length, options = FORWARDS[name]

    def fn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jaxflash.dot_product_attention(q, k, v, **options, implementation="hopper")

    x = _bf16(1, length, 4, head_dim)
    (kernel,) = aot.compile_for(fn, x, x, x, gpu="h100").kernels
    assert kernel.name == "forward_kernel"
    # JAX 0.10.2's compiler spills where there are masks: known, slow there, and not wrong.
    if jax.__version_info__ >= (0, 11):
        _assert_fast(kernel)


@needs_compiler
def test_hopper_forward_of_long_causal_at_head_dim_64() -> None:
    """The one default that spills: once for each tile of queries, and still the fastest."""
    x = _bf16(1, 4096, 4, 64)

    def fn(q: jax.Array) -> jax.Array:
        return jaxflash.dot_product_attention(q, q, q, is_causal=True, implementation="hopper")

    (kernel,) = aot.compile_for(fn, x, gpu="h100").kernels
    if jax.__version_info__ >= (0, 11):
        assert kernel.spill_store_bytes <= 32
        assert not [warning for warning in kernel.warnings if "serialized" in warning]


@needs_compiler
def test_small_kernel_compiles_for_h100() -> None:
    program = aot.compile_for(small_kernel.scores, _bf16(256, 64), _bf16(512, 64), gpu="h100")
    (kernel,) = program.kernels
    assert kernel.name == "scores_kernel"
    _assert_fast(kernel)
    if kernel.instructions is None:
        pytest.skip("registers checked; instructions need the package nvidia-cuda-nvdisasm")
    assert kernel.count("HGMMA") > 0
    assert kernel.count("UTMALDG") > 0  # TMA loads
    assert kernel.count("MUFU") == 0
    assert program.output_bytes == 256 * 512 * 4


@needs_compiler
@pytest.mark.parametrize("form", small_kernel.FORMS)
def test_every_form_of_product_compiles_for_h100(form: Form) -> None:
    def fn(a: jax.Array, b: jax.Array, row: jax.Array) -> jax.Array:
        return small_kernel.product(a, b, row, form)

    row = jax.ShapeDtypeStruct((TILE,), jnp.float32)
    (kernel,) = aot.compile_for(fn, _bf16(TILE, TILE), _bf16(TILE, TILE), row).kernels
    _assert_fast(kernel)


@needs_compiler
def test_kernel_met_again_is_reported_again() -> None:
    structs = (_bf16(128, 64), _bf16(128, 64))

    def two_kernels(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = small_kernel.Config(block_kv=128)
        return small_kernel.scores(q, k), small_kernel.scores(k, q, wide)

    (alone,) = aot.compile_for(small_kernel.scores, *structs).kernels
    assert aot.compile_for(small_kernel.scores, *structs).kernels == (alone,)
    first, second = aot.compile_for(two_kernels, *structs).kernels
    assert first == alone
    assert second != alone


@needs_compiler
@pytest.mark.parametrize("gpu", GPUS)
def test_matmul_compiles_for_every_gpu(gpu: str) -> None:
    program = aot.compile_for(lambda x: x @ x + 1, _bf16(512, 512), gpu=gpu)
    assert program.gpu == gpu
    assert program.argument_bytes == program.output_bytes == 512 * 512 * 2
    assert program.peak_bytes >= program.argument_bytes + program.output_bytes
    assert program.kernels == ()


@needs_compiler
def test_standard_attention_holds_the_score_matrix_and_ours_does_not() -> None:
    shape = Shape(8, 2048, 2048, 32, 32, 64)
    matrix = score_matrix_bytes(shape)
    assert matrix == 8 * 32 * 2048 * 2048 * 2
    assert aot.temp_bytes(aot.standard_attention, shape, "forward", "h100") >= matrix
    assert aot.temp_bytes(aot.our_attention, shape, "forward", "h100") < matrix / 4


@needs_compiler
def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", "mine")
    environment = dict(os.environ)
    options = ("jax_platforms", "jax_enable_compilation_cache")
    config = [getattr(jax.config, option) for option in options]
    aot.compile_for(small_kernel.scores, _bf16(64, 64), _bf16(64, 64))
    assert dict(os.environ) == environment
    assert [getattr(jax.config, option) for option in options] == config
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_main_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main(["--gpu", "h100", "--seq", "512"]) == 0
    printed = capsys.readouterr().out
    assert "| H100 | 512 | forward " in printed
    assert "| scores 1024 x 1024 x 64 (harness) | H100 | " in printed


def test_unknown_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gpu must be one of a100, .*; got 'v100'"):
        aot.compile_for(lambda x: x, _bf16(8), gpu="v100")


def test_missing_packages_name_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "_PACKAGES", ("no-such-package",))
    with pytest.raises(ModuleNotFoundError, match=r"no-such-package: run `make aot`"):
        aot.compile_for(lambda x: x, _bf16(8))
    assert aot.main([]) == 1
    assert "run `make aot`" in capsys.readouterr().err


def test_report_of_a_slow_kernel_is_understood(tmp_path: Path) -> None:
    slow = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources in the function 'f_mosaic_gpu_kernel'"
    )
    (tmp_path / "my_kernel_3.ptxas").write_text(
        f"{slow}\nptxas info    : 0 bytes gmem\n"
        "    88 bytes stack frame, 112 bytes spill stores, 104 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem\n"
    )
    (tmp_path / "my_kernel_3.sass_ctrl").write_text(
        "   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28] \n"
        "   -:-:-:Y:01        /*0010*/              @!P0 MUFU.EX2 R4, R5 \n"
        "   -:-:-:Y:01        /*0020*/              @UP1 MUFU.RCP R4, R5 \n"
        "   -:-:-:Y:01        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] \n"
    )
    kernel = aot._read_report(tmp_path / "my_kernel_3.ptxas")
    assert (kernel.name, kernel.registers) == ("my_kernel", 168)
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes) == (112, 104)
    assert kernel.warnings == (slow,)
    assert [kernel.count(o) for o in ("HGMMA", "MUFU", "MUFU.EX2", "MU", "LDC")] == [1, 2, 1, 0, 1]


def test_report_without_disassembler_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "k_0.ptxas").write_text(
        "0 bytes spill stores, 0 bytes spill loads\nUsed 40 registers\n"
    )
    with pytest.raises(ValueError, match="nvidia-cuda-nvdisasm"):
        aot._read_report(tmp_path / "k_0.ptxas").count("HGMMA")
