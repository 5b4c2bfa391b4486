"""What no kernel that multiplies 16-bit matrices accepts, whatever GPU it is for."""

import jax.numpy as jnp

from pallas_kernels import spec
from pallas_kernels.common import evaluate

_MAX_HEAD_DIM = 256
_MAX_TOKENS = 16  # that are decoded at once


def refused(problem: spec.Problem) -> str | None:
    """Why a forward is not for kernels, or None."""
    p = problem
    if p.is_in_8_bits:
        return "multiplies no 8-bit floating point"
    return refused_in_any_precision(p)


def refused_in_any_precision(problem: spec.Problem) -> str | None:
    """The same, leaving aside that elements may have 8 bits."""
    p = problem
    if p.dtype not in (jnp.bfloat16, jnp.float16):
        return f"multiplies bfloat16 and float16; got {p.dtype}"
    if max(p.H, p.Hv) > _MAX_HEAD_DIM:
        return f"takes head dims up to {_MAX_HEAD_DIM}; got {p.H=}, {p.Hv=}"
    if 0 in (p.B, p.T, p.S, p.N):
        return f"has no empty form; got {p.B=}, {p.T=}, {p.S=}, {p.N=}"
    return evaluate.refused_functions(p)


def refused_gradients(problem: spec.Problem) -> str | None:
    """Why gradients of what modifies logits are not for kernels, or None."""
    p = problem
    if p.differentiates("alibi_slopes") and (p.score_mod or p.soft_cap):
        return "differentiates no slopes where logits are modified after them"
    if p.score_mod is None:
        return None
    if p.differentiates("score_consts"):
        return "differentiates no arrays that score_mod captures"
    reason = evaluate.refusal(p.score_mod.with_slope)
    return reason and f"cannot differentiate this score_mod: {reason}"


def refused_tokens(problem: spec.Problem) -> str | None:
    """Why new tokens are not for the kernels that decode, or None."""
    if problem.T > _MAX_TOKENS:
        return f"decodes up to {_MAX_TOKENS} new tokens at once; got {problem.T}"
    if problem.operands.query_lengths is not None:
        return "decodes as many new tokens of each sequence"
    return None
