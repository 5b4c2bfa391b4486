"""A few new tokens against a long cache: split-KV decoding (flash-decoding, Dao et al. 2023).

The forward of packed rows, heads of a group at each token, whose visits are divided among programs.
"""

import functools

import jax
import jax.experimental.pallas as pl

from pallas_kernels import spec
from pallas_kernels.common import accepts, packing
from pallas_kernels.triton.config import Config, decode_config, multiprocessors
from pallas_kernels.triton.forward import launch, supports

_MAX_PARTS = 32
_PROGRAMS_EACH = 2  # on a multiprocessor at a time


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def decode(
    problem: spec.Problem,
    operands: spec.Operands,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in float32."""
    c = config or decode_config(problem)
    splits = splits or choose_splits(problem, c)
    packed, x = packing.pack(problem, operands, c.block_q)
    parts = launch(packed, c, x, None, splits)
    out, lse = packing.merge(*parts, packing.by_row(problem, operands.sinks))
    out = packing.unpack(problem, out, problem.Hv).astype(problem.dtype)
    return out, packing.unpack(problem, lse, 1)[..., 0]


def choose_splits(problem: spec.Problem, c: Config) -> int:
    """Parts enough for all multiprocessors, as long as each has visits."""
    p = problem
    tiles = p.B * p.K * pl.cdiv(p.T * p.G, c.block_q)
    wanted = pl.cdiv(_PROGRAMS_EACH * multiprocessors(p.device), tiles)
    return max(1, min(wanted, pl.cdiv(p.S, c.block_kv), _MAX_PARTS))


def supports_decode(problem: spec.Problem) -> str | None:
    """Why this kernel cannot run a problem, or None."""
    return accepts.refused_tokens(problem) or supports(problem)
