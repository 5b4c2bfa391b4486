"""The table of named cases. Every backend runs every case, forward and every gradient.

A new feature is one more row here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Arrays = dict[str, Any]
Options = Callable[[Arrays], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: the shapes of its arrays, and the options made of the extra ones.

    Floating arrays, extra ones too, are differentiated. ``extra`` maps a name to a shape (normal
    numbers) or to a function of a numpy generator. ``poison`` spoils arrays after they are made.
    """

    name: str
    B: tuple[int, ...] = (2,)
    T: int = 150
    S: int = 270
    N: int = 4
    K: int = 2
    H: int = 16
    Hv: int | None = None
    dtype: str = "float32"
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Options = lambda arrays: {}
    poison: Callable[[Arrays], None] = lambda arrays: None

    def arrays(self) -> Arrays:
        """Fresh arrays, the same for the same case name."""
        rng = np.random.default_rng(list(self.name.encode()))
        Hv = self.H if self.Hv is None else self.Hv
        shapes = {
            "query": (*self.B, self.T, self.N, self.H),
            "key": (*self.B, self.S, self.K, self.H),
            "value": (*self.B, self.S, self.K, Hv),
            **self.extra,
        }
        made = {}
        for name, shape in shapes.items():
            x = shape(rng) if callable(shape) else rng.standard_normal(shape)
            made[name] = x.astype(jnp.dtype(self.dtype)) if x.dtype.kind == "f" else x
        self.poison(made)
        return made

    @property
    def is_empty(self) -> bool:
        return 0 in (*self.B, self.T, self.S)

    def in_16_bits(self) -> "Case":
        """The same case for kernels that compute in 16 bits."""
        is_half = jnp.dtype(self.dtype).itemsize == 2
        return self if is_half else dataclasses.replace(self, dtype="bfloat16")

    def call(self, attention: Callable[..., Any], arrays: Arrays) -> Any:
        """``attention`` on the arrays, with the case's options."""
        return attention(arrays["query"], arrays["key"], arrays["value"], **self.options(arrays))


def _given(**static: Any) -> Options:
    """Options known at trace time; those given as "@name" are extra arrays."""

    def options(arrays: Arrays) -> dict[str, Any]:
        return {
            k: arrays[v[1:]] if isinstance(v, str) and v.startswith("@") else v
            for k, v in static.items()
        }

    return options


def _integers(values: Any) -> Callable[[Any], Any]:
    return lambda rng: np.asarray(values, np.int32)


def _bits(shape: tuple[int, ...], share: float = 0.6) -> Callable[[Any], Any]:
    return lambda rng: rng.random(shape) < share


def _documents(shape: tuple[int, int], count: int) -> Callable[[Any], Any]:
    """Ascending document numbers along the last axis."""
    return lambda rng: np.sort(rng.integers(0, count, shape), axis=-1).astype(np.int32)


def _spoil(name: str, *index: Any) -> Callable[[Arrays], None]:
    """Puts NaN at ``index`` of an array."""

    def poison(arrays: Arrays) -> None:
        arrays[name][index] = np.nan

    return poison


def _spoil_all(*poisons: Callable[[Arrays], None]) -> Callable[[Arrays], None]:
    def poison(arrays: Arrays) -> None:
        for one in poisons:
            one(arrays)

    return poison


_REST = slice(None)

SHAPES = [
    Case("plain"),
    Case("self", T=256, S=256, N=4, K=4),
    Case("gqa_6_3", N=6, K=3),
    Case("gqa_6_2", N=6, K=2),
    Case("mqa_8_1", N=8, K=1),
    Case("value_dim", H=24, Hv=40),
    Case("head_dim_72", H=72),
    Case("head_dim_1", H=1, Hv=1),
    Case("one_token", T=1, S=1),
    Case("one_query", T=1),
    Case("one_key", S=1),
    Case("prime_lengths", T=131, S=257, N=3, K=3),
    Case("unbatched", B=()),
    Case("batch_rank_2", B=(2, 3), T=40, S=50),
    Case("long", B=(1,), T=1030, S=1100, N=1, K=1),
    Case("no_batch", B=(0,)),
    Case("no_queries", T=0),
    Case("no_keys", S=0, options=_given(is_causal=True)),
    Case("no_keys_bias_t1", S=0, extra={"x": (150, 1)}, options=_given(bias="@x")),
    Case("no_queries_bias_1s", T=0, extra={"x": (1, 270)}, options=_given(bias="@x")),
    Case("scale", options=_given(scale=0.7)),
    Case("precision", options=_given(precision="highest", deterministic=True)),
]

BANDS = [
    Case("causal", options=_given(is_causal=True)),
    Case("causal_square", T=270, options=_given(is_causal=True)),
    Case("causal_more_queries", T=300, S=100, options=_given(is_causal=True)),
    Case("causal_bottom_right", options=_given(is_causal=True, query_offset=120)),
    Case("causal_before_keys", options=_given(is_causal=True, query_offset=-60)),
    Case(
        "causal_offsets",
        B=(3,),
        extra={"offset": _integers([0, 120, -7])},
        options=_given(is_causal=True, query_offset="@offset"),
    ),
    Case("window", options=_given(local_window_size=20)),
    Case("window_asymmetric", options=_given(local_window_size=(5, 60))),
    Case("window_causal", options=_given(local_window_size=(33, 9), is_causal=True)),
    Case("window_zero", options=_given(local_window_size=0)),
    Case("window_out_of_keys", T=300, S=90, options=_given(local_window_size=(10, 3))),
    Case(
        "window_offsets",
        extra={"offset": _integers([250, 40])},
        options=_given(local_window_size=(30, 0), query_offset="@offset"),
    ),
]

_LENGTHS = {"rows": _integers([150, 70, 0]), "keys": _integers([270, 13, 0])}
_DOCUMENTS = {"q_ids": _documents((2, 150), 5), "kv_ids": _documents((2, 270), 5)}
_BY_DOCUMENT = {"query_segment_ids": "@q_ids", "key_value_segment_ids": "@kv_ids"}

MASKS = [
    Case(
        "query_lengths",
        B=(3,),
        extra={"rows": _LENGTHS["rows"]},
        options=_given(query_seq_lengths="@rows"),
    ),
    Case(
        "key_value_lengths",
        B=(3,),
        extra={"keys": _LENGTHS["keys"]},
        options=_given(key_value_seq_lengths="@keys"),
    ),
    Case(
        "key_value_lengths_causal",
        B=(3,),
        extra={"keys": _LENGTHS["keys"]},
        options=_given(key_value_seq_lengths="@keys", is_causal=True, local_window_size=(100, 0)),
    ),
    Case(
        "lengths_causal",
        B=(3,),
        extra=_LENGTHS,
        options=_given(query_seq_lengths="@rows", key_value_seq_lengths="@keys", is_causal=True),
    ),
    Case("segments", extra=_DOCUMENTS, options=_given(**_BY_DOCUMENT)),
    Case(
        "segments_of_one_token",
        T=1,
        extra={
            "q_ids": lambda rng: rng.integers(0, 2, (2, 1), np.int32),
            "kv_ids": _documents((2, 270), 2),
        },
        options=_given(**_BY_DOCUMENT),
    ),
    Case(
        "segments_causal",
        T=270,
        extra={"ids": _documents((2, 270), 7)},
        options=_given(query_segment_ids="@ids", key_value_segment_ids="@ids", is_causal=True),
    ),
    Case(
        "segments_apart",  # the first batch element shares no document
        extra={
            "q_ids": _integers(np.arange(2)[:, None].repeat(150, 1)),
            "kv_ids": _integers(np.ones((2, 270))),
        },
        options=_given(**_BY_DOCUMENT),
    ),
    *(
        Case(f"mask_{name}", extra={"m": _bits(shape)}, options=_given(mask="@m"))
        for name, shape in {
            "bnts": (2, 4, 150, 270),
            "b11s": (2, 1, 1, 270),
            "1nt1": (1, 4, 150, 1),
            "ts": (150, 270),
            "s": (270,),
            "1": (1,),
        }.items()
    ),
    Case(
        "mask_empty_rows",
        extra={
            "m": lambda rng: (rng.random((2, 1, 150, 270)) < 0.5) & (rng.random(150) < 0.5)[:, None]
        },
        options=_given(mask="@m", is_causal=True),
    ),
    Case(
        "mask_batch_rank_2",
        B=(2, 3),
        T=40,
        S=50,
        extra={"m": _bits((1, 3, 1, 40, 50))},
        options=_given(mask="@m"),
    ),
    Case(
        "mask_mod",
        options=lambda a: {"mask_mod": lambda b, h, q, k: (q + k + h) % 3 != b},
    ),
    Case(
        "mask_mod_captured",
        extra={"reach": _integers([3, 30, 100, 5])},
        options=lambda a: {"mask_mod": lambda b, h, q, k: abs(q - k) <= jnp.asarray(a["reach"])[h]},
    ),
]

SCORES = [
    *(
        Case(f"bias_{b}{n}{t}{s}", extra={"x": (b, n, t, s)}, options=_given(bias="@x"))
        for b in (1, 2)
        for n in (1, 4)
        for t in (1, 150)
        for s in (1, 270)
    ),
    Case("bias_ts", extra={"x": (150, 270)}, options=_given(bias="@x", is_causal=True)),
    Case(
        "bias_batch_rank_2",
        B=(2, 3),
        T=40,
        S=50,
        extra={"x": (2, 1, 4, 1, 50)},
        options=_given(bias="@x"),
    ),
    Case(
        "bias_minus_infinity",
        extra={"x": lambda rng: np.where(rng.random((150, 1)) < 0.3, -np.inf, 0.0)},
        options=_given(bias="@x"),
    ),
    Case("soft_cap", options=_given(logits_soft_cap=0.8)),
    Case(
        "soft_cap_bias",
        extra={"x": (4, 150, 270)},
        options=_given(bias="@x", logits_soft_cap=2.0, is_causal=True),
    ),
    Case(
        "alibi",
        extra={"slopes": (4,)},
        options=_given(alibi_slopes="@slopes", is_causal=True, query_offset=120),
    ),
    Case(
        "alibi_offsets",
        extra={"slopes": lambda rng: rng.random(4) / 9, "offset": _integers([3, -20])},
        options=_given(alibi_slopes="@slopes", query_offset="@offset"),
    ),
    Case("sinks", extra={"sinks": (4,)}, options=_given(sinks="@sinks")),
    Case(
        "sinks_empty_rows",
        extra={"sinks": (4,)},
        options=_given(sinks="@sinks", is_causal=True, query_offset=-60),
    ),
    Case(
        "score_mod",
        options=lambda a: {"score_mod": lambda s, b, h, q, k: s * 0.5 + jnp.cos(q - k + b + h)},
    ),
    Case(
        "score_mod_per_head",
        extra={"w": (4,), "c": (2, 4)},
        options=lambda a: {
            "score_mod": lambda s, b, h, q, k: (
                s * jnp.asarray(a["w"])[h] + jnp.asarray(a["c"])[b, h] * (q - k) / 100
            ),
        },
    ),
    Case(
        "score_mod_relative_bias",  # T5
        extra={"table": (4, 33)},
        options=lambda a: {
            "score_mod": lambda s, b, h, q, k: (
                s + jnp.asarray(a["table"])[h, jnp.clip(q - k, -16, 16) + 16]
            ),
        },
    ),
    Case(
        "score_mod_masks",
        options=lambda a: {
            "score_mod": lambda s, b, h, q, k: jnp.where((q + k) % 5 == h, s, -jnp.inf),
            "is_causal": True,
        },
    ),
    Case(
        "score_mod_integers",
        extra={"bucket": _integers(np.arange(270) // 40)},
        options=lambda a: {
            "score_mod": lambda s, b, h, q, k: s + jnp.sin(jnp.asarray(a["bucket"])[k] * 1.0),
        },
    ),
]

_DROPOUT_KEY = np.array([7, 11], np.uint32)

COMBINED = [
    Case("dropout", options=_given(dropout_rate=0.3, dropout_key=_DROPOUT_KEY)),
    Case(
        "mask_all_true_tail",
        T=64,
        S=200,
        extra={"m": lambda rng: np.ones((1, 1, 64, 200), bool), "x": (1, 4, 64, 1)},
        options=_given(mask="@m", bias="@x"),
    ),
    Case(
        "mask_mod_all_true_tail",
        T=70,
        S=200,
        options=_given(mask_mod=lambda b, h, q, k: k >= 0),
    ),
    Case("score_mod_ignores_scores", options=_given(score_mod=lambda s, b, h, q, k: q * 0.01)),
    Case(
        "score_mod_steep_at_zero",
        T=70,
        S=128,
        options=_given(score_mod=lambda s, b, h, q, k: jnp.sqrt(jnp.abs(s) + 1e-30)),
    ),
    Case(
        "dropout_broadcast",
        B=(2,),
        options=_given(dropout_rate=0.3, dropout_key=_DROPOUT_KEY, broadcast_dropout=True),
    ),
    Case(
        "dropout_causal",
        N=6,
        K=2,
        options=_given(dropout_rate=0.1, dropout_key=_DROPOUT_KEY, is_causal=True),
    ),
    Case(
        "everything",
        N=6,
        K=2,
        H=24,
        Hv=40,
        extra={
            "x": (2, 1, 150, 270),
            "m": _bits((6, 150, 270), 0.9),
            "slopes": lambda rng: rng.random(6) / 9,
            "sinks": (6,),
            "w": (6,),
            "rows": _integers([150, 77]),
            "keys": _integers([200, 270]),
            "offset": _integers([100, 30]),
            **_DOCUMENTS,
        },
        options=lambda a: {
            **_given(
                bias="@x",
                mask="@m",
                is_causal=True,
                local_window_size=(120, 4),
                query_seq_lengths="@rows",
                key_value_seq_lengths="@keys",
                query_offset="@offset",
                logits_soft_cap=5.0,
                alibi_slopes="@slopes",
                sinks="@sinks",
                dropout_rate=0.2,
                dropout_key=_DROPOUT_KEY,
                **_BY_DOCUMENT,
            )(a),
            "score_mod": lambda s, b, h, q, k: s * jnp.asarray(a["w"])[h],
            "mask_mod": lambda b, h, q, k: (q * k + h) % 7 != 0,
        },
    ),
]

_SOME_LENGTHS = {"rows": _integers([150, 70]), "keys": _integers([180, 270])}

POISONED = [
    Case(
        "nan_beyond_lengths",
        extra=_SOME_LENGTHS,
        options=_given(
            query_seq_lengths="@rows", key_value_seq_lengths="@keys", logits_soft_cap=3.0
        ),
        poison=_spoil_all(
            _spoil("query", 1, slice(70, None)),
            _spoil("key", 0, slice(180, None)),
            _spoil("value", 0, slice(180, None)),
        ),
    ),
    Case(
        "nan_outside_window",
        T=100,
        options=_given(local_window_size=(10, 20)),
        poison=_spoil_all(
            _spoil("key", _REST, slice(121, None)), _spoil("value", _REST, slice(121, None))
        ),
    ),
    Case(
        "nan_in_unseen_document",
        extra={
            "q_ids": _integers(np.ones((2, 150))),
            "kv_ids": _integers(np.arange(270).repeat(2).reshape(270, 2).T % 3),
        },
        options=_given(**_BY_DOCUMENT),
        poison=_spoil_all(
            _spoil("key", _REST, slice(0, None, 3)), _spoil("value", _REST, slice(2, None, 3))
        ),
    ),
    Case(
        "nan_in_document_between",
        extra={
            "q_ids": _integers(np.arange(150).repeat(2).reshape(150, 2).T // 25 * 2),
            "kv_ids": _integers(np.arange(270).repeat(2).reshape(270, 2).T // 25),
        },
        options=_given(**_BY_DOCUMENT),
        poison=_spoil_all(
            _spoil("key", _REST, slice(25, 50)), _spoil("value", _REST, slice(25, 50))
        ),
    ),
    Case(
        "nan_without_queries",
        extra={"rows": _integers([0, 150])},
        options=_given(query_seq_lengths="@rows"),
        poison=_spoil_all(_spoil("key", 0), _spoil("value", 0)),
    ),
    Case(
        "nan_masked",
        extra={"m": lambda rng: np.arange(270) % 4 != 1},
        options=_given(mask="@m", is_causal=True),
        poison=_spoil_all(
            _spoil("key", _REST, slice(1, None, 4)), _spoil("value", _REST, slice(1, None, 4))
        ),
    ),
    Case(
        "nan_masked_by_mask_mod",
        options=lambda a: {"mask_mod": lambda b, h, q, k: k % 4 != 1},
        poison=_spoil_all(
            _spoil("key", _REST, slice(1, None, 4)), _spoil("value", _REST, slice(1, None, 4))
        ),
    ),
]

DTYPES = [
    Case("bfloat16", dtype="bfloat16"),
    Case("bfloat16_causal", dtype="bfloat16", H=64, options=_given(is_causal=True)),
    Case("float16_window", dtype="float16", options=_given(local_window_size=(40, 0))),
    Case("float64", dtype="float64"),
    Case(
        "float64_scores",
        dtype="float64",
        extra={"sinks": (4,), "x": (4, 1, 270), "w": (4,)},
        options=lambda a: {
            **_given(sinks="@sinks", bias="@x", logits_soft_cap=9.0)(a),
            "score_mod": lambda s, b, h, q, k: s * jnp.asarray(a["w"])[h],
        },
    ),
    Case(
        "bfloat16_scores",
        dtype="bfloat16",
        extra={"sinks": (4,), "x": (1, 4, 150, 1), "slopes": lambda rng: rng.random(4) / 9},
        options=_given(sinks="@sinks", bias="@x", alibi_slopes="@slopes", is_causal=True),
    ),
    Case(
        "float16_lengths_dropout",
        dtype="float16",
        extra=_SOME_LENGTHS,
        options=_given(
            query_seq_lengths="@rows",
            key_value_seq_lengths="@keys",
            dropout_rate=0.25,
            dropout_key=_DROPOUT_KEY,
        ),
    ),
]

CASES = SHAPES + BANDS + MASKS + SCORES + COMBINED + POISONED + DTYPES
