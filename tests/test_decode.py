"""Decoding and chunked prefill: every backend against the reference, whatever else memory holds."""

import dataclasses
import doctest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxflash
from jaxflash import inference
from jaxflash.arguments import canonicalize
from pallas_kernels import hopper
from pallas_kernels.common import walk as walks
from pallas_kernels.common.walk import Walk
from pallas_kernels.hopper.decode import choose_splits
from pallas_kernels.spec import narrow
from tests import oracle
from tests.test_conformance import INTERPRETS, ON_GPU, marks, running

BACKENDS = ("hopper", "triton", "xla")


@dataclasses.dataclass(frozen=True)
class Call:
    """Sequences that hold so many tokens, of which T are new."""

    name: str
    lengths: tuple[int, ...]
    T: int = 1
    S: int = 512
    N: int = 4
    K: int = 2
    H: int = 32
    Hv: int | None = None
    page_size: int | None = None
    dtype: str = "bfloat16"
    held: str | None = None  # dtype of pages of 8 bits
    sizes: int = 0  # values of pages differ by up to so many powers of two; keys by a few
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    only_gpu: bool = False

    def count(self, b: int) -> int:
        """How many of T rows are new tokens of a sequence; they come first."""
        return int(self.options["counts"][b]) if "counts" in self.options else self.T


_SLOPES, _SINKS = np.linspace(0.1, 0.4, 4, dtype=np.float32), np.array([0.5, -1, 2, 0], np.float32)
CALLS = [
    Call("one_token", (500, 31, 1), H=64),
    Call("full_cache", (512, 512)),
    Call("empty_sequence", (0, 300), H=64),
    Call("several_tokens", (500, 140), H=64, T=5),
    Call("longer_than_held", (3, 400), T=7),
    Call("many_rows", (200, 77), T=16, N=16, K=2, S=256),
    Call("multi_query", (500, 31), N=8, K=1, H=128),
    Call("key_dim", (300, 31), H=80, Hv=64),
    Call("value_dim_192", (300, 31), H=128, Hv=192),
    Call("every_head_its_own", (257, 128), K=4),
    Call("value_dim", (500, 31), H=24, Hv=40),
    Call("odd_capacity", (300, 17), S=301),
    Call("float16", (500, 31), H=64, dtype="float16"),
    Call("window", (500, 90), H=64, T=2, options={"local_window_size": (100, 0)}),
    Call("window_ahead", (500, 90), T=3, options={"local_window_size": (64, 64)}),
    Call("soft_cap", (500, 90), H=64, options={"logits_soft_cap": 2.0}),
    Call("alibi_and_sinks", (500, 2), H=64, T=3, options={
        "alibi_slopes": _SLOPES, "sinks": _SINKS,
    }),
    Call("pages_16", (500, 31, 1), H=128, page_size=16),
    Call("pages_32", (500, 33), T=2, page_size=32, H=24),
    Call("pages_64", (512, 64), H=64, page_size=64),
    Call("pages_128", (129, 400), page_size=128, N=8),
    Call("pages_256", (257, 256, 0), H=64, page_size=256),
    Call("pages_everything", (500, 300), H=64, T=2, page_size=16, options={
        "local_window_size": (150, 0), "logits_soft_cap": 3.0, "alibi_slopes": _SLOPES,
        "sinks": _SINKS, "scale": 0.3,
    }),
    Call("chunk_of_prefill", (400, 130), T=70, page_size=64),
    Call("chunk_of_prefill_16", (512, 90), T=90, page_size=16, options={"sinks": _SINKS}),
    Call("chunk_of_wide_heads", (200, 70), S=256, T=20, N=1, K=1, H=192, page_size=64),
    Call("contiguous_chunk", (400, 130), T=70),
    Call("counts", (400, 90, 7), H=64, T=5, options={"counts": np.array([5, 2, 0], np.int32)}),
    Call("counts_of_pages", (400, 90, 7), T=70, page_size=16, options={
        "counts": np.array([70, 33, 7], np.int32),
    }),
    Call("fp8_pages", (500, 31, 0), H=64, page_size=16, held="float8_e4m3fn"),
    Call("fp8_pages_everything", (500, 300), T=2, H=128, Hv=64, page_size=64, held="float8_e4m3fn",
        options={"local_window_size": (150, 0), "alibi_slopes": _SLOPES, "sinks": _SINKS}),
    Call("fp8_pages_of_all_sizes", (300, 90), S=320, H=64, page_size=32, held="float8_e4m3fn",
        sizes=60, options={"sinks": _SINKS}),
    Call("fp8_many_rows", (300, 90), S=320, T=16, N=16, H=128, page_size=32, held="float8_e4m3fn"),
    Call("int8_few_pages", (10, 100), S=128, H=64, page_size=16, held="int8"),
    Call("int8_pages", (500, 33), T=2, H=64, page_size=256, held="int8"),
    Call("int8_pages_of_any_width", (500, 90), H=24, page_size=32, held="int8"),
    Call("int8_chunk", (400, 130), T=70, H=24, page_size=64, held="int8", dtype="float16"),
    Call("wide", (700, 3000), S=4096, N=8, K=2, H=256, only_gpu=True),
    Call("long", (40000, 17), S=65536, N=32, K=8, H=128, page_size=64, only_gpu=True),
    Call("long_of_its_own", (40000, 65536), S=65536, N=8, K=8, H=64, only_gpu=True),
]  # fmt: skip
# The interpreter takes seconds for each.
INTERPRETED = (
    "longer_than_held", "many_rows", "value_dim", "odd_capacity", "alibi_and_sinks", "pages_256",
    "pages_everything", "chunk_of_prefill_16", "chunk_of_wide_heads", "empty_sequence", "counts",
    "counts_of_pages", "fp8_pages", "fp8_pages_everything", "fp8_pages_of_all_sizes", "int8_pages",
    "int8_chunk", "int8_few_pages", "key_dim", "fp8_many_rows",
)  # fmt: skip
# Too much alike to the others to be interpreted.
NOT_BY_TRITON = ("full_cache", "multi_query", "float16", "pages_128")


def _runs() -> list[Any]:
    return [
        pytest.param(backend, call, id=f"{call.name}-{backend}", marks=marks(backend))
        for backend in BACKENDS
        for call in CALLS
        if (ON_GPU or not call.only_gpu)
        and (backend != "hopper" or ON_GPU or (INTERPRETS and call.name in INTERPRETED))
        and (backend != "triton" or ON_GPU or call.name not in NOT_BY_TRITON)
    ]


def _arrays(call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, and a cache that is NaN where no sequence holds a token."""
    rng = np.random.default_rng(list(call.name.encode()))
    B, Hv = len(call.lengths), call.Hv or call.H
    shapes = (B, call.T, call.N, call.H), (B, call.S, call.K, call.H), (B, call.S, call.K, Hv)
    query, *cache = (rng.standard_normal(s).astype(jnp.dtype(call.dtype)) for s in shapes)
    beyond = np.arange(call.S) >= np.array(call.lengths)[:, None]
    if call.sizes:
        exponents = np.arange(call.S) // call.page_size * 17 % call.sizes - call.sizes // 2
        for i, of_pages in enumerate((exponents % 5, exponents)):
            cache[i] *= (2.0**of_pages)[:, None, None].astype(cache[i].dtype)
    if call.held is not None:
        cache = [_rounded(call, x) for x in cache]
    for x in cache:
        x[beyond] = np.nan
    return query, cache[0], cache[1]


def _rounded(call: Call, x: np.ndarray) -> np.ndarray:
    """The nearest numbers that pages of 8 bits can hold."""
    held, scales = _in_8_bits(call, x)
    return np.asarray(narrow.widen(held, scales), x.dtype).reshape(x.shape)


def _in_8_bits(call: Call, x: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Pages [B, M, page_size, K, _] and their scales."""
    held = np.where(np.isnan(x), 0, x).astype(x.dtype)
    pages = jnp.asarray(held).reshape(len(x), -1, call.page_size, *x.shape[2:])
    return narrow.of_pages(pages, jnp.dtype(call.held))


def _paged(call: Call, key: np.ndarray, value: np.ndarray) -> tuple[Any, ...]:
    """The same cache in pages in random order, with pages of NaN that no sequence holds or sees.

    Pages and table; of 8 bits also the scales of both.
    """
    size = call.page_size
    assert size is not None
    rng = np.random.default_rng(7)
    B, M = len(call.lengths), call.S // size
    P = B * M + 3
    # Pages that are not there are read as the first or the last, which are NaN.
    table = 1 + rng.permutation(P - 2)[: B * M].reshape(B, M)
    pages, of_pages = [], []
    left, _ = call.options.get("local_window_size", (call.S, 0))
    ends, lengths = (np.arange(M) + 1) * size, np.array(call.lengths)[:, None]
    unseen = ends <= lengths - call.T - left  # before the window of each new token
    for x in (key, value):
        held, nothing = x.reshape(B, M, size, *x.shape[2:]), np.nan
        if call.held is not None:
            beyond, nothing = np.isnan(held), 99 if call.held == "int8" else np.nan
            narrowed, found = _in_8_bits(call, x)
            held = np.where(beyond, np.asarray(nothing, narrowed.dtype), narrowed)
            scales = np.full((P, call.K), np.nan, np.float32)
            scales[table] = np.where(unseen[..., None], np.nan, found)
            of_pages.append(scales)
        whole = np.full((P, *held.shape[2:]), nothing, held.dtype)
        whole[table] = held
        whole[table[unseen]] = nothing
        pages.append(whole)
    used = np.arange(M) * size < np.array(call.lengths)[:, None]
    table = np.where(used, table, rng.choice([-1, P, 2**31 - 1], table.shape))
    return *pages, table.astype(np.int32), *of_pages


def _attend(call: Call, backend: Any) -> tuple[jax.Array, jax.Array]:
    query, key, value = _arrays(call)
    lengths = jnp.array(call.lengths, jnp.int32)
    options = call.options | {"implementation": backend, "return_residual": True}

    @jax.jit
    def run(query: Any, lengths: Any, *cache: Any) -> Any:
        if call.page_size is None:
            return jaxflash.decode_attention(query, *cache, lengths, **options)
        scales = dict(zip(("key_scale", "value_scale"), cache[3:], strict=False))
        return jaxflash.paged_attention(query, *cache[:3], lengths, **scales, **options)

    cache = (key, value) if call.page_size is None else _paged(call, key, value)
    with running(backend):
        return jax.block_until_ready(run(query, lengths, *cache))


@pytest.mark.parametrize(("backend", "call"), _runs())
def test_out_and_lse(backend: str, call: Call) -> None:
    """Against dot_product_attention of each sequence's own tokens, in float32."""
    query, key, value = _arrays(call)
    out, lse = _attend(call, backend)
    assert out.dtype == query.dtype
    for b, length in enumerate(call.lengths):
        count = call.count(b)
        of_sequence = query[b : b + 1, :count], key[b : b + 1, :length], value[b : b + 1, :length]
        options = call.options | {"is_causal": True, "query_offset": length - count}
        options.pop("counts", None)
        wide = (x.astype(np.float32) for x in of_sequence)
        with oracle.on_a_cpu():
            truth = oracle.reference_in(None)(*wide, **options)
            attained = oracle.reference_in(query.dtype)(*of_sequence, **options)
        assert not np.any(out[b, count:])
        assert np.all(lse[b, count:] == -np.inf)
        found = (out[b : b + 1, :count], lse[b : b + 1, :count])
        for name, *arrays in zip(("out", "lse"), found, attained, truth, strict=True):
            oracle.check_array(name, *map(np.asarray, arrays), query.dtype)


@pytest.mark.skipif(not (ON_GPU or INTERPRETS), reason="kernels are not interpreted with this JAX")
@pytest.mark.parametrize("backend", [pytest.param("hopper", marks=marks("hopper"))])
def test_queries_beyond_float16_are_its_largest_number(backend: str) -> None:
    """Pages of 8 bits are multiplied in float16."""
    pages = jnp.asarray(np.random.default_rng(0).integers(-9, 9, (3, 32, 1, 64)), jnp.int8)
    scale, table = jnp.full((3, 1), 2.0**-20), jnp.array([[2, 0]], jnp.int32)

    def attend(size: float) -> jax.Array:
        query = jnp.ones((1, 1, 2, 64), jnp.bfloat16).at[..., 3].set(size)
        held = query, pages, pages, table, jnp.array([50], jnp.int32)
        with running(backend):
            return jaxflash.paged_attention(
                *held, key_scale=scale, value_scale=scale, implementation="hopper"
            )

    for sign in (-1, 1):
        beyond, within = attend(sign * 65536.0), attend(sign * 65280.0)
        assert np.all(np.isfinite(beyond))
        np.testing.assert_array_equal(beyond, attend(sign * 1e9))
        assert np.linalg.norm(beyond - within) < 0.1 * np.linalg.norm(within)


def test_examples_in_docstrings_run() -> None:
    result = doctest.testmod(inference)
    assert result.attempted > 5
    assert result.failed == 0


def test_pages_may_be_shared() -> None:
    """Two sequences with a common prefix give what they give with pages of their own."""
    rng = np.random.default_rng(0)
    pages = rng.standard_normal((2, 6, 16, 2, 8)).astype(np.float32)
    query = rng.standard_normal((2, 1, 4, 8)).astype(np.float32)
    query[1] = query[0]
    lengths = jnp.array([40, 40], jnp.int32)
    table = jnp.array([[3, 1, 5], [3, 1, 0]], jnp.int32)
    own = jnp.array([[3, 1, 5], [4, 2, 0]], jnp.int32)
    copied = pages.copy()
    copied[:, [4, 2]] = pages[:, [3, 1]]
    shared = jaxflash.paged_attention(query, *pages, table, lengths)
    apart = jaxflash.paged_attention(query, *copied, own, lengths)
    np.testing.assert_array_equal(shared, apart)
    assert np.abs(shared[0] - shared[1]).max() > 0.01


def test_inside_shard_map() -> None:
    """Sequences and heads are divided; pages, which all devices hold, by heads alone."""
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    by_head, by_data = P(None, None, "model"), P("data")
    specs = (P("data", None, "model"), by_head, by_head, by_data, by_data)
    run = jax.shard_map(
        jaxflash.paged_attention, mesh=mesh, in_specs=specs, out_specs=P("data", None, "model")
    )
    query, table = jnp.ones((2, 1, 4, 8)), jnp.array([[0, 1], [4, 2]], jnp.int32)
    pages = jax.random.normal(jax.random.key(0), (2, 5, 16, 2, 8))
    lengths = jnp.array([20, 32], jnp.int32)
    want = jaxflash.paged_attention(query, *pages, table, lengths)
    np.testing.assert_allclose(run(query, *pages, table, lengths), want, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS if ON_GPU or INTERPRETS else BACKENDS[1:])
@pytest.mark.parametrize("page_size", [None, 16])
def test_under_vmap(backend: Any, page_size: int | None) -> None:
    """Queries and lengths are mapped, the cache is not."""
    call = Call("vmap", (60,), S=64, page_size=page_size, N=2, K=1, H=16)
    query, *cache = _arrays(call)
    attention: Any = jaxflash.decode_attention
    if page_size is not None:
        *cache, table = _paged(call, *cache)
        cache, attention = [*cache, table], jaxflash.paged_attention
    queries = jnp.stack([query, 2 * query])
    lengths = jnp.array([[60], [17]], jnp.int32)

    def run(query: jax.Array, lengths: jax.Array) -> jax.Array:
        return attention(query, *map(jnp.asarray, cache), lengths, implementation=backend)

    with running(backend):
        found = jax.block_until_ready(jax.vmap(run)(queries, lengths))
        each = [jax.block_until_ready(run(q, n)) for q, n in zip(queries, lengths, strict=True)]
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(jnp.stack(each), np.float32), atol=0.02
    )


def test_any_batch_rank() -> None:
    query, key, value = (np.ones((2, 3, n, 2, 8), np.float32) for n in (1, 20, 20))
    lengths = jnp.arange(1, 7, dtype=jnp.int32).reshape(2, 3)
    assert jaxflash.decode_attention(query, key, value, lengths).shape == (2, 3, 1, 2, 8)


_Q, _C = np.ones((2, 1, 4, 8), np.float32), np.ones((2, 32, 2, 8), np.float32)
_PAGES, _TABLE = np.ones((5, 16, 2, 8), np.float32), np.array([[0, 1], [4, 2]], np.int32)
_LENGTHS = np.array([20, 32], np.int32)


def test_decode_refuses() -> None:
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, S\] = \[0, 32\]; got 33"):
        jaxflash.decode_attention(_Q, _C, _C, np.array([20, 33]))
    with pytest.raises(ValueError, match=r"lengths must have shape \[\*B\] = \(2,\)"):
        jaxflash.decode_attention(_Q, _C, _C, jnp.array([1], jnp.int32))
    with pytest.raises(TypeError, match="lengths must hold integers; got float"):
        jaxflash.decode_attention(_Q, _C, _C, [1.0, 2.0])
    with pytest.raises(ValueError, match="query heads N must be a multiple"):
        jaxflash.decode_attention(_Q[:, :, :3], _C, _C, _LENGTHS)
    with pytest.raises(ValueError, match=r"'hopper' refuses: (needs a Hopper GPU|multiplies)"):
        jaxflash.decode_attention(_Q, _C, _C, _LENGTHS, implementation="hopper")


def test_one_sequence_is_checked_like_several() -> None:
    query, held = jnp.ones((1, 4, 8)), jnp.ones((7, 2, 8))
    with pytest.raises(ValueError, match="got 100"):
        jaxflash.decode_attention(query, held, held, 100)
    with pytest.raises(ValueError, match="got 3"):
        jaxflash.decode_attention(query, held, held, 5, counts=3)


def test_paged_refuses() -> None:
    with pytest.raises(ValueError, match=r"page_size must be one of \(16, 32, 64, 128, 256\)"):
        jaxflash.paged_attention(_Q, _PAGES[:, :8], _PAGES[:, :8], _TABLE, _LENGTHS)
    with pytest.raises(ValueError, match=r"must hold pages in \[0, 5\).*; got 5 at \[1, 1\]"):
        jaxflash.paged_attention(_Q, _PAGES, _PAGES, np.array([[0, 1], [4, 5]]), _LENGTHS)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, M \* page_size\] = \[0, 32\]"):
        jaxflash.paged_attention(_Q, _PAGES, _PAGES, _TABLE, np.array([20, 40]))
    with pytest.raises(ValueError, match=r"page_table must have shape \[B, M\] = \(2, M\)"):
        jaxflash.paged_attention(_Q, _PAGES, _PAGES, _TABLE[:1], _LENGTHS)
    with pytest.raises(ValueError, match="as many pages of as many tokens"):
        jaxflash.paged_attention(_Q, _PAGES, _PAGES[:4], _TABLE, _LENGTHS)
    with pytest.raises(ValueError, match="key_pages must have four axes"):
        jaxflash.paged_attention(_Q, _PAGES[0], _PAGES, _TABLE, _LENGTHS)


@pytest.mark.parametrize("jitted", [False, True])
def test_debug_checks(jitted: bool) -> None:
    def decode(lengths: jax.Array) -> Any:
        return jaxflash.decode_attention(_Q, _C, _C, lengths, debug_checks=True)

    def paged(table: jax.Array) -> Any:
        lengths = jnp.asarray(_LENGTHS)
        return jaxflash.paged_attention(_Q, _PAGES, _PAGES, table, lengths, debug_checks=True)

    kind = jax.errors.JaxRuntimeError if jitted else ValueError
    decode, paged = (jax.jit(decode), jax.jit(paged)) if jitted else (decode, paged)
    jax.block_until_ready((decode(jnp.asarray(_LENGTHS)), paged(jnp.asarray(_TABLE))))
    with pytest.raises(kind, match=r"lengths must lie in \[0, S\] = \[0, 32\]; got -1"):
        jax.block_until_ready(decode(jnp.array([20, -1], jnp.int32)))
    with pytest.raises(kind, match=r"got 9 at \[0, 1\]"):
        jax.block_until_ready(paged(jnp.array([[0, 9], [4, 2]], jnp.int32)))


@pytest.mark.parametrize("count", [1, 2, 5, 7, 64])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_parts_of_a_walk_cover_it(count: int, parts: int) -> None:
    """Each visit is in one of the parts that exist, those that need a mask first within each."""
    masked = (count + 1) // 2
    walk = Walk(jnp.int32(count), jnp.int32(masked), lambda visit: 10 + visit)
    visited = []
    for number in range(parts):
        part = walks.part(walk, jnp.int32(number), parts)
        tiles = [int(part.tile(visit)) for visit in range(int(part.count))]
        needs_mask = [tile < 10 + masked for tile in tiles]
        if bool(walks.part_exists(walk, jnp.int32(number), parts)):
            visited += tiles
            assert needs_mask == sorted(needs_mask, reverse=True)
            assert sum(needs_mask) == int(part.masked)
        assert len(tiles) >= 1
    assert visited == list(range(10, 10 + count))


def test_splits_fill_the_gpu() -> None:
    def splits(B: int, S: int, K: int, **options: Any) -> int:
        found: list[int] = []

        def ask(query: jax.Array, cache: jax.Array, lengths: jax.Array) -> None:
            problem, _ = canonicalize(
                query, cache, cache, is_causal=True, query_offset=lengths,
                key_value_seq_lengths=lengths, **options,
            )  # fmt: skip
            config = hopper.decode_config(problem)
            found.append(choose_splits(problem, config))

        shapes = (B, 1, 4 * K, 128), (B, S, K, 128)
        query, cache = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)
        jax.eval_shape(ask, query, cache, jax.ShapeDtypeStruct((B,), jnp.int32))
        return found[0]

    assert splits(1, 32768, 8) == 16  # 128 blocks of 132
    assert splits(132, 1024, 1) == 1
    assert splits(1, 64, 1) == 1
    assert 2 <= splits(64, 65536, 8) <= 16  # lengths may differ
    assert splits(1, 131072, 1, local_window_size=(1000, 0)) <= 17  # of 16 visits, or 17
