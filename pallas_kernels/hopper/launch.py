"""Calling the forward kernel: what it is given, what it is launched with, what it refuses."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels import mosaic, spec
from pallas_kernels.common import accepts
from pallas_kernels.common.block_map import BlockMap, block_map, needs_map
from pallas_kernels.common.schedule import Schedule, largest_divisor
from pallas_kernels.hopper import gpu
from pallas_kernels.hopper import tile as tiles
from pallas_kernels.hopper.config import REGISTERS, Config
from pallas_kernels.hopper.forward import consume
from pallas_kernels.hopper.kernel import Forms, Forward, Scales, divide
from pallas_kernels.hopper.producer import produce


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def forward(
    problem: spec.Problem,
    operands: spec.Operands,
    config: Config | None = None,
    blocks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in float32.

    Args:
      problem: What `supports` accepts.
      operands: Its arrays.
      config: Default: one that fits, see `Config.default`.
      blocks: Size of the grid. Default: one for each multiprocessor.
    """
    c = config or Config.default(problem)
    p, q_blocks = problem, pl.cdiv(problem.T, c.block_q)
    found = block_map(problem, operands, c.block_q, c.block_kv) if needs_map(problem) else None
    schedule = Schedule(p.B, p.N, q_blocks, _heads_at_once(p))
    out, lse = launch(
        Forward,
        problem,
        c,
        schedule,
        blocks,
        operands,
        found,
        (p.B, p.T, p.N, mosaic.copied_columns(p.Hv)),
        (p.B, p.N, q_blocks * c.block_q),
    )
    return out[..., : p.Hv], lse[:, :, : p.T].swapaxes(1, 2)


def launch(
    kind: type[Forward],
    problem: spec.Problem,
    c: Config,
    schedule: Schedule,
    blocks: int | None,
    operands: spec.Operands,
    found: BlockMap | None,
    out_shape: tuple[int, ...],
    lse_shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Launches a kernel; the arrays it returns are those that ``kind.out`` and ``lse`` know."""
    p, forms = tiles.in_kernel(problem), Forms.of(problem, c)
    kv_blocks = pl.cdiv(p.S, c.block_kv)
    rows, keys = schedule.q_blocks * c.block_q, kv_blocks * c.block_kv
    x = tiles.prepare(problem, operands, rows, keys, turned=c.turned)
    scales, x = Scales.of(x), forms.arrays(x)
    if scales is not None:
        x = x._replace(query_scale=None, key_scale=None, value_scale=None)
    blocks = min(blocks or gpu.multiprocessors(problem.device), schedule.tiles)
    leaves, tree = jax.tree.flatten((x, found, scales))
    scratch = forms.scratch(c, p)

    def forward_kernel(*refs: mosaic.Ref) -> None:
        given = jax.tree.unflatten(tree, refs[: len(leaves)])
        out, lse, *rest = refs[len(leaves) :]
        named = forms.refs(given, out, lse, dict(zip(scratch, rest, strict=True)))
        k = kind(p, c, schedule, blocks, forms, named)
        registers = REGISTERS[c.consumers][k.hides_keys]
        divide(c.consumers, registers, lambda: consume(k), lambda: produce(k))

    call = mosaic.kernel(
        forward_kernel,
        out_type=[
            jax.ShapeDtypeStruct(out_shape, p.dtype),
            jax.ShapeDtypeStruct(lse_shape, jnp.float32),
        ],
        scratch_types=list(scratch.values()),
        grid={"block": blocks},
        threads=("warpgroup", c.consumers + 1),
        # Nothing needs the barriers of the warpgroup that Mosaic would put around copies and
        # stores: what threads write to shared memory for others to read, `commit_smem` ends with
        # one; a buffer is written again only after a wait for all threads that read it, at a
        # barrier at which each arrives by itself. Of two buffers of P, the one that is written was
        # read by the product before the last one, which each thread has waited for before it met
        # the others where rows are reduced.
        params=mosaic.compiler_params(
            reduction_scratch_bytes=c.scratch_bytes, unsafe_no_auto_barriers=True
        ),
    )
    out, lse = call(*leaves)
    return out, lse


def _heads_at_once(p: spec.Problem) -> int:
    """Of how many heads the tiles are worked on together."""
    if p.band.is_unbounded:
        return 1
    of_kv_head = p.S * (p.H + p.Hv) * p.operands.key.dtype.itemsize
    return largest_divisor(p.B * p.N, max(1, gpu.L2_BYTES // of_kv_head) * p.G)


def supports(problem: spec.Problem) -> str | None:
    """Why these kernels cannot run a problem, or None."""
    p = problem
    if not (gpu.is_hopper(p.device) or mosaic.is_interpreting()):
        return f"needs a Hopper GPU (H100, H200); this device is {p.device.kind}"
    if not p.is_in_8_bits:
        return accepts.refused(p)
    if p.H % 16 or p.Hv % 16:
        return f"multiplies 8-bit floating point of head dims that 16 divides; got {p.H=}, {p.Hv=}"
    if p.operands.page_table is not None:
        return "multiplies no 8-bit floating point of pages"
    return accepts.refused_in_any_precision(p)
