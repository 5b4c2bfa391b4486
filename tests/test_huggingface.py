"""The models against Hugging Face transformers' own, with the same random weights, on the CPU."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxflash
from bench.models import huggingface
from bench.models.config import Config
from bench.models.decoder import Decoder
from bench.models.generate import Model, contiguous_caches, generate, paged_caches

torch = pytest.importorskip("torch", reason="torch is not installed (the hf extra's)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

_VOCABULARY, _WIDTH, _LAYERS, _HEADS, _HIDDEN = 97, 32, 2, 4, 48


def _ours(name: str, **options: Any) -> Config:
    return Config(name, _VOCABULARY, _WIDTH, _LAYERS, _HEADS, _HIDDEN, **options)


def _llama() -> tuple[Any, Config]:
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=_WIDTH, num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS, num_key_value_heads=2, intermediate_size=_HIDDEN,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    ours = _ours(
        "llama", kv_heads=2, rope=jaxflash.Rope(), norm="rms", is_gated=True,
        attention_bias=False, mlp_bias=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), ours


def _gpt2() -> tuple[Any, Config]:
    config = transformers.GPT2Config(
        vocab_size=_VOCABULARY, n_embd=_WIDTH, n_layer=_LAYERS, n_head=_HEADS, n_inner=_HIDDEN,
        n_positions=64,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), _ours("gpt-2", positions=64, is_tied=True)


def _gptj() -> tuple[Any, Config]:
    config = transformers.GPTJConfig(
        vocab_size=_VOCABULARY, n_embd=_WIDTH, n_layer=_LAYERS, n_head=_HEADS, n_inner=_HIDDEN,
        rotary_dim=4,
    )  # fmt: skip
    ours = _ours(
        "gpt-j", rope=jaxflash.Rope(dims=4, interleaved=True), residual="parallel, one norm",
        attention_bias=False, head_bias=True,
    )  # fmt: skip
    return transformers.GPTJForCausalLM(config), ours


def _neox() -> tuple[Any, Config]:
    config = transformers.GPTNeoXConfig(
        vocab_size=_VOCABULARY, hidden_size=_WIDTH, num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS, intermediate_size=_HIDDEN, hidden_act="gelu_new",
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config), _ours(
        "gpt-neox", rope=jaxflash.Rope(dims=2), residual="parallel"
    )


FAMILIES = {"llama": _llama, "gpt-2": _gpt2, "gpt-j": _gptj, "gpt-neox": _neox}


def _pair(family: str) -> tuple[Any, Decoder, Config]:
    torch.manual_seed(0)
    theirs, config = FAMILIES[family]()
    theirs.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms are trivial at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    weights = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}
    huggingface.load(ours, config, weights)
    return theirs, ours, config


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str) -> None:
    theirs, ours, _ = _pair(family)
    tokens = np.random.default_rng(0).integers(0, _VOCABULARY, (2, 40))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), want, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt-2"])
@pytest.mark.parametrize("is_paged", [False, True])
def test_generation(family: str, is_paged: bool) -> None:
    """The likeliest tokens after prompts of different lengths, with a cache."""
    theirs, ours, config = _pair(family)
    prompts = np.random.default_rng(1).integers(0, _VOCABULARY, (2, 9))
    counts = np.array([9, 5])
    want = []
    for row, count in zip(prompts, counts, strict=True):
        sequence = list(row[:count])
        for _ in range(8):
            with torch.no_grad():
                logits = theirs(torch.tensor([sequence])).logits[0, -1]
            sequence.append(int(logits.argmax()))
        want.append(sequence[count:])
    model = Model(nnx.graphdef(ours), nnx.state(ours))
    if is_paged:
        caches = tuple(
            cache.with_tables([[3, 1], [0, 2]])  # type: ignore[union-attr]
            for cache in paged_caches(config, 2, 4, 2, page_size=16, dtype=jnp.float32)
        )
    else:
        caches = contiguous_caches(config, 2, 32, dtype=jnp.float32)
    found = generate(model, caches, jnp.asarray(prompts), jnp.asarray(counts, jnp.int32), 8)
    np.testing.assert_array_equal(found, want)


def test_weights_that_do_not_match() -> None:
    _, ours, config = _pair("llama")
    with pytest.raises(ValueError, match="no known family"):
        huggingface.load(ours, config, {"x": np.zeros(1)})
    gpt2 = {name: x.detach().numpy() for name, x in _gpt2()[0].state_dict().items()}
    with pytest.raises(ValueError, match="GPT-2 weights do not match"):
        huggingface.load(ours, config, gpt2)
