"""The implementations a table offers: standard, cuDNN, installed peers, this library's."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxflash
from bench.shapes import Shape
from jaxflash.arguments import canonicalize

Attention = Callable[..., jax.Array]  # (query, key, value, *, is_causal, further options)

# Defines the meaning, as this package's own reference does; no row of a table of times.
_NOT_OFFERED = ("reference",)
_ANY_SHAPE = Shape(1, 128, 128, 1, 1, 64)
_HALF = ("bfloat16", "float16")
FA3_HEAD_DIM = 128  # the only one in flash-attn3-jax's published wheels


def _accepts_all(shape: Shape, device: jax.Device) -> str | None:
    del shape, device
    return None


def _no_note(shape: Shape) -> str | None:
    del shape
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of a table; `unavailable` says why it cannot run here at all."""

    name: str
    summary: str
    call: Attention | None
    unavailable: str | None = None
    refuse: Callable[[Shape, jax.Device], str | None] = _accepts_all
    note: Callable[[Shape], str | None] = _no_note

    def refusal(self, shape: Shape, device: jax.Device) -> str | None:
        """Why this row has no number for a shape; None when it can run."""
        return self.unavailable or self.refuse(shape, device)


def catalogue() -> list[Implementation]:
    """Every implementation in the order of the tables, whether it can run here or not."""
    return [standard(), cudnn(), tokamax(), flash_attn3(), flash_attn1(), *ours()]


def select(names: Sequence[str] | None) -> list[Implementation]:
    """The implementations asked for by name; all of them when `names` is None."""
    offered = {implementation.name: implementation for implementation in catalogue()}
    if names is None:
        return list(offered.values())
    unknown = [name for name in names if name not in offered]
    if unknown:
        raise ValueError(f"no implementation {unknown}; choose from {list(offered)}")
    return [offered[name] for name in names]


def standard() -> Implementation:
    """jax.nn's "xla": the attention that holds the T x S matrix, which ratios refer to."""
    call = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    return Implementation("standard", 'jax.nn.dot_product_attention, "xla"', call)


def cudnn() -> Implementation:
    """jax.nn's "cudnn"."""
    call = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    refuse = functools.partial(_needs_nvidia, name="cuDNN")
    return Implementation("cudnn", 'jax.nn.dot_product_attention, "cudnn"', call, refuse=refuse)


def ours() -> list[Implementation]:
    """One row for each backend of this library, in the order in which it tries them."""
    backends = jaxflash.explain(*_ANY_SHAPE.structs()).refusals
    return [
        Implementation(
            f"jaxflash-{backend}",
            f'jaxflash.dot_product_attention, "{backend}"',
            functools.partial(_call_ours, backend),
            refuse=functools.partial(_backend_refusal, backend=backend),
        )
        for backend in backends
        if backend not in _NOT_OFFERED
    ]


def best_of_ours() -> Implementation:
    """This library with the backend that it chooses by itself."""
    summary = "jaxflash.dot_product_attention"
    return Implementation("jaxflash", summary, jaxflash.dot_product_attention)


def tokamax() -> Implementation:
    """Mosaic GPU kernels of tokamax, when that package is installed."""
    module, reason = _peer("tokamax")
    call = module and functools.partial(module.dot_product_attention, implementation="mosaic")
    refuse = functools.partial(_needs_nvidia, name="tokamax's Mosaic kernels")
    return Implementation(
        "tokamax", 'tokamax.dot_product_attention, "mosaic"', call, reason, refuse
    )


def flash_attn3() -> Implementation:
    """FlashAttention-3's own CUDA through flash-attn3-jax, when that package is installed."""
    module, reason = _peer("flash_attn3_jax")
    call = module and functools.partial(_call_flash_attn3, module.flash_mha)
    return Implementation(
        "fa3", "flash_attn3_jax.flash_mha", call, reason, _flash_attn3_refusal, _flash_attn3_note
    )


def flash_attn1() -> Implementation:
    """This library's Triton kernel with a program for each head, as FlashAttention-1 has it."""
    refuse = functools.partial(_backend_refusal, backend="triton")
    summary = "jaxflash's triton kernel, one program a head (FlashAttention-1)"
    return Implementation("fa1", summary, _call_flash_attn1, refuse=refuse)


def _call_flash_attn1(
    query: jax.Array, key: jax.Array, value: jax.Array, *, is_causal: bool
) -> jax.Array:
    kernels = importlib.import_module("pallas_kernels.triton")
    problem, operands = canonicalize(query, key, value, is_causal=is_causal)
    config = dataclasses.replace(kernels.forward_config(problem), schedule=1)
    return kernels.forward(problem, operands, config)[0]


def fa3_kvcache() -> tuple[Callable[..., Any] | None, str | None]:
    """FlashAttention-3 against a cache, or why it is not there."""
    module, reason = _peer("flash_attn3_jax")
    return module and module.flash_mha_with_kvcache, reason


def _peer(module_name: str) -> tuple[Any, str | None]:
    """Imports an optional package; says why when it cannot."""
    try:
        return importlib.import_module(module_name), None
    except ModuleNotFoundError as error:
        if error.name == module_name:
            return None, f"{module_name} is not installed"
        return None, f"{module_name} is installed but does not import: {error}"
    except (ImportError, AttributeError, OSError) as error:  # built for another JAX or CUDA
        return None, f"{module_name} is installed but does not import: {error}"


def _needs_nvidia(shape: Shape, device: jax.Device, *, name: str) -> str | None:
    if device.platform != "gpu":
        return f"{name} runs on NVIDIA GPUs; this device is {device.platform}"
    if shape.dtype not in _HALF:
        return f"{name} takes {' or '.join(_HALF)}; got {shape.dtype}"
    return None


def _flash_attn3_refusal(shape: Shape, device: jax.Device) -> str | None:
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability != "9.0":
        return f"flash-attn3-jax is built for compute capability 9.0; this device is {capability}"
    if shape.head_dim > FA3_HEAD_DIM:
        return f"flash-attn3-jax is built for head dim {FA3_HEAD_DIM}; got {shape.head_dim}"
    return _needs_nvidia(shape, device, name="flash-attn3-jax")


def _flash_attn3_note(shape: Shape) -> str | None:
    if shape.head_dim == FA3_HEAD_DIM:
        return None
    return f"head dim {shape.head_dim} padded to {FA3_HEAD_DIM}, the only one it is built for"


def _call_flash_attn3(
    flash_mha: Attention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool,
    local_window_size: tuple[int, int] | None = None,
) -> jax.Array:
    head_dim = query.shape[-1]
    width = [(0, 0)] * 3 + [(0, FA3_HEAD_DIM - head_dim)]
    query, key, value = (jnp.pad(x, width) for x in (query, key, value))
    window = {} if local_window_size is None else {"window_size": local_window_size}
    out = flash_mha(query, key, value, softmax_scale=head_dim**-0.5, is_causal=is_causal, **window)
    return out[..., :head_dim]


def _call_ours(
    backend: Any, query: jax.Array, key: jax.Array, value: jax.Array, *, is_causal: bool
) -> jax.Array:
    return jaxflash.dot_product_attention(
        query, key, value, is_causal=is_causal, implementation=backend
    )


def _backend_refusal(shape: Shape, device: jax.Device, *, backend: str) -> str | None:
    """The library's own words, for the device it would run on."""
    del device
    explanation = jaxflash.explain(*shape.structs(), is_causal=shape.is_causal)
    return explanation.refusals[backend]
