"""From what a user passes to what a backend is asked: a Problem and its Operands."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxflash import checks, quantization
from jaxflash.device import target
from jaxflash.quantization import flat
from pallas_kernels import spec
from pallas_kernels.spec.quantization import FP8

_SCORE_ARGUMENTS = "score, b, h, q_idx, kv_idx"
_MASK_ARGUMENTS = "b, h, q_idx, kv_idx"


def canonicalize(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: Any = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    query_offset: Any = 0,
    query_segment_ids: Any = None,
    key_value_segment_ids: Any = None,
    logits_soft_cap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    dropout_rate: Any = 0.0,
    dropout_key: Any = None,
    broadcast_dropout: Any = False,
    precision: Any = None,
    deterministic: Any = False,
) -> tuple[spec.Problem, spec.Operands]:
    """Checks the arguments of ``dot_product_attention`` and flattens their batch axes."""
    query, key, value = (
        checks.operand(n, x) for n, x in (("query", query), ("key", key), ("value", value))
    )
    quantization.check_together(query, key, value)
    checks.qkv(query, key, value)
    batch = query.shape[:-3]
    N = query.shape[-2]
    offset, offsets = _offset(query_offset, batch)
    rate, seed = checks.dropout(dropout_rate, dropout_key)
    compute_dtype = jnp.promote_types(query.dtype, jnp.float32)
    score, score_consts = _score_mod(score_mod, compute_dtype)
    visible, mask_consts = _mask_mod(mask_mod)
    logits = (*batch, N, query.shape[-3], key.shape[-3])
    segments = _segments(query_segment_ids, key_value_segment_ids, batch, logits)
    operands = spec.Operands(
        **quantization.operands(query, key, value),
        bias=_bias(bias, logits),
        mask=_mask(mask, logits),
        query_lengths=_integers("query_seq_lengths", query_seq_lengths, batch, "[*B]", batch),
        key_value_lengths=_integers(
            "key_value_seq_lengths", key_value_seq_lengths, batch, "[*B]", batch
        ),
        query_offset=offsets,
        query_segment_ids=segments[0],
        key_value_segment_ids=segments[1],
        alibi_slopes=_per_head("alibi_slopes", alibi_slopes, N),
        sinks=_per_head("sinks", sinks, N),
        dropout_seed=seed,
        score_consts=score_consts,
        mask_consts=mask_consts,
    )
    for name, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        checks.not_in_checked_shard_map(name, function, operands)
    window = checks.window(local_window_size)
    precision = checks.precision(precision)
    if operands.is_quantized and precision == FP8:
        precision = None  # it has been done
    problem = spec.Problem(
        operands=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands),
        band=spec.Band.of(checks.flag("is_causal", is_causal), window),
        scale=_scale(scale, query.shape[-1]),
        device=target(),
        query_offset=offset,
        soft_cap=_soft_cap(logits_soft_cap),
        score_mod=score,
        mask_mod=visible,
        dropout_rate=rate,
        broadcast_dropout=checks.flag("broadcast_dropout", broadcast_dropout),
        precision=precision,
        deterministic=checks.flag("deterministic", deterministic),
    )
    return problem, operands


def _scale(scale: Any, H: int) -> float:
    if scale is None:
        return H**-0.5
    return checks.number("scale", scale, "multiply the query by a traced scale instead")


def _soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    cap = checks.number("logits_soft_cap", cap, "use score_mod for a traced one")
    if cap <= 0:
        raise ValueError(f"logits_soft_cap must be positive; got {cap}; None means no cap")
    return cap


def _bias(bias: Any, logits: tuple[int, ...]) -> Any:
    if bias is None:
        return None
    bias = checks.as_array("bias", bias)
    checks.floating("bias", bias, "; pass booleans as mask")
    checks.broadcastable("bias", bias, logits)
    # Where only some batch axes are spread, JAX sums their gradient: it must do so in float32.
    return _flat_logits(bias, logits, jnp.promote_types(bias.dtype, jnp.float32))


def _mask(mask: Any, logits: tuple[int, ...]) -> Any:
    if mask is None:
        return None
    mask = checks.as_array("mask", mask)
    checks.boolean_array("mask", mask)
    checks.broadcastable("mask", mask, logits)
    return _flat_logits(mask, logits, mask.dtype)


def _flat_logits(x: Any, logits: tuple[int, ...], spread_dtype: Any) -> Any:
    """``x`` as [B|1, N|1, T|1, S|1]; batch axes are spread only where one of several is."""
    x = x.reshape((1,) * (len(logits) - x.ndim) + x.shape)
    batch = x.shape[:-3]
    if math.prod(batch) == 1:
        return x.reshape(1, *x.shape[-3:])
    if batch != logits[:-3]:
        x = jnp.broadcast_to(x.astype(spread_dtype), logits[:-3] + x.shape[-3:])
    return flat(x, logits[:-3])


def _integers(name: str, x: Any, shape: tuple[int, ...], axes: str, batch: tuple[int, ...]) -> Any:
    if x is None:
        return None
    x = checks.as_array(name, x)
    checks.int32(name, x)
    checks.shaped(name, x, shape, axes)
    return flat(x, batch)


def _segments(
    query_ids: Any, key_value_ids: Any, batch: tuple[int, ...], logits: tuple[int, ...]
) -> tuple[Any, Any]:
    if (query_ids is None) != (key_value_ids is None):
        missing = "query" if query_ids is None else "key_value"
        raise ValueError(
            f"query_segment_ids and key_value_segment_ids go together; {missing}_segment_ids is "
            "missing; for self-attention pass the same array as both"
        )
    T, S = logits[-2:]
    return (
        _integers("query_segment_ids", query_ids, (*batch, T), "[*B, T]", batch),
        _integers("key_value_segment_ids", key_value_ids, (*batch, S), "[*B, S]", batch),
    )


def _offset(offset: Any, batch: tuple[int, ...]) -> tuple[int, Any]:
    """A static offset and None, or 0 and an int32 [B] of offsets known at run time."""
    if checks.is_int(offset):
        checks.int32_range("query_offset", offset)
        return int(offset), None
    offset = checks.as_array("query_offset", offset)
    checks.int32("query_offset", offset)
    if offset.shape == ():
        offset = jnp.broadcast_to(offset, batch)
    checks.shaped("query_offset", offset, batch, "[] or [*B]")
    return 0, flat(offset, batch)


def _per_head(name: str, x: Any, N: int) -> Any:
    if x is None:
        return None
    x = checks.as_array(name, x)
    checks.floating(name, x, "; convert it with .astype(jnp.float32)")
    checks.shaped(name, x, (N,), "[N]")
    return x


def _score_mod(function: Any, dtype: Any) -> tuple[spec.ElementFunction | None, tuple[Any, ...]]:
    if function is None:
        return None, ()
    checks.element_function("score_mod", function, _SCORE_ARGUMENTS)
    traced, consts = spec.ElementFunction.trace(function, (dtype, *(jnp.int32,) * 4))
    checks.captured("score_mod", consts)
    checks.element_result("score_mod", traced.result, jnp.floating, "a floating score")
    return traced, consts


def _mask_mod(function: Any) -> tuple[spec.ElementFunction | None, tuple[Any, ...]]:
    if function is None:
        return None, ()
    checks.element_function("mask_mod", function, _MASK_ARGUMENTS)
    traced, consts = spec.ElementFunction.trace(function, (jnp.int32,) * 4)
    checks.element_result("mask_mod", traced.result, jnp.bool_, "a boolean, True where visible")
    return traced, consts
