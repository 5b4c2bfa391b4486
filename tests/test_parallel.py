"""Attention of a sequence divided among eight devices, against that of one."""

from __future__ import annotations

import doctest
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxflash
from jaxflash.parallel import ring, ulysses
from tests import two_processes

_T = 64
_IDS = np.repeat(np.array([[0, 1, 2, 3], [0, 0, 1, 2]], np.int32), _T // 4, axis=1)
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (11, 3)},
    "causal window": {"is_causal": True, "local_window_size": (5, 0)},
    "documents": {"is_causal": True, "query_segment_ids": _IDS, "key_value_segment_ids": _IDS},
    "soft cap and scale": {"is_causal": True, "logits_soft_cap": 3.0, "scale": 0.4},
    "alibi and sinks": {
        "is_causal": True,
        "alibi_slopes": np.linspace(0.1, 0.5, 8, dtype=np.float32),
        "sinks": np.linspace(-1, 2, 8, dtype=np.float32),
    },
}
_BY_HEAD, _BY_TOKEN = ("alibi_slopes", "sinks"), ("query_segment_ids", "key_value_segment_ids")


def _arrays(N: int = 8, K: int = 4) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (N, K, K)
    return tuple(jax.random.normal(k, (2, _T, n, 8)) for k, n in zip(keys, heads, strict=True))


def _divided(
    attention: Callable[..., Any], axes: tuple[str, ...], sizes: tuple[int, ...], check_vma: bool
) -> Callable[..., Any]:
    """Over the devices of a mesh; arrays of tokens are divided, those of heads are not."""
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), axes)
    by_token = P(None, axes)

    def run(qkv: Any, arrays: dict[str, Any], static: dict[str, Any]) -> jax.Array:
        specs = {k: by_token if k in _BY_TOKEN else P() for k in arrays}
        return jax.shard_map(
            lambda qkv, arrays: attention(*qkv, **arrays, **static),
            mesh=mesh,
            in_specs=((by_token,) * 3, specs),
            out_specs=by_token,
            check_vma=check_vma,
        )(qkv, arrays)

    return run


def _check(run: Callable[..., Any], options: dict[str, Any], qkv: tuple[jax.Array, ...]) -> None:
    """The result and all gradients."""
    arrays = {k: jnp.asarray(x) for k, x in options.items() if k in _BY_HEAD + _BY_TOKEN}
    static = {k: x for k, x in options.items() if k not in arrays}
    floating = {k: x for k, x in arrays.items() if k in _BY_HEAD}
    ids = {k: x for k, x in arrays.items() if k in _BY_TOKEN}

    def loss(attend: Callable[..., Any], qkv: Any, floating: Any) -> tuple[jax.Array, jax.Array]:
        out = attend(qkv, floating | ids, static)
        return jnp.sum(jnp.sin(out)), out

    def whole(qkv: Any, arrays: Any, static: Any) -> jax.Array:
        return jaxflash.dot_product_attention(*qkv, **arrays, **static, implementation="reference")

    found, want = (
        jax.jit(jax.value_and_grad(functools.partial(loss, f), (0, 1), has_aux=True))(qkv, floating)
        for f in (run, whole)
    )
    for x, expected in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        # Sums over all tokens, as of slopes, are rounded in proportion to what is summed.
        atol = max(2e-5, 1e-6 * float(jnp.max(jnp.abs(expected), initial=0)))
        np.testing.assert_allclose(x, expected, 1e-5, atol)


@pytest.mark.parametrize(
    ("name", "check_vma"), [*((name, True) for name in OPTIONS), ("alibi and sinks", False)]
)
def test_ring(name: str, check_vma: bool) -> None:
    attend = functools.partial(jaxflash.ring_attention, axis_name="s", implementation="xla")
    _check(_divided(attend, ("s",), (8,), check_vma), OPTIONS[name], _arrays())


@pytest.mark.parametrize("name", ["full", "causal", "documents", "soft cap and scale"])
def test_striped_ring(name: str) -> None:
    attend = functools.partial(jaxflash.ring_attention, axis_name="s", layout="striped")
    divided = _divided(attend, ("s",), (8,), True)

    def run(qkv: Any, arrays: Any, static: Any) -> jax.Array:
        def turn(x: jax.Array) -> jax.Array:
            return jaxflash.stripe(x, 8)

        of_tokens = {k: turn(x) for k, x in arrays.items() if k in _BY_TOKEN}
        return jaxflash.unstripe(divided(tuple(map(turn, qkv)), arrays | of_tokens, static), 8)

    _check(run, OPTIONS[name], _arrays())


@pytest.mark.parametrize(
    ("name", "heads"),
    [*((name, (8, 2)) for name in OPTIONS), ("full", (8, 8)), ("causal", (16, 1))],
)
def test_ulysses(name: str, heads: tuple[int, int]) -> None:
    attend = functools.partial(jaxflash.ulysses_attention, axis_name="s", implementation="xla")
    _check(_divided(attend, ("s",), (8,), True), OPTIONS[name], _arrays(*heads))


def _ulysses(**options: Any) -> Any:
    """Over four devices, of whole arrays."""
    mesh, by_token = Mesh(np.array(jax.devices()[:4]), ("s",)), P(None, "s")
    attend = functools.partial(
        jaxflash.ulysses_attention, axis_name="s", implementation="xla", **options
    )
    return jax.jit(
        jax.shard_map(attend, mesh=mesh, in_specs=by_token, out_specs=by_token, check_vma=False)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"score_mod": lambda s, b, h, q, k: s * (1 + h)},
        {"mask_mod": lambda b, h, q, k: (q + k) % (h + 1) == 0},
        {"bias": np.random.default_rng(0).standard_normal((8, 1, 64)).astype(np.float32)},
        {"mask": np.random.default_rng(0).random((2, 8, 64, 64)) > 0.5},
        {"mask": np.tri(64, dtype=bool)},
    ],
    ids=["score_mod", "mask_mod", "bias", "mask", "mask of all heads"],
)
def test_ulysses_knows_all_heads(options: dict[str, Any]) -> None:
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 64, 8, 16)) for i in range(3))
    want = jaxflash.dot_product_attention(
        q, k, v, **options, return_residual=True, implementation="reference"
    )
    found = _ulysses(**options, return_residual=True)(q, k, v)
    for x, y in zip(found, want, strict=True):
        np.testing.assert_allclose(x, y, 1e-5, 2e-5)


def test_ulysses_drops_others_in_each_head() -> None:
    one = jnp.ones((1, 64, 8, 16))
    eye = jnp.broadcast_to(jnp.eye(64)[None, :, None], (1, 64, 8, 64))
    options = {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)}
    kept = np.asarray(_ulysses(**options)(one, one, eye)) > 0
    assert len({kept[0, :, head].tobytes() for head in range(8)}) == 8
    kept = np.asarray(_ulysses(**options, broadcast_dropout=True)(one, one, eye)) > 0
    assert len({kept[0, :, head].tobytes() for head in range(8)}) == 1


def test_ulysses_refuses_a_bias_of_other_heads() -> None:
    x = jnp.ones((1, 64, 8, 16))
    with pytest.raises(ValueError, match=r"of all 8 heads or of one; got \(2, 64, 64\)"):
        _ulysses(bias=jnp.ones((2, 64, 64)))(x, x, x)


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
def test_ring_with_x64(layout: str) -> None:
    mesh, by_token = Mesh(np.array(jax.devices()[:4]), ("s",)), P(None, "s")
    attend = functools.partial(
        jaxflash.ring_attention, axis_name="s", is_causal=True, layout=layout
    )
    run = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=by_token, out_specs=by_token))
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (1, 64, 2, 16), jnp.float32)
        ordered = jaxflash.stripe(x, 4) if layout == "striped" else x
        found = run(ordered, ordered, ordered)
        found = jaxflash.unstripe(found, 4) if layout == "striped" else found
        want = jaxflash.dot_product_attention(x, x, x, is_causal=True)
    np.testing.assert_allclose(found, want, 1e-5, 1e-5)


@pytest.mark.parametrize("name", ["causal", "window", "alibi and sinks"])
def test_ring_of_ulysses(name: str) -> None:
    """Two axes: heads are exchanged within one, keys go around the other."""
    inner = functools.partial(jaxflash.ring_attention, axis_name="ring")
    attend = functools.partial(jaxflash.ulysses_attention, axis_name="heads", attention=inner)
    _check(_divided(attend, ("ring", "heads"), (2, 4), True), OPTIONS[name], _arrays())


def test_residual_merges() -> None:
    """The lse is that of all keys, with its gradient."""
    q, k, v = _arrays()
    attend = functools.partial(
        jaxflash.ring_attention, axis_name="s", is_causal=True, return_residual=True
    )
    mesh = Mesh(np.array(jax.devices()[:4]), ("s",))
    divided = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "s"), out_specs=P(None, "s"))
    whole = functools.partial(jaxflash.dot_product_attention, is_causal=True, return_residual=True)
    found, want = (
        jax.jit(jax.value_and_grad(lambda q, f=f: f(q, k, v)[1].sum()))(q) for f in (divided, whole)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, want)


def test_keys_travel_while_a_step_computes() -> None:
    """In each step the next one's keys do not depend on what the step computes."""
    q, k, v = _arrays()
    attend = functools.partial(jaxflash.ring_attention, axis_name="s", is_causal=True)
    mesh = Mesh(np.array(jax.devices()[:8]), ("s",))
    divided = jax.shard_map(attend, mesh=mesh, in_specs=P(None, "s"), out_specs=P(None, "s"))
    text = jax.jit(divided).lower(q, k, v).as_text()
    # Keys and values, beside the first step and in a loop; nothing is gathered.
    assert text.count("collective_permute") == 4
    assert "all_gather" not in text


def test_errors() -> None:
    q, k, v = _arrays()
    mesh = Mesh(np.array(jax.devices()[:8]), ("s",))

    def call(function: Callable[..., Any], *arrays: jax.Array, **options: Any) -> Any:
        attend = functools.partial(function, axis_name="s", **options)
        by_token = P(None, "s")
        return jax.shard_map(attend, mesh=mesh, in_specs=by_token, out_specs=by_token)(*arrays)

    with pytest.raises(ValueError, match="striped sequences have no local_window_size"):
        call(jaxflash.ring_attention, q, k, v, layout="striped", local_window_size=3)
    with pytest.raises(ValueError, match="layout must be"):
        call(jaxflash.ring_attention, q, k, v, layout="zigzag")
    with pytest.raises(ValueError, match="as many keys as queries"):
        call(jaxflash.ring_attention, q, k[:, :32], v[:, :32], is_causal=True)
    with pytest.raises(ValueError, match="must divide the query's heads"):
        call(jaxflash.ulysses_attention, q[:, :, :4], k, v)
    with pytest.raises(ValueError, match="must divide the key-value heads"):
        call(jaxflash.ulysses_attention, *_arrays(24, 3))
    with pytest.raises(ValueError, match="do not divide 64 tokens"):
        jaxflash.stripe(q, 3)


def test_two_processes() -> None:
    """As on two hosts: a ring over the devices of both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={two_processes.DEVICES_EACH}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", address, str(process)],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(two_processes.PROCESSES)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for i, (process, text) in enumerate(zip(running, printed, strict=True)):
        assert process.returncode == 0, text
        assert f"process {i} of 2: equal" in text


@pytest.mark.parametrize("module", [ring, ulysses])
def test_examples_in_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 3
    assert result.failed == 0
