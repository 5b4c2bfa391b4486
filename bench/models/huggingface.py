"""Weights of Hugging Face transformers' models, as arrays of numpy, in the shapes of `Decoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench.models.config import Config
from bench.models.decoder import Decoder

Weights = Mapping[str, np.ndarray]


def load(model: Decoder, config: Config, weights: Weights) -> None:
    """Puts weights of a causal language model, by their names in its state_dict, into a model.

    Raises:
      ValueError: the model has parameters that the weights do not have, or of other shapes.
    """
    family = next((f for f, marks in _MARKS.items() if all(m in weights for m in marks)), None)
    if family is None:
        raise ValueError(f"weights of no known family; got {sorted(weights)[:5]}, ...")
    found: dict[str, np.ndarray] = _ENDS[family](weights)
    for i in range(config.layers):
        block = _BLOCKS[family](config, weights, i)
        found |= {f"blocks.{i}.{name}": x for name, x in block.items()}
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    named = {".".join(map(str, path)): parameter for path, parameter in state}
    if set(named) != set(found):
        raise ValueError(f"{family} weights do not match: {sorted(set(named) ^ set(found))}")
    for name, parameter in named.items():
        if parameter[...].shape != found[name].shape:
            raise ValueError(f"{name}: {found[name].shape} is no {parameter[...].shape}")
        parameter[...] = jnp.asarray(found[name], parameter[...].dtype)
    nnx.update(model, nnx.from_flat_state(state))


def _heads(config: Config, weight: np.ndarray, heads: int) -> np.ndarray:
    """[N * H, width] as [width, N, H]."""
    return weight.T.reshape(config.width, heads, config.head_dim)


def _out(config: Config, weight: np.ndarray) -> np.ndarray:
    """[width, N * H] as [N, H, width]."""
    return weight.T.reshape(config.heads, config.head_dim, config.width)


def _norm(weights: Weights, theirs: str, ours: str) -> dict[str, np.ndarray]:
    found = {f"{ours}.scale": weights[f"{theirs}.weight"]}
    if f"{theirs}.bias" in weights:
        found[f"{ours}.bias"] = weights[f"{theirs}.bias"]
    return found


def _linear(weights: Weights, theirs: str, ours: str) -> dict[str, np.ndarray]:
    found = {f"{ours}.kernel": weights[f"{theirs}.weight"].T}
    if f"{theirs}.bias" in weights:
        found[f"{ours}.bias"] = weights[f"{theirs}.bias"]
    return found


def _llama_ends(w: Weights) -> dict[str, np.ndarray]:
    return {
        "ends.tokens.embedding": w["model.embed_tokens.weight"],
        **_norm(w, "model.norm", "ends.norm"),
        **_linear(w, "lm_head", "ends.head"),
    }


def _llama_block(config: Config, w: Weights, i: int) -> dict[str, np.ndarray]:
    at = f"model.layers.{i}"
    attention, K = f"{at}.self_attn", config.key_value_heads
    return {
        **_norm(w, f"{at}.input_layernorm", "attention_norm"),
        "attention.query.kernel": _heads(config, w[f"{attention}.q_proj.weight"], config.heads),
        "attention.key.kernel": _heads(config, w[f"{attention}.k_proj.weight"], K),
        "attention.value.kernel": _heads(config, w[f"{attention}.v_proj.weight"], K),
        "attention.out.kernel": _out(config, w[f"{attention}.o_proj.weight"]),
        **_norm(w, f"{at}.post_attention_layernorm", "mlp_norm"),
        **_linear(w, f"{at}.mlp.gate_proj", "mlp.gate"),
        **_linear(w, f"{at}.mlp.up_proj", "mlp.up"),
        **_linear(w, f"{at}.mlp.down_proj", "mlp.down"),
    }


def _gpt2_ends(w: Weights) -> dict[str, np.ndarray]:
    return {
        "ends.tokens.embedding": w["transformer.wte.weight"],
        "ends.positions.embedding": w["transformer.wpe.weight"],
        **_norm(w, "transformer.ln_f", "ends.norm"),
    }


def _gpt2_block(config: Config, w: Weights, i: int) -> dict[str, np.ndarray]:
    at, N, H = f"transformer.h.{i}", config.heads, config.head_dim
    found = {
        **_norm(w, f"{at}.ln_1", "attention_norm"),
        # Its matrices are [inputs, outputs] already.
        "attention.out.kernel": w[f"{at}.attn.c_proj.weight"].reshape(N, H, config.width),
        "attention.out.bias": w[f"{at}.attn.c_proj.bias"],
        **_norm(w, f"{at}.ln_2", "mlp_norm"),
        "mlp.up.kernel": w[f"{at}.mlp.c_fc.weight"],
        "mlp.up.bias": w[f"{at}.mlp.c_fc.bias"],
        "mlp.down.kernel": w[f"{at}.mlp.c_proj.weight"],
        "mlp.down.bias": w[f"{at}.mlp.c_proj.bias"],
    }
    kernels = np.split(w[f"{at}.attn.c_attn.weight"], 3, axis=1)
    biases = np.split(w[f"{at}.attn.c_attn.bias"], 3)
    for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
        found[f"attention.{name}.kernel"] = kernel.reshape(config.width, N, H)
        found[f"attention.{name}.bias"] = bias.reshape(N, H)
    return found


def _gptj_ends(w: Weights) -> dict[str, np.ndarray]:
    return {
        "ends.tokens.embedding": w["transformer.wte.weight"],
        **_norm(w, "transformer.ln_f", "ends.norm"),
        **_linear(w, "lm_head", "ends.head"),
    }


def _gptj_block(config: Config, w: Weights, i: int) -> dict[str, np.ndarray]:
    at = f"transformer.h.{i}"
    found = {
        **_norm(w, f"{at}.ln_1", "attention_norm"),
        "attention.out.kernel": _out(config, w[f"{at}.attn.out_proj.weight"]),
        **_linear(w, f"{at}.mlp.fc_in", "mlp.up"),
        **_linear(w, f"{at}.mlp.fc_out", "mlp.down"),
    }
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        weight = w[f"{at}.attn.{theirs}.weight"]
        found[f"attention.{ours}.kernel"] = _heads(config, weight, config.heads)
    return found


def _neox_ends(w: Weights) -> dict[str, np.ndarray]:
    head = "lm_head" if "lm_head.weight" in w else "embed_out"  # its name until transformers 5
    return {
        "ends.tokens.embedding": w["gpt_neox.embed_in.weight"],
        **_norm(w, "gpt_neox.final_layer_norm", "ends.norm"),
        **_linear(w, head, "ends.head"),
    }


def _neox_block(config: Config, w: Weights, i: int) -> dict[str, np.ndarray]:
    at, N, H = f"gpt_neox.layers.{i}", config.heads, config.head_dim
    found = {
        **_norm(w, f"{at}.input_layernorm", "attention_norm"),
        "attention.out.kernel": _out(config, w[f"{at}.attention.dense.weight"]),
        "attention.out.bias": w[f"{at}.attention.dense.bias"],
        **_norm(w, f"{at}.post_attention_layernorm", "mlp_norm"),
        **_linear(w, f"{at}.mlp.dense_h_to_4h", "mlp.up"),
        **_linear(w, f"{at}.mlp.dense_4h_to_h", "mlp.down"),
    }
    # Query, key and value of one head come together.
    weight = w[f"{at}.attention.query_key_value.weight"].reshape(N, 3, H, config.width)
    bias = w[f"{at}.attention.query_key_value.bias"].reshape(N, 3, H)
    for j, name in enumerate(("query", "key", "value")):
        found[f"attention.{name}.kernel"] = weight[:, j].transpose(2, 0, 1)
        found[f"attention.{name}.bias"] = bias[:, j]
    return found


_MARKS = {
    "Llama": ("model.embed_tokens.weight",),
    "GPT-2": ("transformer.wpe.weight",),
    "GPT-J": ("transformer.wte.weight", "transformer.h.0.attn.q_proj.weight"),
    "GPT-NeoX": ("gpt_neox.embed_in.weight",),
}
_ENDS: dict[str, Callable[[Weights], dict[str, Any]]] = {
    "Llama": _llama_ends,
    "GPT-2": _gpt2_ends,
    "GPT-J": _gptj_ends,
    "GPT-NeoX": _neox_ends,
}
_BLOCKS: dict[str, Callable[[Config, Weights, int], dict[str, Any]]] = {
    "Llama": _llama_block,
    "GPT-2": _gpt2_block,
    "GPT-J": _gptj_block,
    "GPT-NeoX": _neox_block,
}
