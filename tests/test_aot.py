"""Compiling for GPUs that are not here, and what it proves of kernels and of memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import jaxflash
from bench import aot
from bench.gpus import GPUS
from bench.shapes import Shape, score_matrix_bytes
from jaxflash import native, tuning
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper, mosaic, triton
from pallas_kernels.common.evaluate import SUPPORTED
from tests import oracle, small_kernel
from tests.cases import CASES
from tests.small_kernel import TILE, Form

NEEDS_COMPILER = aot.missing_packages()


def needs_compiler(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(NEEDS_COMPILER is not None, reason=str(NEEDS_COMPILER))
    return pytest.mark.aot(skip(test))


def _bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _assert_fast(kernel: aot.Kernel, spilled: int = 0) -> None:
    assert max(kernel.spill_store_bytes, kernel.spill_load_bytes) <= spilled
    assert not [warning for warning in kernel.warnings if "serialized" in warning]
    assert 0 < kernel.registers <= 255


_BATCH, _HEADS = 8, 32  # so many tiles that the table's configurations are chosen
_SEGMENTS = np.zeros((_BATCH, 4096), np.int32)
_OF_MASK: dict[str, dict[str, Any]] = {
    "full": {},
    "band": {"is_causal": True},
    "modified": {"is_causal": True, "logits_soft_cap": 20.0},
    "data": {
        "is_causal": True,
        "query_segment_ids": _SEGMENTS,
        "key_value_segment_ids": _SEGMENTS,
    },
}


def _forwards() -> dict[str, tuple[int, int, int, dict[str, Any]]]:
    """H, Hv, length and options: one for every configuration in the table, then other forms."""
    rows = json.loads(tuning.TABLES.joinpath("h100.json").read_text())["rows"]
    found: dict[tuple[Any, ...], tuple[int, int, int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["mask"], row["head_dim"], *row["config"].values())
        found[key] = (row["head_dim"], row["head_dim"], row["length"], _OF_MASK[row["mask"]])
    window = {"is_causal": True, "local_window_size": (512, 0)}
    bias, of_heads = np.zeros((1, 1, 4096, 4096), jnp.bfloat16), np.ones(_HEADS, np.float32)
    return {"-".join(map(str, key)): x for key, x in found.items()} | {
        "window-64": (64, 64, 4096, window),
        "window-128": (128, 128, 4096, window),
        "tail-64": (64, 64, 4095, _OF_MASK["band"]),
        "tail-128": (128, 128, 4095, {}),
        "head-dim-72": (72, 72, 4095, _OF_MASK["band"]),
        "head-dim-80": (80, 80, 4096, {}),
        "head-dim-136": (136, 136, 4096, {}),
        "value-dim-128": (192, 128, 4096, _OF_MASK["band"]),
        "alibi-128": (128, 128, 4096, {"is_causal": True, "alibi_slopes": of_heads}),
        "sinks-128": (128, 128, 4096, {"is_causal": True, "sinks": of_heads}),
        "bias-128": (128, 128, 4096, {"bias": bias}),
        "mask-128": (128, 128, 4096, {"mask": bias == 0}),
    }


FORWARDS = _forwards()
# Bytes that are stored and loaded once a tile, before and after its visits; of a window in each of
# those that need a mask.
_SPILLED = {
    "band-128-3-128-2-1-False-True-False-2": 20,
    "data-256-2-64-2-1-False-False": 4,
    "window-64": 36,
    "bias-128": 8,
    "sinks-128": 16,
}
_ARRAYS = ("bias", "mask", "sinks", "alibi_slopes", "query_segment_ids", "key_value_segment_ids")


@needs_compiler
@pytest.mark.parametrize("name", FORWARDS)
def test_hopper_forward_compiles_without_spills(name: str) -> None:
    """But for `_SPILLED`."""
    head_dim, value_dim, length, options = FORWARDS[name]
    # As arguments: XLA would fold the map of a constant mask, for a minute.
    given = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in options.items() if n in _ARRAYS}
    static = {n: x for n, x in options.items() if n not in _ARRAYS}

    def fn(q: jax.Array, k: jax.Array, v: jax.Array, *arrays: jax.Array) -> jax.Array:
        by_name = dict(zip(given, arrays, strict=True))
        return jaxflash.dot_product_attention(q, k, v, **static, **by_name, implementation="hopper")

    q, v = (_bf16(_BATCH, length, _HEADS, columns) for columns in (head_dim, value_dim))
    (kernel,) = aot.compile_for(fn, q, q, v, *given.values(), gpu="h100").kernels
    assert kernel.name == "forward_kernel"
    # With JAX 0.10.2 the producer spills addresses where it has values to clean.
    cleans = name.startswith(("data", "mask")) and jax.__version_info__ < (0, 11)
    _assert_fast(kernel, spilled=80 if cleans else _SPILLED.get(name, 0))


@needs_compiler
@pytest.mark.parametrize("mask", ["full", "band"])
@pytest.mark.parametrize(("head_dim", "length"), [(64, 512), (64, 1024), (128, 512), (128, 1024)])
def test_hopper_forward_of_few_tiles_compiles_without_spills(
    mask: str, head_dim: int, length: int
) -> None:
    fn = functools.partial(
        jaxflash.dot_product_attention, **_OF_MASK[mask], implementation="hopper"
    )
    (kernel,) = aot.compile_for(fn, *(_bf16(1, length, 16, head_dim),) * 3, gpu="h100").kernels
    _assert_fast(kernel)


@needs_compiler
@pytest.mark.parametrize(
    ("head_dim", "length", "options"),
    [
        (64, 4096, {}),
        (64, 1024, {"is_causal": True}),
        (128, 4095, {"is_causal": True, "local_window_size": (512, 0)}),
        (128, 4096, {"is_causal": True, "logits_soft_cap": 30.0}),
        (256, 4096, {"is_causal": True}),
        (80, 4096, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("quantises", [False, True], ids=["rounded", "quantised"])
def test_fp8_compiles_without_spills(
    head_dim: int, length: int, options: dict[str, Any], quantises: bool
) -> None:
    def fn(*arrays: Any) -> jax.Array:
        attend = functools.partial(
            jaxflash.dot_product_attention, **options, implementation="hopper"
        )
        if not quantises:
            return attend(*arrays, precision="fp8")
        query, key, value = arrays
        quantize = jaxflash.quantize
        return attend(quantize(query), quantize(key), quantize(value, is_value=True))

    kernels = aot.compile_for(fn, *(_bf16(1, length, 4, head_dim),) * 3, gpu="h100").kernels
    *quantize, forward = kernels
    assert forward.name == "forward_kernel"
    _assert_fast(forward)
    if forward.instructions is not None:
        assert forward.count("QGMMA") > 0
        assert forward.count("HGMMA") == 0
    # Of keys and of values; head dims that 64 does not divide are rounded by XLA, and so is what
    # is quantised beforehand, where there are several devices.
    by_xla = quantises or head_dim % 64
    assert [x.name for x in quantize] == ["quantize_kernel"] * (0 if by_xla else 2)
    for kernel in quantize:
        _assert_fast(kernel)


class _Gradient(NamedTuple):
    """A backward: head dims, length, heads of the keys, options."""

    H: int
    length: int = 4096
    heads: int = 4
    options: dict[str, Any] | None = None
    Hv: int | None = None
    N: int = 4


_CAUSAL = {"is_causal": True}
BACKWARDS = {
    "full": _Gradient(128),
    "window": _Gradient(128, options=_CAUSAL | {"local_window_size": (512, 0)}),
    "tail": _Gradient(128, 4095),
    "soft-cap": _Gradient(128, options=_CAUSAL | {"logits_soft_cap": 20.0}),
    "lengths": _Gradient(128, options={"key_value_seq_lengths": np.array([4000], np.int32)}),
    "offset": _Gradient(128, options=_CAUSAL | {"query_offset": np.array([5], np.int32)}),
    "deterministic": _Gradient(128, options=_CAUSAL | {"deterministic": True}),
    "narrow": _Gradient(64),
    "narrow-causal": _Gradient(64, options=_CAUSAL),
    "narrow-deterministic": _Gradient(64, options=_CAUSAL | {"deterministic": True}),
    "wide": _Gradient(256),
    "wide-deterministic": _Gradient(256, options=_CAUSAL | {"deterministic": True}),
    "wide-keys": _Gradient(192, options=_CAUSAL, Hv=128),
    "grouped": _Gradient(128, heads=2, options=_CAUSAL),
    "wide-grouped": _Gradient(256, heads=2, options=_CAUSAL | {"logits_soft_cap": 20.0}),
    "divided-group": _Gradient(128, heads=1, options=_CAUSAL),
    "divided-large-group": _Gradient(128, 2048, 8, _CAUSAL, N=64),
    "divided-wide-group": _Gradient(256, heads=1, options=_CAUSAL | {"logits_soft_cap": 20.0}),
}


@needs_compiler
@pytest.mark.skipif(not mosaic.Sums.exist(), reason="this JAX has no gradients by the kernel")
@pytest.mark.parametrize("name", BACKWARDS)
def test_hopper_backward_compiles_without_spills(name: str) -> None:
    """Bias, gradients of slopes, and narrow heads' masks from data spill, see `bench/LOG.md`."""
    kernel = _backward_kernel(name, native.backward)
    # The compiler of JAX 0.12 spills a number, loaded six times, where the producer tells of rows.
    spilled = {"narrow-deterministic": 8}
    if jax.__version_info__ >= (0, 12):
        spilled |= dict.fromkeys(("lengths", "offset"), 24)
    _assert_fast(kernel, spilled=spilled.get(name, 0))


@needs_compiler
@pytest.mark.skipif(not mosaic.Sums.exist(), reason="this JAX has no gradients by the kernel")
@pytest.mark.parametrize("name", ["full", "window", "narrow-causal", "wide"])
def test_hopper_backward_that_rounds_compiles_without_spills(name: str) -> None:
    def rounding(problem: Any, *arrays: Any) -> Any:
        config = dataclasses.replace(hopper.BackwardConfig.default(problem), rounds=True)
        return hopper.backward(problem, *arrays, config)

    _assert_fast(_backward_kernel(name, rounding))


def _backward_kernel(name: str, backward: Callable[..., Any]) -> aot.Kernel:
    case = BACKWARDS[name]

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array) -> Any:
        problem, operands = canonicalize(q, k, v, **(case.options or {}))
        return backward(problem, operands, out, lse, out, lse)

    Hv = case.Hv or case.H
    q, k, v, out = (
        _bf16(1, case.length, heads, columns)
        for heads, columns in (
            (case.N, case.H),
            (case.heads, case.H),
            (case.heads, Hv),
            (case.N, Hv),
        )
    )
    lse = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
    (kernel,) = aot.compile_for(gradients, q, k, v, out, lse, gpu="h100").kernels
    assert kernel.name == "backward_kernel"
    return kernel


def _triton_forms() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every size of head in each kernel, then everything else at once."""
    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    attend = functools.partial(
        jaxflash.dot_product_attention, is_causal=True, implementation="triton"
    )

    def loss(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        return jnp.sum(function(*arrays).astype(jnp.float32))

    for columns in (64, 128, 256):
        q, k = _bf16(2, 1000, 8, columns), _bf16(2, 1000, 2, columns)
        forms[f"forward-{columns}"] = (attend, (q, k, k))
        gradients = jax.grad(functools.partial(loss, attend), (0, 1, 2))
        forms[f"backward-{columns}"] = (gradients, (q, k, k))
        pages = _bf16(99, 16, 2, columns)
        numbers = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, 64), (2,))]
        decode = functools.partial(jaxflash.paged_attention, implementation="triton")
        forms[f"decode-{columns}"] = (decode, (_bf16(2, 1, 8, columns), pages, pages, *numbers))
    for dtype in (jnp.float8_e4m3fn, jnp.int8):
        pages = jax.ShapeDtypeStruct((99, 16, 2, 64), dtype)
        scales = (jax.ShapeDtypeStruct((99, 2), jnp.float32),) * 2

        def widening(*arrays: Any) -> jax.Array:
            *others, key_scale, value_scale = arrays
            return decode(*others, key_scale=key_scale, value_scale=value_scale)

        arrays = _bf16(2, 1, 8, 64), pages, pages, *numbers, *scales
        forms[f"decode-{jnp.dtype(dtype)}"] = (widening, arrays)

    def everything(q: Any, k: Any, v: Any, bias: Any, slopes: Any, ids: Any, table: Any) -> Any:
        def plain(q: Any, k: Any, v: Any, bias: Any, slopes: Any) -> jax.Array:
            return attend(
                q, k, v, bias, alibi_slopes=slopes, query_segment_ids=ids,
                key_value_segment_ids=ids, dropout_rate=0.1, dropout_key=jax.random.key(0),
            )  # fmt: skip

        def modified(q: Any, k: Any, v: Any) -> jax.Array:
            def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                return s + table[h, jnp.clip(i - j, 0, 31)] * jnp.cos(s)

            return attend(
                q, k, v, logits_soft_cap=20.0, score_mod=score,
                mask_mod=lambda b, h, i, j: (i - j) % 3 != 1, local_window_size=(500, 0),
            )  # fmt: skip

        arrays = q, k, v
        first = jax.grad(functools.partial(loss, plain), (0, 1, 2, 3, 4))(*arrays, bias, slopes)
        return first, jax.grad(functools.partial(loss, modified), (0, 1, 2))(*arrays)

    def sharded(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mesh, by_head = jax.sharding.get_abstract_mesh(), PartitionSpec(None, None, "device")
        return jax.shard_map(attend, mesh=mesh, in_specs=by_head, out_specs=by_head)(q, k, v)

    x, f32 = _bf16(2, 1000, 8, 128), jnp.float32
    forms["shard_map"] = (jax.grad(functools.partial(loss, sharded), (0, 1, 2)), (x, x, x))
    others = [
        jax.ShapeDtypeStruct(*s) for s in (((8,), f32), ((2, 1000), jnp.int32), ((8, 32), f32))
    ]
    forms["everything"] = (everything, (x, x, x, _bf16(1, 8, 1000, 1000), *others))
    return forms


TRITON = _triton_forms()
_ON_EVERY_CARD = ("forward-128", "backward-256", "everything", "decode-float8_e4m3fn")


@needs_compiler
@pytest.mark.parametrize(
    ("name", "gpu"),
    [(name, gpu) for name in TRITON for gpu in GPUS if gpu == "a100" or name in _ON_EVERY_CARD],
)
def test_triton_kernels_compile_for_every_card(name: str, gpu: str) -> None:
    """Within the shared memory that each has; XLA refuses what is not."""
    function, structs = TRITON[name]
    assert aot.compile_for(function, *structs, gpu=gpu).temp_bytes > 0


_NUMBERS = (
    "one_token", "query_lengths", "key_value_lengths", "score_mod_per_head",
    "score_mod_steep_at_zero",
)  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("name", _NUMBERS)
def test_triton_knows_what_numbers_are(name: str) -> None:
    """Pallas-Triton guesses their dtypes, and lacks operations of constants and of 16 bits."""
    case = next(case for case in CASES if case.name == name).in_16_bits()
    attention = functools.partial(
        jaxflash.dot_product_attention, implementation="triton", return_residual=True
    )
    function, floating = oracle.computation(case, case.arrays(), attention)
    structs = jax.eval_shape(lambda: floating)
    assert aot.compile_for(function, structs, gpu="h100").temp_bytes > 0


@needs_compiler
def test_triton_kernels_that_do_not_fit_do_not_compile() -> None:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        problem, operands = canonicalize(q, k, v)
        return triton.forward(problem, operands, triton.Config(128, 128, 8, 4))[0]

    x = _bf16(1, 1024, 1, 256)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        aot.compile_for(attend, x, x, x, gpu="a10g")


@needs_compiler
@pytest.mark.skipif(not mosaic.Sums.exist(), reason="this JAX has no gradients by the kernel")
def test_ring_of_eight_gpus_computes_while_it_transfers() -> None:
    """In each loop all transfers start before the step's kernels and end after them."""
    mesh, by_token = aot.mesh_of("h100", 8), PartitionSpec(None, "device")
    ring = functools.partial(
        jaxflash.ring_attention, axis_name="device", is_causal=True, layout="striped",
        implementation="hopper",
    )  # fmt: skip

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attend = jax.shard_map(ring, mesh=mesh.abstract_mesh, in_specs=by_token, out_specs=by_token)
        return jnp.sum(attend(q, k, v).astype(jnp.float32))

    x, sharding = _bf16(1, 131072, 32, 128), NamedSharding(mesh, by_token)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=sharding)
        lowered = jitted.lower(x, x, x)
    text = lowered.compile(compiler_options=jaxflash.RING_COMPILER_OPTIONS).as_text()
    assert "all-gather" not in text
    computations = re.split(r"\n(?=%|ENTRY)", text)
    loops = [c for c in computations if "permute-start(" in c and not c.startswith("ENTRY")]
    orders = [
        re.findall(r"= .*?\b(collective-permute-start|custom-call|collective-permute-done)\(", c)
        for c in loops
    ]
    # The forward's K and V, the backward's K, V, dK and dV: all of a step in one transfer.
    beside = ["collective-permute-start", "custom-call", "collective-permute-done"]
    assert orders == 2 * [beside]
    # The first steps, and the last: of the forward a kernel alone, of the backward the gradients'
    # transfer beside it and one more.
    (entry,) = (c for c in computations if c.startswith("ENTRY"))
    found = re.findall(rf"= .*?\b({'|'.join(beside)}|while)\(", entry)
    assert found[:4] == [*beside, "while"]
    assert found[4:6] == ["custom-call", "custom-call"]
    assert found[6] == "while"
    assert found[7:10] == beside


@needs_compiler
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_kernels_of_eight_gpus_gather_nothing(backend: str) -> None:
    """Under jit alone, with batch and heads sharded; what the slopes get is summed."""
    gpus = aot.mesh_of("h100", 8)
    mesh = jax.sharding.Mesh(gpus.devices.reshape(2, 4), ("data", "model"))
    by_head, by_slope, alike = (
        NamedSharding(mesh, PartitionSpec(*axes))
        for axes in (("data", None, "model"), ("model",), ())
    )

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array) -> jax.Array:
        out = jaxflash.dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            alibi_slopes=slopes,
            implementation=backend,  # type: ignore[arg-type]
        )
        return jnp.sum(out.astype(jnp.float32))

    q, k, slopes = _bf16(4, 1024, 16, 128), _bf16(4, 1024, 8, 128), _bf16(16)
    with jax.sharding.use_abstract_mesh(gpus.abstract_mesh):
        jitted = jax.jit(
            jax.value_and_grad(loss, (0, 1, 2, 3)),
            in_shardings=(by_head, by_head, by_head, by_slope),
            out_shardings=(alike, (by_head, by_head, by_head, by_slope)),
        )
        text = jitted.lower(q, k, k, slopes).compile().as_text()
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "all-reduce" in text
    kernels = {"hopper": "mosaic_gpu", "triton": "xla.gpu.triton"}[backend]
    assert kernels in text
    assert "bf16[2,1024,4,128]" in text  # the query of one device


class _Decode(NamedTuple):
    """New tokens of 32 heads, in groups of four, against a cache."""

    H: int = 128
    T: int = 1
    page_size: int | None = None
    options: dict[str, Any] | None = None
    held: str | None = None  # dtype of pages of 8 bits
    tokens: int = 16384  # of a sequence: where there are few, tiles are small


_OF_DECODE = {
    "logits_soft_cap": 20.0, "local_window_size": (8192, 0),
    "sinks": np.zeros(32, np.float32), "alibi_slopes": np.ones(32, np.float32),
}  # fmt: skip
DECODES = {
    "contiguous": _Decode(),
    "narrow": _Decode(64, T=4),
    "wide": _Decode(256),
    "pages-16": _Decode(page_size=16),
    "pages-256": _Decode(page_size=256),
    "options": _Decode(page_size=64, options=_OF_DECODE),
    "soft-cap": _Decode(options={"logits_soft_cap": 20.0}),
    "chunk": _Decode(T=512, page_size=64),
    "fp8": _Decode(page_size=64, held="float8_e4m3fn"),
    "fp8-narrow": _Decode(H=64, page_size=64, held="float8_e4m3fn"),
    "fp8-rows-options": _Decode(T=8, page_size=16, held="float8_e4m3fn", options=_OF_DECODE),
    "fp8-pages-16": _Decode(page_size=16, held="float8_e4m3fn", options=_OF_DECODE),
    "fp8-many-rows": _Decode(T=16, page_size=64, held="float8_e4m3fn"),
    "int8": _Decode(page_size=256, held="int8"),
    "int8-pages-16": _Decode(H=64, page_size=16, held="int8"),
    "short": _Decode(tokens=1024),
}  # fmt: skip


# Bytes of addresses that are stored once a tile, before its visits, and loaded once.
_SPILLED_SINCE_0_12 = {"fp8-many-rows": 16}


@needs_compiler
@pytest.mark.parametrize("name", DECODES)
def test_hopper_decode_compiles_without_spills(name: str) -> None:
    case = DECODES[name]

    def attend(q: Any, k: Any, v: Any, lengths: Any, table: Any, scale: Any) -> Any:
        options = {**(case.options or {}), "implementation": "hopper"}
        if table is None:
            return jaxflash.decode_attention(q, k, v, lengths, **options)
        scales = {"key_scale": scale, "value_scale": scale}
        return jaxflash.paged_attention(q, k, v, table, lengths, **scales, **options)

    query, lengths = _bf16(8, case.T, 32, case.H), jax.ShapeDtypeStruct((8,), jnp.int32)
    cache, table, scale = _bf16(8, case.tokens, 8, case.H), None, None
    if case.page_size is not None:
        table = jax.ShapeDtypeStruct((8, case.tokens // case.page_size), jnp.int32)
        pages = 700, case.page_size, 8, case.H
        cache = jax.ShapeDtypeStruct(pages, case.held or jnp.bfloat16)
        scale = case.held and jax.ShapeDtypeStruct((700, 8), jnp.float32)
    program = aot.compile_for(attend, query, cache, cache, lengths, table, scale)
    (kernel,) = program.kernels
    if jax.__version_info__ < (0, 11):  # the producer spills addresses where it cleans values
        spilled = 80
    else:
        spilled = _SPILLED_SINCE_0_12.get(name, 0) if jax.__version_info__ >= (0, 12) else 0
    _assert_fast(kernel, spilled=spilled)


@needs_compiler
@pytest.mark.skipif(not mosaic.Sums.exist(), reason="this JAX has no gradients by the kernel")
def test_hopper_gradients_need_memory_linear_in_length() -> None:
    """The output, lse, delta, and dQ in float32: what is there beside arguments and results."""

    def temporary(length: int) -> int:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            out = jaxflash.dot_product_attention(q, k, v, implementation="hopper")
            return jnp.sum(out.astype(jnp.float32))

        x = _bf16(1, length, 4, 128)
        return aot.compile_for(jax.grad(loss, (0, 1, 2)), x, x, x, gpu="h100").temp_bytes

    short, long = temporary(2048), temporary(8192)
    assert long <= 4.1 * short
    one = 8192 * 4 * 128 * 2
    assert long <= 6 * one


@needs_compiler
def test_every_operation_that_is_accepted_compiles() -> None:
    """In one score_mod, differentiated; what that does not use the table must not list."""
    used = set()

    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        f, d = s * 0.5, q - k
        f = f + jnp.exp(f) + jnp.exp2(f) + jnp.log(f) + jnp.log2(f) + jnp.tanh(f) + jnp.sin(f)
        f = f + jnp.cos(f) + jnp.sqrt(f) + lax.rsqrt(f) - jnp.round(f) + jnp.floor(f) + jnp.ceil(f)
        f = f / (k + 1.0) + jnp.log1p(f) + jnp.expm1(f) + jnp.power(f, 2.5) + f**3 + f**-2
        f = f + jnp.square(f) + jax.nn.sigmoid(f) + lax.erf(f) + jnp.sign(f) + jnp.abs(f) - (-f)
        f = jnp.maximum(f, jnp.minimum(s, 1.0)) + lax.clamp(-1.0, f, 1.0) + lax.stop_gradient(f)
        f = jnp.where(jnp.isfinite(f), f, 0.0) + lax.reshape(f, ())
        i = lax.rem(q, k + 1) + lax.div(q, k + 1) + (q << 2) + (q >> 1) + ~q + jnp.sign(d)
        i = i + lax.shift_right_logical(q, 1) + (q & 3) + (q | 4) + (q ^ k) + b + h
        seen = (d > 1) | (d < -5) ^ (d >= 9) & (d <= 90) | (q == k) | (q != 3) & ~(q > k)
        return jnp.where(seen, f, i.astype(jnp.float32))

    def fn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        problem, _ = canonicalize(q, k, v, score_mod=score_mod)
        used.update(_primitives(problem.score_mod.with_slope.jaxpr))  # type: ignore[union-attr]
        return jaxflash.dot_product_attention(q, k, v, score_mod=score_mod, implementation="hopper")

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.grad(lambda q: jnp.sum(fn(q, k, v).astype(jnp.float32)))(q)

    x = _bf16(1, 256, 2, 64)
    kernels = aot.compile_for(gradient, x, x, x).kernels
    assert len(kernels) == 1 + mosaic.Sums.exist()
    # Written by transformations, or spelled otherwise by another version of JAX.
    silent = {"copy", "copy_p", "add_any", "stop_gradient", "broadcast_in_dim", "reshape", "log2"}
    silent |= {"reshard", "one_minus_square", "polynomial", "bitcast_convert_type"}
    assert SUPPORTED - used - silent == set()


def _primitives(jaxpr: Any) -> set[str]:
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for x in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                found |= _primitives(inner)
    return found


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
def test_main_prints_both_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [shown for shown in aot._shown_kernels() if "H128 causal" in shown[0]]
    monkeypatch.setattr(aot, "_shown_kernels", lambda: one)
    assert aot.main(["--gpu", "h100", "--seq", "512"]) == 0
    printed = capsys.readouterr().out
    assert "| H100 | 512 | forward " in printed
    assert "| hopper forward B1 T4096 N8/8 H128 causal bfloat16 | H100 | " in printed


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
