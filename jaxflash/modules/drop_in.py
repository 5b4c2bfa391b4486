"""Attention called as Flax's modules call their ``attention_fn``."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxflash.api import dot_product_attention


def attend_as_flax(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: Any,
    mask: Any,
    *,
    is_causal: bool,
    broadcast_dropout: bool,
    dropout_rng: Any,
    dropout_rate: float,
    deterministic: bool,
    precision: Any,
    module: Any,
    options: dict[str, Any],
    **unsupported: Any,
) -> jax.Array:
    """``dot_product_attention`` of arrays of one dtype, with Flax's arguments.

    What cannot be done is an error: a ``module`` that would sow weights, ``unsupported`` arguments
    that are not None, a causal mask for one query that is not the first.
    """
    if module is not None:
        raise ValueError(
            "jaxflash does not compute attention weights, so there are none to sow; got "
            f"module={type(module).__name__}; call the module with sow_weights=False, or use "
            "Flax's own dot_product_attention to look at weights"
        )
    for name, x in unsupported.items():
        if x is not None:
            raise ValueError(
                f"jaxflash computes both products in its kernels and takes no {name}; got {x!r}"
            )
    if is_causal and query.shape[-3] == 1 and key.shape[-3] > 1:
        raise ValueError(
            f"is_causal lets the one query of shape {query.shape} see the first of "
            f"{key.shape[-3]} keys only; in decode mode the module's own mask says what has been "
            "cached: leave is_causal out"
        )
    if mask is not None and mask.dtype != jnp.bool_:
        mask = mask != 0
    drops = not deterministic and dropout_rate > 0
    if drops and dropout_rng is None:
        raise ValueError(f"dropout_rate={dropout_rate} needs a dropout_rng, or deterministic=True")
    return dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        dropout_rate=dropout_rate if drops else 0.0,
        dropout_key=dropout_rng if drops else None,
        broadcast_dropout=broadcast_dropout,
        precision=_one_precision(precision),
        **options,
    )


def _one_precision(precision: Any) -> Any:
    """Flax allows one for each operand of a product."""
    if not isinstance(precision, tuple):
        return precision
    if len(set(precision)) != 1:
        raise ValueError(
            f"jaxflash multiplies with one precision for both operands; got {precision!r}"
        )
    return precision[0]
