"""For backends that know no pages: each sequence's keys and values in one run of memory."""

from collections.abc import Callable

import jax

from jaxflash.cache import pages
from pallas_kernels import spec

Forward = Callable[[spec.Problem, spec.Operands], tuple[jax.Array, jax.Array]]


def gathering(forward: Forward) -> Forward:
    """``forward`` of operands whose keys and values may be in pages, of 8 bits perhaps."""

    def gathered(problem: spec.Problem, x: spec.Operands) -> tuple[jax.Array, jax.Array]:
        if x.page_table is None:
            return forward(problem, x)
        assert x.key_value_lengths is not None
        key, value = (
            pages.contiguous(held, x.page_table, x.key_value_lengths, scales).astype(problem.dtype)
            for held, scales in ((x.key, x.key_scale), (x.value, x.value_scale))
        )
        x = x._replace(key=key, value=value, page_table=None, key_scale=None, value_scale=None)
        return forward(problem.of(x), x)

    return gathered
