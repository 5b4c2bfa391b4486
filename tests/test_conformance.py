"""Every backend against the reference, on every case, in out, lse and every gradient."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflash
from jaxflash.dispatch import BACKENDS
from pallas_kernels import mosaic, triton
from tests import oracle
from tests.cases import CASES, POISONED, Case

# Compute in 16 bits, on a GPU; elsewhere they are interpreted on these cases, Mosaic's with the
# race detector on.
KERNELS = ("hopper", "triton")
INTERPRETED = (
    "gqa_6_3",
    "value_dim",
    "causal_offsets",
    "window_causal",
    "lengths_causal",
    "segments_causal",
    "mask_bnts",
    "mask_mod_captured",
    "mask_all_true_tail",
    "bias_11150270",
    "bias_minus_infinity",
    "soft_cap",
    "alibi",
    "sinks_empty_rows",
    "score_mod_relative_bias",
    "dropout_causal",
    "everything",
    "nan_beyond_lengths",
    "nan_in_unseen_document",
    "nan_in_document_between",
    "nan_without_queries",
    "float16_window",
)
ALSO_BY_TRITON = (
    "head_dim_72",
    "head_dim_1",
    "one_token",
    "one_query",
    "prime_lengths",
    "unbatched",
    "causal_before_keys",
    "window_offsets",
    "query_lengths",
    "mask_b11s",
    "mask_ts",
    "mask_empty_rows",
    "bias_1111",
    "bias_141270",
    "bias_211501",
    "bias_24150270",
    "bias_ts",
    "soft_cap_bias",
    "alibi_offsets",
    "score_mod_masks",
    "score_mod_ignores_scores",
    "score_mod_steep_at_zero",
    "mask_mod_all_true_tail",
    "dropout_broadcast",
    "nan_outside_window",
    "nan_masked",
    "float16_lengths_dropout",
)
ON_GPU = jax.default_backend() == "gpu"
# JAX 0.10.2's interpreter does not come to an end on persistent kernels; why is not known yet.
INTERPRETS = jax.__version_info__ >= (0, 11)


def is_interpreted(backend: str, case: str) -> bool:
    """Whether a kernel backend runs a case where there is no GPU."""
    if backend == "triton":
        return case in INTERPRETED + ALSO_BY_TRITON
    return INTERPRETS and case in INTERPRETED


def marks(backend: str) -> tuple[pytest.MarkDecorator, ...]:
    """Of a test of a backend."""
    return (pytest.mark.kernel,) if backend == "hopper" else ()


def running(backend: str) -> contextlib.AbstractContextManager[None]:
    """Lets a backend run here, interpreted where it must be."""
    if ON_GPU or backend not in KERNELS:
        return contextlib.nullcontext()
    return triton.interpreting() if backend == "triton" else mosaic.interpreting()


def _runs() -> list[Any]:
    runs = []
    for backend in BACKENDS:
        if backend.name == "reference":
            continue
        is_kernel = backend.name in KERNELS
        for case in CASES:
            if not is_kernel or ON_GPU or is_interpreted(backend.name, case.name):
                asked = case.in_16_bits() if is_kernel else case
                name = f"{case.name}-{backend.name}"
                runs.append(pytest.param(backend.name, asked, id=name, marks=marks(backend.name)))
    return runs


@pytest.mark.parametrize(("backend", "case"), _runs())
def test_out_lse_and_gradients(backend: str, case: Case) -> None:
    arrays = case.arrays()
    attention = functools.partial(
        jaxflash.dot_product_attention, implementation=backend, return_residual=True
    )
    if backend in KERNELS and case.is_empty:
        with pytest.raises(ValueError, match="has no empty form"):
            oracle.evaluate(case, arrays, attention)
        return
    truth = oracle.expected(case, arrays)
    with jax.enable_x64(case.dtype == "float64"):
        attained = oracle.attainable(case, arrays)
        with running(backend):
            actual = oracle.evaluate(case, arrays, attention)
    assert actual.out.dtype == jnp.dtype(case.dtype)
    assert actual.lse.dtype == jnp.promote_types(case.dtype, jnp.float32)
    oracle.check(actual, attained, truth, case.dtype)


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
def test_reference_confines_nan(case: Case) -> None:
    """What nobody sees changes nothing: the same results with finite numbers in its place."""
    arrays = case.arrays()
    clean = {k: np.nan_to_num(x, nan=3.0) if x.dtype.kind == "f" else x for k, x in arrays.items()}
    spoiled, whole = oracle.expected(case, arrays), oracle.expected(case, clean)
    jax.tree.map(np.testing.assert_array_equal, spoiled, whole)


def test_oracle_refuses_what_is_wrong() -> None:
    case = CASES[0]
    arrays = case.arrays()
    truth = oracle.expected(case, arrays)
    attained = oracle.attainable(case, arrays)
    oracle.check(attained, attained, truth, case.dtype)
    for spoiled in (
        attained._replace(out=attained.out * (1 + 1e-5)),
        attained._replace(lse=attained.lse + 1e-4),
        attained._replace(gradients=attained.gradients | {"key": attained.gradients["query"]}),
    ):
        with pytest.raises(AssertionError):
            oracle.check(spoiled, attained, truth, case.dtype)


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
