"""The forward: online softmax over the tiles of each row."""

import functools

import jax

from jaxflash.varying import varying_like
from jaxflash.xla import tiles
from pallas_kernels import spec
from pallas_kernels.spec import softmax


@functools.partial(jax.jit, static_argnums=0)
def forward(problem: spec.Problem, operands: spec.Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in the compute dtype."""
    tiling = tiles.Tiling.of(problem, operands)
    start = softmax.start((*tiling.qkv[0].shape[:-1], problem.Hv), problem.compute_dtype)

    def visit(state: softmax.State, block: spec.Tiles, masked: bool) -> softmax.State:
        part = tiling.part(block, masked)

        def attend(rows: softmax.State) -> softmax.State:
            s = tiles.logits(problem, part, lambda s: spec.score.modify(problem, part.tile, s))
            rows, p = softmax.update(rows, s.reshape(*rows.m.shape, s.shape[-1]))
            p = tiles.dropped(problem, operands.dropout_seed, part, p).astype(part.v.dtype)
            product = tiles.dot(problem, "bkgqs,bksh->bkgqh", p, part.v)
            return rows._replace(acc=rows.acc + product)

        rows = jax.tree.map(lambda x: tiling.take(x, tiles.QUERY, block), state)
        rows = tiles.if_seen(problem, part, attend, rows)
        return jax.tree.map(lambda x, y: tiling.put(x, y, tiles.QUERY, block), state, rows)

    state = tiling.walk(visit, varying_like(operands, start))
    state = jax.tree.map(lambda x: x[:, :, :, : problem.T], state)
    sinks = operands.sinks
    if sinks is not None:
        sinks = sinks.astype(problem.compute_dtype).reshape(1, problem.K, problem.G, 1)
    out, lse = softmax.finish(softmax.keep_nan(state), sinks)
    return tiles.rows_first(problem, out).astype(problem.dtype), tiles.rows_first(problem, lse)
