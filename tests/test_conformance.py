"""Every backend against the reference, on every case, in out, lse and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxflash
from jaxflash.dispatch import BACKENDS
from tests import oracle
from tests.cases import CASES, POISONED, Case

NAMES = [backend.name for backend in BACKENDS if backend.name != "reference"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", NAMES)
def test_out_lse_and_gradients(backend: str, case: Case) -> None:
    arrays = case.arrays()
    truth = oracle.expected(case, arrays)
    with jax.enable_x64(case.dtype == "float64"):
        attained = oracle.attainable(case, arrays)
        attention = functools.partial(
            jaxflash.dot_product_attention, implementation=backend, return_residual=True
        )
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
