"""Attention for ``flax.nnx``: a drop-in ``attention_fn``, and modules with a cache.

Example:
  >>> from flax import nnx
  >>> import jaxflash.nnx
  >>> layer = nnx.MultiHeadAttention(
  ...     8, 64, attention_fn=jaxflash.nnx.dot_product_attention, decode=False, rngs=nnx.Rngs(0)
  ... )
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from flax.nnx.nn.linear import default_kernel_init
from jaxtyping import Array, ArrayLike, Bool, Float, Int32

from jaxflash.api import Implementation
from jaxflash.modules.core import Cache, Core, drops, head_dim_of
from jaxflash.modules.drop_in import attend_as_flax
from jaxflash.modules.rope import Rope

__all__ = ["MultiHeadAttention", "dot_product_attention"]


def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    bias: Float[ArrayLike, "..."] | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    is_causal: bool = False,
    **options: Any,
) -> Float[Array, "*B T N Hv"]:
    """``flax.nnx.dot_product_attention``, for ``nnx.MultiHeadAttention(attention_fn=...)``.

    The result and the gradients are Flax's, up to rounding, with three exceptions. Dropout has the
    same rate and sharing, but another mask. A row that sees no key gives 0, not the mean of the
    values. Attention weights do not exist, so ``sow_weights=True`` is an error.

    Args:
      query: ``[*B, T, N, H]``.
      key: ``[*B, S, K, H]``; K divides N.
      value: ``[*B, S, K, Hv]``.
      bias: broadcastable to ``[*B, N, T, S]``, added to the logits.
      mask: broadcastable likewise, boolean or of numbers; a key is visible where it is not 0.
      broadcast_dropout: one dropout mask for all batch elements and heads.
      dropout_rng: a key of ``jax.random``, required when something is dropped.
      dropout_rate: of probabilities, in [0, 1).
      deterministic: drop nothing.
      dtype: of the computation; by default what the arrays promote to.
      precision: of the matrix products, as in ``jaxflash.dot_product_attention``.
      module: must be None.
      promote_dtype: Flax's function, or one like it.
      is_causal: row i sees keys j <= i.
      **options: the other options of ``jaxflash.dot_product_attention``, but for
        ``return_residual`` and its own ``deterministic``: bind some with ``functools.partial``, as
        ``local_window_size`` or ``implementation``.

    Returns:
      ``[*B, T, N, Hv]``.

    Raises:
      ValueError, TypeError: as ``jaxflash.dot_product_attention``; something is asked for that
        needs the weights; ``is_causal`` with one query and more keys.

    Example:
      >>> import functools
      >>> windowed = functools.partial(dot_product_attention, local_window_size=(127, 0))
      >>> x = jnp.ones((2, 256, 4, 16))
      >>> windowed(x, x, x).shape
      (2, 256, 4, 16)
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    return attend_as_flax(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        precision=precision,
        module=module,
        options=options,
    )


class MultiHeadAttention(nnx.Module):
    """Attention with projections, rotary positions, and a cache that is passed in and returned.

    The parameters are those of ``nnx.MultiHeadAttention``: kernels ``query`` [in, N, H], ``key``
    and ``value`` [in, K, H], ``out`` [N, H, out]; with ``normalize_qk`` scales ``query_norm`` and
    ``key_norm`` [H] of an RMS norm; with ``use_sinks`` also ``sinks`` [N].

    Args:
      num_heads: query heads N.
      in_features: of the inputs.
      qkv_features: N * H; ``in_features`` by default.
      out_features: of the output; ``in_features`` by default.
      num_kv_heads: key-value heads K, a divisor of N; N by default.
      in_kv_features: of the inputs for keys and values; ``in_features`` by default.
      head_dim: H; ``qkv_features // N`` by default.
      is_causal: position i sees keys j <= i. Required for a cache.
      rope: rotary positions of queries and keys; none by default.
      normalize_qk: RMS norm of each query and key, before ``rope``.
      local_window_size: as in ``jaxflash.dot_product_attention``, like the next two.
      logits_soft_cap: likewise.
      scale: likewise.
      use_sinks: a learnable logit for each head that takes weight and has no value.
      dropout_rate: of probabilities.
      broadcast_dropout: one dropout mask for all batch elements and heads.
      deterministic: drop nothing; None leaves it to the call, or to ``train()`` and ``eval()``.
      use_bias: whether projections have a bias.
      kernel_init: of all projections.
      bias_init: likewise.
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
      precision: of the projections.
      implementation: as in ``jaxflash.dot_product_attention``.
      rngs: for the parameters, and for dropout.

    Raises:
      ValueError: heads do not divide as they must.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp
      >>> import jaxflash, jaxflash.nnx
      >>> layer = jaxflash.nnx.MultiHeadAttention(
      ...     8, 64, num_kv_heads=2, is_causal=True, rope=jaxflash.Rope(), rngs=nnx.Rngs(0)
      ... )
      >>> layer(jnp.ones((1, 10, 64))).shape
      (1, 10, 64)
      >>> cache = jaxflash.KVCache.zeros(1, 32, 2, 8, dtype=jnp.float32)
      >>> out, cache = layer(jnp.ones((1, 10, 64)), cache=cache)  # a prompt
      >>> out, cache = layer(jnp.ones((1, 1, 64)), cache=cache)  # the next token
      >>> cache.lengths
      Array([11], dtype=int32)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        head_dim: int | None = None,
        is_causal: bool = False,
        rope: Rope | None = None,
        normalize_qk: bool = False,
        local_window_size: int | tuple[int, int] | None = None,
        logits_soft_cap: float | None = None,
        scale: float | None = None,
        use_sinks: bool = False,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = False,
        deterministic: bool | None = None,
        use_bias: bool = True,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = initializers.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: Implementation | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.core = Core(
            is_causal=is_causal,
            rope=rope,
            local_window_size=local_window_size,
            logits_soft_cap=logits_soft_cap,
            scale=scale,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
            implementation=implementation,
        )
        self.deterministic = deterministic
        K = num_kv_heads or num_heads
        H = head_dim_of(num_heads, K, qkv_features or in_features, head_dim)

        def project(inputs: Any, outputs: Any, axis: Any = -1) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                inputs,
                outputs,
                axis=axis,
                use_bias=use_bias,
                kernel_init=kernel_init,
                bias_init=bias_init,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

        self.query = project(in_features, (num_heads, H))
        self.key = project(in_kv_features or in_features, (K, H))
        self.value = project(in_kv_features or in_features, (K, H))
        self.out = project((num_heads, H), out_features or in_features, (-2, -1))
        norm = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.query_norm = nnx.data(nnx.RMSNorm(H, **norm) if normalize_qk else None)
        self.key_norm = nnx.data(nnx.RMSNorm(H, **norm) if normalize_qk else None)
        self.sinks = nnx.data(nnx.Param(jnp.zeros(num_heads, param_dtype)) if use_sinks else None)
        self.rngs = rngs.dropout.fork() if dropout_rate > 0 else None

    def __call__(
        self,
        inputs: Float[Array, "*B T in"],
        inputs_kv: Float[Array, "*B S in"] | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        positions: Int32[Array, "*#B T"] | None = None,
        segment_ids: Int32[Array, "*B T"] | None = None,
        cache: Cache | None = None,
        counts: Int32[Array, "B"] | None = None,
        debug_checks: bool = False,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Projects, attends, projects.

        Args:
          inputs: ``[*B, T, in_features]``.
          inputs_kv: for keys and values, ``[*B, S, in_kv_features]``; ``inputs`` by default.
          mask: boolean, broadcastable to ``[*B, N, T, S]``; True where a key is visible.
          positions: for ``rope``, int32 ``[T]`` or ``[*B, T]``; from 0 on by default.
          segment_ids: int32 ``[*B, T]``, of packed documents: a token sees its own document.
          cache: a ``KVCache`` or ``PagedKVCache``: the tokens are appended, and attend to what it
            then holds. One batch axis.
          counts: int32 ``[B]``: only the first ``counts[b]`` of the T tokens exist; with a cache.
          debug_checks: check at run time that the tokens fit the cache. Those that do not are
            dropped, and the outputs of their sequence are wrong.
          deterministic: over the layer's own.
          rngs: for dropout, over the layer's own.

        Returns:
          ``[*B, T, out_features]``; with a cache, a pair with the new cache.

        Raises:
          ValueError, TypeError: arguments do not go together, or as the function that attends.
        """
        of_keys = inputs if inputs_kv is None else inputs_kv
        query, key, value = self.query(inputs), self.key(of_keys), self.value(of_keys)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        attended, cache = self.core(
            query,
            key,
            value,
            sinks=None if self.sinks is None else self.sinks[...],
            mask=mask,
            positions=positions,
            segment_ids=segment_ids,
            inputs_kv=inputs_kv,
            cache=cache,
            counts=counts,
            debug_checks=debug_checks,
            dropout_key=self._dropout_key(deterministic, rngs),
        )
        out = self.out(attended)
        return out if cache is None else (out, cache)

    def _dropout_key(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> jax.Array | None:
        if self.core.dropout_rate == 0:
            return None
        if not drops(self.deterministic, deterministic):
            return None
        stream = self.rngs if rngs is None else rngs.dropout
        assert stream is not None
        return stream()
