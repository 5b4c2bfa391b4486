"""Attention of new tokens to a cache: decoding, and prefill in chunks."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from jaxflash import checks, dispatch
from jaxflash.api import Implementation
from jaxflash.arguments import canonicalize
from jaxflash.cache import pages
from jaxflash.cache.rules import Rule, enforce, integers
from jaxflash.partitioning import divided_as_typed
from jaxflash.varying import varying_like
from pallas_kernels import spec


def decode_attention(
    query: Float[Array, "*B T N H"],
    key_cache: Float[Array, "*B S K H"],
    value_cache: Float[Array, "*B S K Hv"],
    lengths: Int32[Array, "*B"],
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    counts: Int32[Array, "*B"] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    debug_checks: bool = False,
) -> Any:
    r"""Causal attention of the T newest tokens to a cache that holds them already.

    Token t of sequence b stands at position ``lengths[b] - T + t`` and sees the keys up to there:

    .. math:: o_t = \sum_{j \le \mathrm{length} - T + t} \mathrm{softmax}_j(s_{tj})\, v_j

    with the logits of ``dot_product_attention``. Of the cache, what lies beyond a sequence's length
    is never seen, whatever it holds. Not differentiable on every backend: this is for inference.

    Args:
      query: ``[*B, T, N, H]``, the new tokens; bfloat16, float16, float32 or float64.
      key_cache: ``[*B, S, K, H]``, such as ``KVCache.key``; K divides N.
      value_cache: ``[*B, S, K, Hv]``.
      lengths: int32 ``[*B]``, tokens held, the new ones included, in ``[0, S]``. New tokens at
        positions before 0 (where a length is less than T) see nothing: output 0, lse -inf.
      scale: of the logits; ``H ** -0.5`` by default.
      local_window_size: ``(left, right)``, or an int for both, as in ``dot_product_attention``.
      logits_soft_cap: logits become ``cap * tanh(s / cap)``.
      alibi_slopes: floating ``[N]``; ``slope * |i - j|`` is subtracted.
      sinks: floating ``[N]``; one logit a head that takes weight and has no value.
      counts: int32 ``[*B]`` in ``[0, T]``, as of ``KVCache.append``: only the first ``counts[b]``
        of the T tokens are new ones of sequence b, which ``lengths`` includes; token t stands at
        ``lengths[b] - counts[b] + t``, and the rows of the others are empty. All T by default.
      implementation: None picks the fastest backend that supports the call; a name insists on one.
      return_residual: also return the lse.
      debug_checks: check at run time that lengths lie in ``[0, S]``, and counts in ``[0, T]``.
        Costs a round trip to the host; JAX_PLATFORMS, where it is set, must list cpu too.

    Returns:
      The output ``[*B, T, N, Hv]`` in the query's dtype. With ``return_residual``, a pair with the
      lse ``[*B, T, N]``, float32.

    Raises:
      ValueError, TypeError: an argument is wrong, or the implementation asked for refuses; lengths
        that are no JAX arrays are always checked.
      jax.errors.JaxRuntimeError: what ``debug_checks`` finds inside jit.

    Example:
      >>> import jax, jax.numpy as jnp, jaxflash
      >>> cache = jaxflash.KVCache.zeros(2, 64, 2, 16, dtype=jnp.float32)
      >>> token = jax.random.normal(jax.random.key(0), (2, 1, 2, 16))
      >>> cache = cache.append(token, token)
      >>> query = jnp.ones((2, 1, 8, 16))
      >>> jaxflash.decode_attention(query, cache.key, cache.value, cache.lengths).shape
      (2, 1, 8, 16)

    Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
    """
    key, value = (
        checks.as_array("key_cache", key_cache),
        checks.as_array("value_cache", value_cache),
    )
    query = checks.as_array("query", query)
    checks.qkv(query, key, value)
    held = _lengths(lengths, query.shape[:-3])
    held = enforce(held, _length_rule(held, key.shape[-3]), debug_checks=debug_checks)
    held = jnp.asarray(held)
    return _attend(
        (query, key, value),
        held,
        None,
        _counts(counts, query.shape, debug_checks),
        implementation,
        return_residual,
        scale=scale,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )


def paged_attention(
    query: Float[Array, "B T N H"],
    key_pages: Float[Array, "P page_size K H"],
    value_pages: Float[Array, "P page_size K Hv"],
    page_table: Int32[Array, "B M"],
    lengths: Int32[Array, "B"],
    *,
    key_scale: Float32[Array, "P K"] | None = None,
    value_scale: Float32[Array, "P K"] | None = None,
    scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    counts: Int32[Array, "*B"] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    debug_checks: bool = False,
) -> Any:
    """`decode_attention` to a cache in pages; with a large T, prefill in chunks.

    Key j of sequence b is in page ``page_table[b, j // page_size]`` at ``j % page_size``. Pages may
    be in any order, and of several sequences. Pages that a sequence does not hold are never seen.

    Args:
      query: ``[B, T, N, H]``, the newest tokens of each sequence, which the cache holds already.
      key_pages: ``[P, page_size, K, H]``, such as ``PagedKVCache.key_pages``; pages of 16, 32, 64,
        128 or 256 tokens. In the query's dtype; or of 8 bits, float8_e4m3fn or int8, which stand
        for their products with scales. Backends round those to the query's dtype, or round the
        query to float16, its largest number at the most.
      value_pages: ``[P, page_size, K, Hv]``.
      page_table: int32 ``[B, M]``; entries that hold no token of the sequence may be anything.
      lengths: int32 ``[B]``, tokens held, the new ones included, in ``[0, M * page_size]``.
      key_scale: float32 ``[P, K]``, of pages of 8 bits: ``PagedKVCache.key_scale``. At least
        2^-64, as those that the cache finds; of pages without tokens anything.
      value_scale: likewise.
      scale: as in ``decode_attention``.
      local_window_size: likewise.
      logits_soft_cap: likewise.
      alibi_slopes: likewise.
      sinks: likewise.
      counts: likewise.
      implementation: likewise.
      return_residual: likewise.
      debug_checks: check at run time that lengths fit the table, that counts lie in ``[0, T]``,
        and that tokens held are in pages that exist.

    Returns:
      As ``decode_attention``.

    Raises:
      ValueError, TypeError, jax.errors.JaxRuntimeError: as ``decode_attention``.

    Example:
      >>> import jax.numpy as jnp, jaxflash
      >>> cache = jaxflash.PagedKVCache.zeros(
      ...     8, 16, 2, 16, batch=2, max_pages=3, dtype=jnp.float32
      ... ).with_tables([[5, 2, -1], [7, -1, -1]])
      >>> prompt = jnp.ones((2, 10, 2, 16))
      >>> cache = cache.append(prompt, prompt)
      >>> held = cache.key_pages, cache.value_pages, cache.page_table, cache.lengths
      >>> jaxflash.paged_attention(jnp.ones((2, 10, 8, 16)), *held).shape
      (2, 10, 8, 16)

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention" (2023).
    """
    query = checks.as_array("query", query)
    held_keys = checks.as_array("key_pages", key_pages)
    held_values = checks.as_array("value_pages", value_pages)
    table = integers("page_table", page_table)
    _check_pages(query, held_keys, held_values, table)
    named = ("key_scale", key_scale), ("value_scale", value_scale)
    scales = [None if x is None else checks.as_array(name, x) for name, x in named]
    checks.scales(held_keys, held_values, *scales)
    P, page_size = held_keys.shape[:2]
    held = _lengths(lengths, query.shape[:1])
    rules = pages.table_rules(table, held, P, page_size, "give page_table more columns")
    held = enforce(held, *rules, debug_checks=debug_checks)
    held, table = jnp.asarray(held), jnp.asarray(table)
    return _attend(
        (query, held_keys, held_values, *scales),
        held,
        table,
        _counts(counts, query.shape, debug_checks),
        implementation,
        return_residual,
        scale=scale,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )


def _attend(
    arrays: tuple[Any, ...],  # query, keys, values; of pages also their scales
    lengths: Any,
    page_table: Any,  # None: keys and values are not in pages
    counts: Any,
    implementation: str | None,
    return_residual: bool,
    **options: Any,
) -> Any:
    checks.flag("return_residual", return_residual)
    query, key, value = arrays[:3]
    batch, T = query.shape[:-3], query.shape[-3]
    if page_table is not None:  # in place of what `canonicalize` takes for keys and values
        dtype = query.dtype if key.dtype in checks.NARROW else key.dtype
        key, value = (jnp.zeros((*batch, 0, *x.shape[2:]), dtype) for x in (key, value))
    problem, operands = canonicalize(
        query,
        key,
        value,
        is_causal=True,
        query_offset=lengths - (T if counts is None else counts),
        query_seq_lengths=counts,
        key_value_seq_lengths=lengths,
        **options,
    )
    if page_table is not None:
        names = ["key", "value", "key_scale", "value_scale"]
        held = dict(zip(names, arrays[1:], strict=True))
        operands = operands._replace(**held, page_table=page_table)
        problem = problem.of(operands)
    backend = dispatch.select(problem, implementation, dispatch.OF_CACHES)

    def attend(problem: spec.Problem, operands: spec.Operands) -> tuple[jax.Array, jax.Array]:
        return backend.forward(problem, varying_like(operands, operands))

    found = divided_as_typed(attend, problem, operands) or attend(problem, operands)
    out, lse = (x.reshape(*batch, *x.shape[1:]) for x in found)
    return (out, lse) if return_residual else out


def _lengths(lengths: Any, batch: tuple[int, ...]) -> Any:
    held = integers("lengths", lengths)
    checks.shaped("lengths", held, batch, "[*B]")
    return held


def _counts(counts: Any, query: tuple[int, ...], debug_checks: bool) -> Any:
    """How many of T rows are new tokens, int32 [*B]; None: all."""
    if counts is None:
        return None
    counts, T = integers("counts", counts), query[-3]
    checks.shaped("counts", counts, query[:-3], "[*B]")
    rule = Rule(
        (counts >= 0) & (counts <= T),
        f"counts must lie in [0, T] = [0, {T}]; got {{}}",
        (counts,),
    )
    return jnp.asarray(enforce(counts, rule, debug_checks=debug_checks))


def _length_rule(lengths: Any, capacity: int) -> Rule:
    """Lengths [*B] are within the cache."""
    return Rule(
        (lengths >= 0) & (lengths <= capacity),
        f"lengths must lie in [0, S] = [0, {capacity}]; got {{}}; give the cache a larger capacity",
        (lengths,),
    )


def _check_pages(query: Any, key_pages: Any, value_pages: Any, page_table: Any) -> None:
    """Shapes and dtypes of pages and of the table."""
    for name, x, axes in (
        ("key_pages", key_pages, "[P, page_size, K, H]"),
        ("value_pages", value_pages, "[P, page_size, K, Hv]"),
    ):
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes {axes}; got shape {x.shape}")
        checks.page_dtype(name, x.dtype, f"; convert it with {name}.astype")
    if query.ndim != 4:
        raise ValueError(f"query must have four axes [B, T, N, H]; got shape {query.shape}")
    if key_pages.shape[:2] != value_pages.shape[:2]:
        raise ValueError(
            "key_pages and value_pages must have as many pages of as many tokens; got shapes "
            f"{key_pages.shape} and {value_pages.shape}"
        )
    checks.page_size(key_pages.shape[1])
    if page_table.ndim != 2 or page_table.shape[0] != query.shape[0] or 0 in page_table.shape:
        raise ValueError(
            f"page_table must have shape [B, M] = ({query.shape[0]}, M), not empty; got shape "
            f"{page_table.shape}"
        )
    if key_pages.shape[0] == 0:
        raise ValueError(f"key_pages must hold at least one page; got shape {key_pages.shape}")
