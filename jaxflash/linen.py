"""Attention for ``flax.linen``: a drop-in ``attention_fn``, and modules with a cache.

Example:
  >>> import flax.linen as nn
  >>> import jaxflash.linen
  >>> layer = nn.MultiHeadDotProductAttention(
  ...     num_heads=8, attention_fn=jaxflash.linen.dot_product_attention
  ... )
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init
from jaxtyping import Array, ArrayLike, Bool, Float, Int32

from jaxflash.api import Implementation
from jaxflash.modules.core import Cache, Core, drops, head_dim_of
from jaxflash.modules.drop_in import attend_as_flax
from jaxflash.modules.rope import Rope

__all__ = ["MultiHeadAttention", "dot_product_attention"]


# Linen passes what the signature names, and nothing else: it must name all of it.
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
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    **options: Any,
) -> Float[Array, "*B T N Hv"]:
    """``flax.linen.dot_product_attention``, for ``MultiHeadDotProductAttention(attention_fn=...)``.

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
      force_fp32_for_softmax: the softmax is always float32; either value will do.
      einsum_dot_general: must be None, like the next two: there is no einsum.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.
      is_causal: row i sees keys j <= i.
      **options: the other options of ``jaxflash.dot_product_attention``, but for
        ``return_residual`` and its own ``deterministic``: bind some with ``functools.partial``, as
        ``local_window_size`` or ``implementation``.

    Returns:
      ``[*B, T, N, Hv]``.

    Raises:
      ValueError, TypeError: as ``jaxflash.dot_product_attention``; something is asked for that
        needs the weights or an einsum; ``is_causal`` with one query and more keys.

    Example:
      >>> import functools
      >>> windowed = functools.partial(dot_product_attention, local_window_size=(127, 0))
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=windowed)
      >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 256, 64)))[0].shape
      (2, 256, 64)
    """
    del force_fp32_for_softmax
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
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
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )


class MultiHeadAttention(nn.Module):
    """Attention with projections, rotary positions, and a cache that is passed in and returned.

    The parameters are those of ``MultiHeadDotProductAttention``: kernels ``query`` [in, N, H],
    ``key`` and ``value`` [in, K, H], ``out`` [N, H, out]; with ``normalize_qk`` scales
    ``query_norm`` and ``key_norm`` [H] of an RMS norm; with ``use_sinks`` also ``sinks`` [N].

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key-value heads K, a divisor of N; N by default.
      qkv_features: N * H; the features of the inputs by default.
      out_features: of the output; the features of the inputs by default.
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
      deterministic: drop nothing; None leaves it to the call.
      use_bias: whether projections have a bias.
      kernel_init: of all projections.
      bias_init: likewise.
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
      precision: of the projections.
      implementation: as in ``jaxflash.dot_product_attention``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxflash, jaxflash.linen
      >>> layer = jaxflash.linen.MultiHeadAttention(
      ...     num_heads=8, num_kv_heads=2, is_causal=True, rope=jaxflash.Rope()
      ... )
      >>> prompt = jnp.ones((1, 10, 64))
      >>> variables = layer.init(jax.random.key(0), prompt)
      >>> layer.apply(variables, prompt).shape
      (1, 10, 64)
      >>> cache = jaxflash.KVCache.zeros(1, 32, 2, 8, dtype=jnp.float32)
      >>> out, cache = layer.apply(variables, prompt, cache=cache)
      >>> out, cache = layer.apply(variables, jnp.ones((1, 1, 64)), cache=cache)
      >>> cache.lengths
      Array([11], dtype=int32)
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    head_dim: int | None = None
    is_causal: bool = False
    rope: Rope | None = None
    normalize_qk: bool = False
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    scale: float | None = None
    use_sinks: bool = False
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False
    deterministic: bool | None = None
    use_bias: bool = True
    kernel_init: Any = default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    implementation: Implementation | None = None

    @nn.compact
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
    ) -> Any:
        """Projects, attends, projects.

        Args:
          inputs: ``[*B, T, in]``.
          inputs_kv: for keys and values, ``[*B, S, in]``; ``inputs`` by default.
          mask: boolean, broadcastable to ``[*B, N, T, S]``; True where a key is visible.
          positions: for ``rope``, int32 ``[T]`` or ``[*B, T]``; from 0 on by default.
          segment_ids: int32 ``[*B, T]``, of packed documents: a token sees its own document.
          cache: a ``KVCache`` or ``PagedKVCache``: the tokens are appended, and attend to what it
            then holds. One batch axis.
          counts: int32 ``[B]``: only the first ``counts[b]`` of the T tokens exist; with a cache.
          debug_checks: check at run time that the tokens fit the cache. Those that do not are
            dropped, and the outputs of their sequence are wrong.
          deterministic: over the layer's own. Where something is dropped, the rng is ``"dropout"``.

        Returns:
          ``[*B, T, out_features]``; with a cache, a pair with the new cache.

        Raises:
          ValueError, TypeError: arguments do not go together, or as the function that attends.
        """
        of_keys = inputs if inputs_kv is None else inputs_kv
        features, K = inputs.shape[-1], self.num_kv_heads or self.num_heads
        H = head_dim_of(self.num_heads, K, self.qkv_features or features, self.head_dim)
        query = self._project("query", (self.num_heads, H))(inputs)
        key = self._project("key", (K, H))(of_keys)
        value = self._project("value", (K, H))(of_keys)
        if self.normalize_qk:
            types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            query = nn.RMSNorm(name="query_norm", **types)(query)
            key = nn.RMSNorm(name="key_norm", **types)(key)
        sinks = None
        if self.use_sinks:
            zeros = nn.initializers.zeros_init()
            sinks = self.param("sinks", zeros, (self.num_heads,), self.param_dtype)
        attended, cache = self._core(
            query,
            key,
            value,
            sinks=sinks,
            mask=mask,
            positions=positions,
            segment_ids=segment_ids,
            inputs_kv=inputs_kv,
            cache=cache,
            counts=counts,
            debug_checks=debug_checks,
            dropout_key=self._dropout_key(deterministic),
        )
        out = self._project("out", self.out_features or features, (-2, -1))(attended)
        return out if cache is None else (out, cache)

    def _project(self, name: str, features: Any, axis: Any = -1) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            features,
            axis=axis,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name=name,
        )

    @property
    def _core(self) -> Core:
        return Core(
            is_causal=self.is_causal,
            rope=self.rope,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            scale=self.scale,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            implementation=self.implementation,
        )

    def _dropout_key(self, deterministic: bool | None) -> jax.Array | None:
        if self.dropout_rate == 0 or not drops(self.deterministic, deterministic):
            return None
        return self.make_rng("dropout")
