"""The Triton kernels beyond the table of cases: tiles of any size, schedules, cards, refusals."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxflash
from jaxflash import portable
from jaxflash.arguments import canonicalize
from pallas_kernels import spec, triton
from pallas_kernels.triton import config
from pallas_kernels.triton.decode import choose_splits
from tests import oracle
from tests.test_conformance import running


def _call(**options: Any) -> tuple[spec.Problem, spec.Operands]:
    query, key, value = (
        jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
        for i, shape in enumerate([(2, 90, 4, 24), (2, 120, 2, 24), (2, 120, 2, 40)])
    )
    return canonicalize(query, key, value, **options)


def _reference(problem: spec.Problem, operands: spec.Operands, **options: Any) -> Any:
    arrays = operands.query, operands.key, operands.value
    return jaxflash.dot_product_attention(
        *arrays, **options, implementation="reference", return_residual=True
    )


@pytest.mark.parametrize(
    "change",
    [
        {"block_q": 16, "block_kv": 128},
        {"block_q": 128, "block_kv": 16},
        {"block_q": 32, "block_kv": 32, "schedule": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_of_any_size(change: dict[str, Any], is_causal: bool) -> None:
    """Also one program for all tiles of a head, as FlashAttention-1 has it."""
    problem, operands = _call(is_causal=is_causal)
    c = config.Config(**change)
    with running("triton"):
        out, lse = triton.forward(problem, operands, c)
    want, want_lse = _reference(problem, operands, is_causal=is_causal)
    np.testing.assert_allclose(np.float32(out), np.float32(want), atol=0.02)
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)


@pytest.mark.parametrize("blocks", [((16, 64), (64, 16)), ((64, 16), (16, 32))], ids=str)
def test_gradients_with_tiles_of_any_size(blocks: tuple[tuple[int, int], ...]) -> None:
    """Of keys and of rows, whose kernels need not have the same."""
    problem, operands = _call(is_causal=True)
    c = triton.BackwardConfig(*(config.Config(*sizes) for sizes in blocks))
    out, lse = _reference(problem, operands, is_causal=True)
    dout, dlse = jnp.ones_like(out), jnp.ones_like(lse)
    with running("triton"):
        found = triton.backward(problem, operands, out, lse, dout, dlse, c)
    _, pull = jax.vjp(
        lambda q, k, v: _reference(
            problem, operands._replace(query=q, key=k, value=v), is_causal=True
        ),
        *operands[:3],
    )
    for mine, want in zip(found[:3], pull((dout, dlse)), strict=True):
        np.testing.assert_allclose(np.float32(mine), np.float32(want), atol=0.06, rtol=0.02)


def test_gradients_are_equal_in_every_run() -> None:
    """No sum depends on an order that changes, unless batch or heads share a bias."""
    query = jax.random.normal(jax.random.key(0), (2, 300, 8, 16), jnp.bfloat16)
    key, value = query[:, :, :2], query[:, :, 2:4]
    shared = jnp.zeros((1, 8, 300, 300), jnp.bfloat16)
    own = jnp.zeros((2, 8, 300, 300), jnp.bfloat16)

    def refusal(bias: jax.Array) -> str | None:
        with running("triton"):
            problem, _ = canonicalize(query, key, value, bias, deterministic=True)
            return triton.supports_backward(problem)

    assert refusal(shared) == "adds a bias's gradient up over batch and heads in no fixed order"
    assert refusal(own) is None

    def loss(*arrays: jax.Array) -> jax.Array:
        out = jaxflash.dot_product_attention(*arrays, deterministic=True, implementation="triton")
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    with running("triton"):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
        first, *others = (gradients(query, key, value, own) for _ in range(3))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    assert all(bool(jnp.any(x != 0)) for x in first)


def test_inside_shard_map() -> None:
    """Gradients too, also of a bias that is added to.

    The interpreter cannot run with check_vma; test_aot compiles that.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("head",))
    by_head = P(None, None, "head")
    given = _call()[1].query
    bias = jnp.linspace(0, 1, 90 * 90).reshape(1, 1, 90, 90)

    def gradient(attend: Any, dtype: Any) -> jax.Array:
        def loss(bias: jax.Array) -> jax.Array:
            out = attend(*(given.astype(dtype),) * 3, bias)
            return jnp.sum(jnp.sin(out.astype(jnp.float32)))

        return jax.jit(jax.grad(loss))(bias)

    def by_reference(compute_dtype: Any) -> Any:
        attention = oracle.reference_in(compute_dtype)
        return lambda *arrays: attention(*arrays)[0]

    sharded = jax.shard_map(
        functools.partial(jaxflash.dot_product_attention, implementation="triton"),
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, P()),
        out_specs=by_head,
        check_vma=False,
    )
    with running("triton"):
        found = gradient(sharded, jnp.bfloat16)
    attained, truth = (
        gradient(by_reference(of), dtype)
        for of, dtype in ((jnp.bfloat16, jnp.bfloat16), (None, jnp.float32))
    )
    oracle.check_array("bias", *map(np.asarray, (found, attained, truth)), jnp.bfloat16)


def test_refusals() -> None:
    def refusal(kind: str, **changes: Any) -> str | None:
        problem, _ = _call()
        device = spec.Device("gpu", kind)
        return triton.supports(dataclasses.replace(problem, device=device, **changes))

    for kind in (
        "NVIDIA A100-SXM4-80GB", "NVIDIA A10G", "NVIDIA L4", "NVIDIA GeForce RTX 4090",
        "NVIDIA RTX 2000 Ada Generation",
    ):  # fmt: skip
        assert refusal(kind) is None
    for kind in (
        "Tesla V100-SXM2-16GB", "NVIDIA GeForce GTX 1080", "gfx942", "Tesla T4", "NVIDIA T1000",
        "NVIDIA GeForce RTX 2080 Ti", "NVIDIA V100",
    ):  # fmt: skip
        assert refusal(kind) == f"needs an NVIDIA GPU, Ampere or later; this device is {kind}"


def test_without_pallas_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX has deprecated it: where it is gone, the backend says so, and others run."""

    def gone(name: str) -> Any:
        raise ImportError(f"cannot import {name}")

    portable._kernels.cache_clear()
    monkeypatch.setattr(portable.importlib, "import_module", gone)
    x = jax.ShapeDtypeStruct((2, 8, 4, 16), jnp.bfloat16)
    explanation = jaxflash.explain(x, x, x)
    why = "this JAX has no Pallas-Triton: cannot import pallas_kernels.triton"
    assert explanation.refusals["triton"] == why
    assert explanation.runs == ("xla" if jax.default_backend() == "cpu" else "hopper")
    portable._kernels.cache_clear()


def test_configurations_hold_what_cards_have() -> None:
    for kind, memory in (
        ("NVIDIA A100-SXM4-80GB", 163), ("NVIDIA A10G", 99), ("NVIDIA H200", 227),
        ("NVIDIA RTX A1000", 99),
    ):  # fmt: skip
        assert config.shared_memory_kib(spec.Device("gpu", kind)) == memory
    with pytest.raises(ValueError, match="block_q must be a power of two"):
        config.Config(block_q=48)


def test_parts_fill_the_card() -> None:
    """Few tiles against many keys: a part for each multiprocessor, twice; never without keys."""
    problem, _ = _call()
    device = spec.Device("gpu", "NVIDIA A100-SXM4-80GB")
    struct = jax.ShapeDtypeStruct
    cache = struct((1, 32768, 8, 128), jnp.bfloat16)
    operands = problem.operands._replace(
        query=struct((1, 1, 32, 128), jnp.bfloat16), key=cache, value=cache
    )
    long = dataclasses.replace(problem, operands=operands, device=device)
    assert choose_splits(long, config.decode_config(long)) == 27  # of 8 heads, for 2 x 108
    short = dataclasses.replace(problem, device=device)
    assert choose_splits(short, config.decode_config(short)) == 2  # of 120 keys, 64 each
