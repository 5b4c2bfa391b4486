"""The public functions."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array, ArrayLike, Bool, Float, Int32, Shaped

from jaxflash import checks, dispatch, native, partitioning, vjp
from jaxflash.arguments import canonicalize
from jaxflash.quantization import GRANULARITIES, QuantizedArray, by_xla, flat
from pallas_kernels import spec

ScoreMod = Callable[[Any, Any, Any, Any, Any], Any]
MaskMod = Callable[[Any, Any, Any, Any], Any]
Implementation = Literal["hopper", "triton", "xla", "reference"]


def dot_product_attention(
    query: Float[ArrayLike, "*B T N H"] | QuantizedArray,
    key: Float[ArrayLike, "*B S K H"] | QuantizedArray,
    value: Float[ArrayLike, "*B S K Hv"] | QuantizedArray,
    bias: Float[ArrayLike, "..."] | None = None,
    mask: Bool[ArrayLike, "..."] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int32[ArrayLike, "*B"] | None = None,
    key_value_seq_lengths: Int32[ArrayLike, "*B"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    query_offset: int | Int32[ArrayLike, "*B"] = 0,
    query_segment_ids: Int32[ArrayLike, "*B T"] | None = None,
    key_value_segment_ids: Int32[ArrayLike, "*B S"] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float[ArrayLike, "N"] | None = None,
    sinks: Float[ArrayLike, "N"] | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Shaped[ArrayLike, "..."] | None = None,
    broadcast_dropout: bool = False,
    precision: jax.lax.Precision | str | None = None,
    deterministic: bool = False,
) -> Any:
    r"""Scaled dot-product attention, a superset of ``jax.nn.dot_product_attention``.

    For each head, with ``i`` the position of a query row and ``j`` a key,

    .. math:: o_i = \sum_j \mathrm{softmax}_j(s_{ij})\, v_j, \qquad
              s_{ij} = f(\mathrm{scale}\; q_i \cdot k_j + \mathrm{bias}_{ij}),

    where ``f`` is the soft cap, then ALiBi, then ``score_mod``, and the softmax runs over the keys
    that are visible: all masks are ANDed. Logits and softmax are float32 (float64 for float64
    inputs). The [T, S] matrix is never stored.

    A row that sees no key gives output 0, lse -inf and zero gradients (``jax.nn`` gives the mean
    of the values). Keys that nobody sees contribute nothing even when they hold NaN; a NaN that is
    seen stays one.

    Args:
      query: ``[*B, T, N, H]``, any number of batch axes; bfloat16, float16, float32 or float64.
        Like key and value, it may be what `quantize` returns: the output is then bfloat16.
      key: ``[*B, S, K, H]``; K divides N, each key-value head serves N // K query heads.
      value: ``[*B, S, K, Hv]``.
      bias: floating, broadcastable to ``[*B, N, T, S]``; added to the scaled logits. Its gradient
        is exact for every broadcast shape, summed in float32.
      mask: boolean, broadcastable to ``[*B, N, T, S]``; True where a key is visible.
      scale: of the logits; ``H ** -0.5`` by default.
      is_causal: position i sees keys j <= i.
      query_seq_lengths: int32 ``[*B]``; rows from there on see nothing.
      key_value_seq_lengths: int32 ``[*B]``; keys from there on are seen by nobody.
      local_window_size: ``(left, right)``, or an int for both: position i sees keys
        ``i - left <= j <= i + right``; 2**29 or more is no limit.
      implementation: None picks the fastest backend that supports the call; a name (``"hopper"``,
        ``"triton"``, ``"xla"``, ``"reference"``) insists on one and raises its reason if it
        refuses.
      return_residual: also return the lse.
      query_offset: position of query row 0 on the key axis, int or int32 ``[]`` or ``[*B]``, within
        2**30 of 0, the default. ``S - T`` makes causal attention bottom-right aligned.
      query_segment_ids: int32 ``[*B, T]``; a row sees the keys of its own segment.
      key_value_segment_ids: int32 ``[*B, S]``; goes with ``query_segment_ids``.
      logits_soft_cap: logits become ``cap * tanh(s / cap)``.
      alibi_slopes: floating ``[N]``; ``slope * |i - j|`` is subtracted. Differentiable.
      sinks: floating ``[N]``; one logit a head that takes weight and has no value. Differentiable.
        A row that sees no key is empty all the same: its lse is -inf.
      score_mod: ``score_mod(score, b, h, q_idx, kv_idx) -> score``, written for scalars in plain
        jnp; ``b`` counts the flattened batch, ``q_idx`` is the position (row + query_offset). It
        may capture arrays, and they receive gradients, summed within a tile in their own dtype:
        capture float32. Its derivative must be finite for masked pairs too. Inside ``shard_map``
        it needs ``check_vma=False``.
      mask_mod: ``mask_mod(b, h, q_idx, kv_idx) -> bool``, True where visible; may capture arrays.
        Inside ``shard_map`` it needs ``check_vma=False``.
      dropout_rate: probabilities are dropped with this rate, in [0, 1), the others divided by
        ``1 - rate``. The mask depends only on the key and on (b, h, position, key index).
      dropout_key: a key of ``jax.random``; required when the rate is positive.
      broadcast_dropout: one mask, that of (position, key index), for all batch elements and heads.
      precision: of the matrix products, a ``jax.lax.Precision`` or its name. None is JAX's default,
        which multiplies float32 in TF32 on recent NVIDIA GPUs. "fp8": query, key and value are
        rounded as `quantize` does by block, queries perhaps in blocks of 64 tokens; keys that
        masks, segments or ``mask_mod`` hide must be finite. Gradients are straight-through, by the
        arrays that were given: `reference` differentiates the exact forward, the others take the
        output and the lse of the rounded arrays for it.
      deterministic: bitwise equal gradients from run to run, whatever that costs.

    Returns:
      The output ``[*B, T, N, Hv]`` in the query's dtype. With ``return_residual``, a pair with the
      lse ``[*B, T, N]``, the natural log-sum-exp of each row's logits (its sink included), float32
      (float64 for float64 inputs) and differentiable.

    Raises:
      ValueError, TypeError: an argument is wrong, or the implementation asked for refuses; the
        message names the argument, what was passed, and a remedy.

    Example:
      >>> import jax, jaxflash
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 4, 64))
      >>> jaxflash.dot_product_attention(q, k, v, is_causal=True).shape
      (2, 128, 4, 64)

    Source: Dao et al., "FlashAttention" (2022); Dao, "FlashAttention-2" (2023). ``score_mod`` and
    ``mask_mod`` follow Dong et al., "FlexAttention" (2024).
    """
    dispatch.check_name(implementation)
    checks.flag("return_residual", return_residual)
    queries = checks.operand("query", query)
    problem, operands = canonicalize(
        queries,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        broadcast_dropout=broadcast_dropout,
        precision=precision,
        deterministic=deterministic,
    )
    out, lse = vjp.attention(dispatch.select(problem, implementation), problem, operands)
    batch = queries.shape[:-3]
    out, lse = (x if len(batch) == 1 else x.reshape(*batch, *x.shape[1:]) for x in (out, lse))
    return (out, lse) if return_residual else out


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    **options: Any,
) -> dispatch.Explanation:
    """Which backend would run ``dot_product_attention`` with these arguments, and why.

    Args:
      query: as for ``dot_product_attention``; a ``jax.ShapeDtypeStruct`` will do for any array.
      key: likewise.
      value: likewise.
      bias: likewise.
      mask: likewise.
      implementation: as there.
      return_residual: as there; no backend minds.
      **options: every other option of ``dot_product_attention``.

    Returns:
      The name of the backend that runs, each backend's refusal, why its gradients would be those of
      `xla` if all arrays were differentiated, and, if the query is sharded, what kernels under
      ``jit`` divide among devices and what is gathered; ``str`` of it is a table.

    Raises:
      ValueError, TypeError: as ``dot_product_attention``, but not when a backend refuses.

    Example:
      >>> import jax, jaxflash
      >>> x = jax.ShapeDtypeStruct((2, 128, 4, 64), "bfloat16")
      >>> print(jaxflash.explain(x, x, x, is_causal=True))
      hopper     refuses: needs a Hopper GPU (H100, H200); this device is cpu
      triton     refuses: needs an NVIDIA GPU, Ampere or later; this device is cpu
      xla        runs
      reference  would run if asked for
    """
    del return_residual
    for name in options.keys() - inspect.signature(dot_product_attention).parameters.keys():
        raise TypeError(f"dot_product_attention has no argument {name}")
    given = {"query": query, "key": key, "value": value, "bias": bias, "mask": mask, **options}
    abstract = {k: x for k, x in given.items() if isinstance(x, jax.ShapeDtypeStruct)}
    concrete = {k: x for k, x in given.items() if k not in abstract}
    problems = []

    def record(arrays: dict[str, Any]) -> None:
        problems.append(canonicalize(**concrete, **arrays)[0])

    jax.eval_shape(record, abstract)
    found = dispatch.explain(problems[0], implementation)
    return found._replace(sharding=partitioning.described(problems[0], query))


def quantize(
    x: Float[Array, "*B T N H"],
    *,
    per: Literal["block", "head", "tensor"] = "block",
    is_value: bool = False,
    rotate: bool = False,
) -> QuantizedArray:
    """Rounds an array to 8-bit floating point, e4m3, each part with a scale of its own.

    Args:
      x: queries, keys or values.
      per: what has a scale: each "block" of 128 tokens of a head, each "head" of a batch element,
        or the whole "tensor".
      is_value: lays the result out as the value of attention must be.
      rotate: multiplies queries, and keys, by an orthogonal matrix first, which spreads outliers
        over all columns (incoherent processing). Their products stay the same, so both must be.

    Returns:
      What `dot_product_attention` takes in place of an array; all three of its arrays must then be
      quantised. Not differentiable: to train, pass 16-bit arrays and ``precision="fp8"``. Padding
      must be finite: a NaN spreads over its block.

    Raises:
      ValueError, TypeError: the shape, the dtype or an option is wrong, or a value is rotated.

    Example:
      >>> import jax, jaxflash
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 64), "bfloat16")
      >>> q, k = (jaxflash.quantize(x, rotate=True) for x in (q, k))
      >>> jaxflash.dot_product_attention(q, k, jaxflash.quantize(v, is_value=True)).dtype
      dtype(bfloat16)

    Source: Shah et al., "FlashAttention-3" (2024), section 3.3.
    """
    x = checks.as_array("x", x)
    checks.floating("x", x)
    if x.ndim < 3:
        raise ValueError(f"x must have at least three axes [*B, T, N, H]; got shape {x.shape}")
    if per not in GRANULARITIES:
        raise ValueError(f"per must be one of {GRANULARITIES}; got {per!r}")
    is_value, rotate = checks.flag("is_value", is_value), checks.flag("rotate", rotate)
    if is_value and rotate:
        raise ValueError("values are not rotated: only products of queries and keys stay the same")
    quantize_flat = native.quantize if partitioning.is_local() else by_xla
    batch = x.shape[:-3]
    values, scales = quantize_flat(flat(x, batch), per, is_value, rotate)
    values, scales = (y.reshape(*batch, *y.shape[1:]) for y in (values, scales))
    return QuantizedArray(values, scales, x.shape[-3], is_value, rotate)


def merge(
    out_a: Float[Array, "*B T N Hv"],
    lse_a: Float[Array, "*B T N"],
    out_b: Float[Array, "*B T N Hv"],
    lse_b: Float[Array, "*B T N"],
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]:
    r"""The attention over two disjoint sets of keys, from the attention over each.

    .. math:: \mathrm{lse} = \log(e^{\mathrm{lse}_a} + e^{\mathrm{lse}_b}), \qquad
              o = e^{\mathrm{lse}_a - \mathrm{lse}} o_a + e^{\mathrm{lse}_b - \mathrm{lse}} o_b

    Args:
      out_a: output over the first set, ``[*B, T, N, Hv]``.
      lse_a: its lse, ``[*B, T, N]``, -inf for rows that saw no key.
      out_b: output over the second set.
      lse_b: its lse.

    Returns:
      Output in the dtype of ``out_a`` and lse. Associative up to rounding; differentiable. Sinks
      belong to one of the sets, one of which every row sees a key: with an empty row they are lost.

    Raises:
      ValueError, TypeError: the shapes differ, or something is no floating array.

    Example:
      >>> import jax, jaxflash
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
      >>> def part(keys):
      ...     return jaxflash.dot_product_attention(q, k[:, keys], v[:, keys], return_residual=True)
      >>> out, lse = jaxflash.merge(*part(slice(0, 5)), *part(slice(5, 8)))
      >>> bool(abs(out - jaxflash.dot_product_attention(q, k, v)).max() < 1e-6)
      True

    Source: Liu et al., "Ring Attention" (2023), section 3.
    """
    out_a, lse_a = checks.as_array("out_a", out_a), checks.as_array("lse_a", lse_a)
    out_b, lse_b = checks.as_array("out_b", out_b), checks.as_array("lse_b", lse_b)
    for name, x in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        checks.floating(name, x)
    checks.shaped("out_b", out_b, out_a.shape, "that of out_a")
    checks.shaped("lse_a", lse_a, out_a.shape[:-1], "[*B, T, N]")
    checks.shaped("lse_b", lse_b, out_a.shape[:-1], "[*B, T, N]")
    raised = (out_a.astype(lse_a.dtype), lse_a, out_b.astype(lse_b.dtype), lse_b)
    out, lse = spec.softmax.merge(*raised)
    return out.astype(out_a.dtype), lse
