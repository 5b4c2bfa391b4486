"""Every wrong call says which argument, what it was, and what to do."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxflash


def _x(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


_COMPLEX = jnp.ones(4, jnp.complex64)
_SEGMENT = jnp.zeros((2, 8), jnp.int32)


class Wrong:
    """A call of [2, 8, 4, 16] query, [2, 8, 2, 16] key and value, with some arguments replaced."""

    def __init__(self, error: type[Exception], message: str, **replaced: Any):
        self.error, self.message, self.replaced = error, message, replaced

    def call(self) -> Any:
        arrays = {"query": _x(2, 8, 4, 16), "key": _x(2, 8, 2, 16), "value": _x(2, 8, 2, 16)}
        return jaxflash.dot_product_attention(**{**arrays, **self.replaced})


WRONG = [
    # query, key, value
    Wrong(
        ValueError,
        "query must have at least three axes [*B, T, N, H]; got shape (8, 16)",
        query=_x(8, 16),
    ),
    Wrong(ValueError, "key must have at least three axes [*B, S, K, H]; got shape ()", key=_x()),
    Wrong(TypeError, "query must be an array; got 'q' (str)", query="q"),
    Wrong(TypeError, "value must be an array; got {} (dict)", value={}),
    Wrong(
        TypeError,
        "query must be bfloat16, float16, float32 or float64; got int32",
        query=_x(2, 8, 4, 16, dtype=jnp.int32),
    ),
    Wrong(
        TypeError,
        "key must be bfloat16, float16, float32 or float64; got complex64",
        key=_x(2, 8, 2, 16, dtype=jnp.complex64),
    ),
    Wrong(
        TypeError,
        "got query float32 and key bfloat16; convert one with .astype",
        key=_x(2, 8, 2, 16, dtype=jnp.bfloat16),
    ),
    Wrong(
        TypeError, "got query float32 and value float16", value=_x(2, 8, 2, 16, dtype=jnp.float16)
    ),
    Wrong(
        ValueError,
        "must share their batch axes; got query (2, 8, 4, 16) and key (3, 8, 2, 16)",
        key=_x(3, 8, 2, 16),
    ),
    Wrong(
        ValueError,
        "must share their batch axes; got query (2, 8, 4, 16) and value (8, 2, 16)",
        value=_x(8, 2, 16),
    ),
    Wrong(
        ValueError, "key and value must have the same length S; got 8 and 9", value=_x(2, 9, 2, 16)
    ),
    Wrong(
        ValueError, "key and value must have the same heads K; got 2 and 4", value=_x(2, 8, 4, 16)
    ),
    Wrong(ValueError, "same head dimension H; got 16 and 32", key=_x(2, 8, 2, 32)),
    Wrong(
        ValueError,
        "query heads N must be a multiple of key-value heads K; got N=4, K=3",
        key=_x(2, 8, 3, 16),
        value=_x(2, 8, 3, 16),
    ),
    Wrong(
        ValueError,
        "heads and head dimensions must be positive",
        key=_x(2, 8, 0, 16),
        value=_x(2, 8, 0, 16),
    ),
    # bias and mask
    Wrong(
        ValueError,
        "bias must broadcast to the logits [*B, N, T, S] = (2, 4, 8, 8); got shape (2, 3, 8, 8)",
        bias=_x(2, 3, 8, 8),
    ),
    Wrong(ValueError, "bias must broadcast to the logits", bias=_x(1, 2, 4, 8, 8)),
    Wrong(
        TypeError,
        "bias must be floating; got bool; pass booleans as mask",
        bias=_x(8, 8, dtype=bool),
    ),
    Wrong(TypeError, "bias must be floating; got int32", bias=_x(8, 8, dtype=jnp.int32)),
    Wrong(
        TypeError, "mask must be boolean; got float32; pass an additive mask as bias", mask=_x(8, 8)
    ),
    Wrong(TypeError, "or a 0/1 mask as mask != 0", mask=_x(8, 8, dtype=jnp.int32)),
    Wrong(
        ValueError,
        "mask must broadcast to the logits [*B, N, T, S] = (2, 4, 8, 8); got shape (9, 8)",
        mask=_x(9, 8, dtype=bool),
    ),
    # scale, causal, window, offset
    Wrong(TypeError, "scale must be a number known at trace time; got '1' (str)", scale="1"),
    Wrong(
        TypeError,
        "scale must be a number known at trace time; got an array of shape (2,)",
        scale=_x(2),
    ),
    Wrong(ValueError, "scale must be finite; got nan", scale=float("nan")),
    Wrong(
        TypeError, "is_causal must be True or False, known at trace time; got 1 (int)", is_causal=1
    ),
    Wrong(
        TypeError,
        "is_causal must be True or False, known at trace time; got an array",
        is_causal=jnp.array(True),
    ),
    Wrong(
        TypeError,
        "local_window_size must be an int or a pair (left, right) of ints; got 2.5",
        local_window_size=2.5,
    ),
    Wrong(TypeError, "local_window_size must be an int or a pair", local_window_size=(1, 2, 3)),
    Wrong(TypeError, "local_window_size must be an int or a pair", local_window_size=(None, 3)),
    Wrong(TypeError, "local_window_size must be an int or a pair", local_window_size=True),
    Wrong(
        ValueError, "local_window_size must not be negative; got (-1, 0)", local_window_size=(-1, 0)
    ),
    Wrong(
        ValueError,
        "local_window_size must not be negative; got -3; the window",
        local_window_size=-3,
    ),
    Wrong(
        TypeError,
        "query_offset must be int32; got float32; convert it with .astype(jnp.int32)",
        query_offset=1.5,
    ),
    Wrong(
        ValueError,
        "query_offset must have shape [] or [*B] = (2,); got shape (3,)",
        query_offset=_x(3, dtype=jnp.int32),
    ),
    Wrong(ValueError, "query_offset must be within 2**30 of zero", query_offset=2**40),
    Wrong(TypeError, "scale must be a number known at trace time", scale=jnp.complex64(1j)),
    Wrong(
        TypeError,
        "score_mod must capture no complex array; got an array of shape (4,) and dtype complex64",
        score_mod=lambda s, b, h, q, k: s + jnp.real(_COMPLEX[h]),
    ),
    # lengths and segments
    Wrong(TypeError, "query_seq_lengths must be int32; got float32", query_seq_lengths=_x(2)),
    Wrong(
        TypeError,
        "key_value_seq_lengths must be int32; got uint8",
        key_value_seq_lengths=_x(2, dtype=jnp.uint8),
    ),
    Wrong(
        ValueError,
        "key_value_seq_lengths must have shape [*B] = (2,); got shape (3,)",
        key_value_seq_lengths=_x(3, dtype=jnp.int32),
    ),
    Wrong(
        ValueError,
        "query_seq_lengths must have shape [*B] = (2,); got shape ()",
        query_seq_lengths=_x(dtype=jnp.int32),
    ),
    Wrong(ValueError, "key_value_segment_ids is missing", query_segment_ids=_SEGMENT),
    Wrong(ValueError, "query_segment_ids is missing", key_value_segment_ids=_SEGMENT),
    Wrong(
        TypeError,
        "query_segment_ids must be int32; got bool",
        query_segment_ids=_SEGMENT == 0,
        key_value_segment_ids=_SEGMENT,
    ),
    Wrong(
        ValueError,
        "key_value_segment_ids must have shape [*B, S] = (2, 8); got shape (2, 7)",
        query_segment_ids=_SEGMENT,
        key_value_segment_ids=_SEGMENT[:, :7],
    ),
    # scores
    Wrong(
        ValueError,
        "logits_soft_cap must be positive; got 0.0; None means no cap",
        logits_soft_cap=0.0,
    ),
    Wrong(ValueError, "logits_soft_cap must be positive; got -2.0", logits_soft_cap=-2),
    Wrong(
        TypeError,
        "logits_soft_cap must be a number known at trace time; got True",
        logits_soft_cap=True,
    ),
    Wrong(
        ValueError, "alibi_slopes must have shape [N] = (4,); got shape (2,)", alibi_slopes=_x(2)
    ),
    Wrong(
        TypeError, "alibi_slopes must be floating; got int32", alibi_slopes=_x(4, dtype=jnp.int32)
    ),
    Wrong(ValueError, "sinks must have shape [N] = (4,); got shape (1, 4)", sinks=_x(1, 4)),
    Wrong(
        TypeError,
        "sinks must be floating; got bool; convert it with .astype(jnp.float32)",
        sinks=_x(4, dtype=bool),
    ),
    Wrong(
        TypeError,
        "score_mod must be a function (score, b, h, q_idx, kv_idx); got 3 (int)",
        score_mod=3,
    ),
    Wrong(
        TypeError,
        "score_mod must take (score, b, h, q_idx, kv_idx); got score_mod(s, q, k)",
        score_mod=lambda s, q, k: s,
    ),
    Wrong(
        ValueError,
        "score_mod must return one scalar",
        score_mod=lambda s, b, h, q, k: s * jnp.ones(3),
    ),
    Wrong(ValueError, "score_mod must return one scalar", score_mod=lambda s, b, h, q, k: (s, s)),
    Wrong(
        TypeError,
        "score_mod must return a floating score; got int32",
        score_mod=lambda s, b, h, q, k: q,
    ),
    Wrong(TypeError, "mask_mod must be a function (b, h, q_idx, kv_idx)", mask_mod="causal"),
    Wrong(
        TypeError,
        "mask_mod must take (b, h, q_idx, kv_idx); got mask_mod(q, k)",
        mask_mod=lambda q, k: q >= k,
    ),
    Wrong(
        TypeError,
        "mask_mod must return a boolean, True where visible; got int32",
        mask_mod=lambda b, h, q, k: q - k,
    ),
    # dropout
    Wrong(
        ValueError,
        "dropout_rate=0.1 needs a dropout_key; pass jax.random.key(...)",
        dropout_rate=0.1,
    ),
    Wrong(
        ValueError,
        "dropout_rate must be in [0, 1); got 1.0",
        dropout_rate=1.0,
        dropout_key=jax.random.key(0),
    ),
    Wrong(ValueError, "dropout_rate must be in [0, 1); got -0.5", dropout_rate=-0.5),
    Wrong(
        TypeError, "dropout_rate must be a number known at trace time; got None", dropout_rate=None
    ),
    Wrong(TypeError, "dropout_key must be one key of jax.random", dropout_rate=0.5, dropout_key=7),
    Wrong(
        TypeError,
        "dropout_key must be one key of jax.random",
        dropout_rate=0.5,
        dropout_key=jax.random.split(jax.random.key(0), 3),
    ),
    # the rest
    Wrong(
        ValueError,
        "implementation must be None or one of ['hopper', 'triton', 'xla', 'reference']; got "
        "'cudnn'",
        implementation="cudnn",
    ),
    Wrong(ValueError, "implementation must be None or one of", implementation=True),
    Wrong(
        ValueError,
        "one of 'default', 'high', 'highest', 'fp8'; got 'fp4'",
        precision="fp4",
    ),
    Wrong(
        TypeError,
        "deterministic must be True or False, known at trace time; got 'yes' (str)",
        deterministic="yes",
    ),
    Wrong(
        TypeError,
        "return_residual must be True or False, known at trace time; got 0 (int)",
        return_residual=0,
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{'-'.join(wrong.replaced)}")
def test_wrong_call(wrong: Wrong) -> None:
    with pytest.raises(wrong.error, match=re.escape(wrong.message)):
        wrong.call()


def test_traced_options_name_the_remedy() -> None:
    x = _x(1, 4, 1, 8)
    with pytest.raises(TypeError, match="multiply the query by a traced scale instead"):
        jax.jit(lambda s: jaxflash.dot_product_attention(x, x, x, scale=s))(0.5)
    with pytest.raises(TypeError, match="use score_mod for a traced one"):
        jax.jit(lambda c: jaxflash.dot_product_attention(x, x, x, logits_soft_cap=c))(0.5)


def test_merge_refuses_other_shapes() -> None:
    out, lse = _x(2, 8, 4, 16), _x(2, 8, 4)
    with pytest.raises(ValueError, match=re.escape("lse_b must have shape [*B, T, N] = (2, 8, 4)")):
        jaxflash.merge(out, lse, out, lse[:1])
    with pytest.raises(ValueError, match="out_b must have shape"):
        jaxflash.merge(out, lse, out[:1], lse)


def test_merge_refuses_integers() -> None:
    out = _x(2, 8, 4, 16)
    with pytest.raises(TypeError, match="lse_a must be floating; got int32"):
        jaxflash.merge(out, _x(2, 8, 4, dtype=jnp.int32), out, _x(2, 8, 4))


def test_errors_of_score_mod_pass_through() -> None:
    def broken(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Wrong(RuntimeError, "", score_mod=broken).call()
