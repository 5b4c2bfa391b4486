"""For backends that know no pages: each sequence's keys and values in one run of memory."""

from collections.abc import Callable

import jax

from jaxflash.cache import pages
from pallas_kernels import spec

Forward = Callable[[spec.Problem, spec.Operands], tuple[jax.Array, jax.Array]]


def gathering(forward: Forward) -> Forward:
    """``forward`` of operands whose keys and values may be in pages."""

    def gathered(problem: spec.Problem, x: spec.Operands) -> tuple[jax.Array, jax.Array]:
        if x.page_table is None:
            return forward(problem, x)
        assert x.key_value_lengths is not None
        key, value = (
            pages.contiguous(held, x.page_table, x.key_value_lengths) for held in (x.key, x.value)
        )
        x = x._replace(key=key, value=value, page_table=None)
        return forward(problem.of(x), x)

    return gathered
