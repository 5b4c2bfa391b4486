"""Ring attention: keys and values go around, queries stay.

Each device has a part of the sequence. In each of as many steps as there are devices it attends to
the keys that it holds, while they travel on to the next device; partial results are merged in
float32. In the backward keys and values go around once more, and their gradients with them.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32, Shaped

from jaxflash import checks, dispatch
from jaxflash.api import Implementation
from jaxflash.arguments import canonicalize
from jaxflash.varying import varying_like
from jaxflash.vjp import CHECKPOINT_NAMES
from pallas_kernels import spec
from pallas_kernels.spec import softmax

Layout = Literal["contiguous", "striped"]

# What XLA needs to be told for transfers to run beside a step's kernels (bench/LOG.md, rings).
RING_COMPILER_OPTIONS: dict[str, Any] = {
    # It does not know how long a kernel takes, and starts some transfers after it. One transfer of
    # all that travels comes before.
    "xla_gpu_collective_permute_combine_threshold_bytes": 2**40,
    # NCCL's kernels want multiprocessors, for which they wait until attention is done with them.
    # GPUs that see each other's memory can copy without.
    "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
    # The last transfers, of gradients, are apart.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
}


def ring_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    axis_name: str,
    *,
    layout: Layout = "contiguous",
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    query_segment_ids: Int32[Array, "*B T"] | None = None,
    key_value_segment_ids: Int32[Array, "*B S"] | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
) -> Any:
    """``dot_product_attention`` of a sequence that is divided over a mesh axis.

    For use inside ``jax.shard_map``; arrays are this device's parts. Under a causal mask the parts
    of a contiguous sequence are unequal work: the last device sees everything, the first its own
    part alone. Striped, token t of the whole is on device ``t % n``, and all have the same to do.

    On GPUs of one host compile with `RING_COMPILER_OPTIONS`, as
    ``jax.jit(..., compiler_options=jaxflash.RING_COMPILER_OPTIONS)``: what travels in a step goes
    together, and before the step's kernels. They hold for every permutation of the program. Where
    devices do not see each other's memory, leave ``xla_gpu_collective_permute_mode`` out.

    Args:
      query: ``[*B, T, N, H]``.
      key: ``[*B, S, K, H]``; S = T where positions matter.
      value: ``[*B, S, K, Hv]``.
      axis_name: of the mesh axis, of n devices, over which the sequence is divided.
      layout: "contiguous", or "striped" as `stripe` makes it, which knows no windows and no ALiBi.
      scale: as in ``dot_product_attention``, like all that follow.
      is_causal: likewise, by positions in the whole sequence.
      local_window_size: likewise.
      query_segment_ids: likewise.
      key_value_segment_ids: likewise.
      logits_soft_cap: likewise.
      alibi_slopes: likewise.
      sinks: likewise.
      implementation: of each step.
      return_residual: also return the lse.

    Returns:
      As ``dot_product_attention``; differentiable in reverse mode.

    Raises:
      ValueError, TypeError: an argument is wrong, or the implementation asked for refuses.

    Example:
      >>> import jax, numpy as np, jaxflash
      >>> from jax.sharding import Mesh, PartitionSpec as P
      >>> mesh = Mesh(np.array(jax.devices()[:1]), ("sequence",))
      >>> ring = functools.partial(
      ...     jaxflash.ring_attention, axis_name="sequence", is_causal=True
      ... )
      >>> ring = jax.shard_map(ring, mesh=mesh, in_specs=P(None, "sequence"),
      ...     out_specs=P(None, "sequence"))
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 4, 16))
      >>> jax.jit(ring)(q, k, v).shape
      (1, 64, 4, 16)

    Source: Liu et al., "Ring Attention with Blockwise Transformers" (2023); Brandon et al.,
    "Striped Attention" (2023).
    """
    checks.flag("return_residual", return_residual)
    if layout not in ("contiguous", "striped"):
        raise ValueError(f"layout must be 'contiguous' or 'striped'; got {layout!r}")
    if layout == "striped" and (local_window_size is not None or alibi_slopes is not None):
        raise ValueError(
            "striped sequences have no local_window_size and no alibi_slopes: distances differ "
            "from step to step; use layout='contiguous'"
        )
    queries = checks.as_array("query", query)
    batch, T = queries.shape[:-3], queries.shape[-3]
    uses_positions = is_causal or local_window_size is not None or alibi_slopes is not None
    if uses_positions and key.shape[-3] != T:
        raise ValueError(
            f"where positions matter each device holds as many keys as queries; got {T} queries "
            f"and {key.shape[-3]} keys"
        )
    problem, operands = canonicalize(
        queries,
        key,
        value,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        query_offset=jnp.zeros(batch, jnp.int32) if uses_positions else 0,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    inner = problem.of(operands._replace(sinks=None))
    ring = _Ring(
        dispatch.select(inner, implementation),
        inner,
        axis_name,
        lax.axis_size(axis_name),
        layout == "striped",
    )
    moving = lax.axis_index(axis_name)  # varies over the axis, as everything here does
    out, lse = _ring_attention(ring, varying_like((operands, moving), operands))
    out, lse = (x.reshape(*batch, *x.shape[1:]) for x in (out, lse))
    return (out, lse) if return_residual else out


def stripe(x: Shaped[Array, "..."], devices: int, axis: int = 1) -> Shaped[Array, "..."]:
    """A whole sequence in the order in which contiguous parts are striped ones.

    Args:
      x: an array with an axis of tokens, as many on each device.
      devices: n.
      axis: that of the tokens.

    Returns:
      The same tokens: first those ``t % n == 0``, then those ``t % n == 1``, and so on.

    Raises:
      ValueError: n does not divide the tokens.

    Example:
      >>> stripe(jnp.arange(6), 2, axis=0)
      Array([0, 2, 4, 1, 3, 5], dtype=int32)
    """
    return _turned(x, axis, lambda n: (n // devices, devices), devices)


def unstripe(x: Shaped[Array, "..."], devices: int, axis: int = 1) -> Shaped[Array, "..."]:
    """Undoes `stripe`.

    Args:
      x: as for `stripe`.
      devices: likewise.
      axis: likewise.

    Returns:
      The tokens in their order.

    Raises:
      ValueError: as `stripe`.

    Example:
      >>> unstripe(jnp.array([0, 2, 4, 1, 3, 5]), 2, axis=0)
      Array([0, 1, 2, 3, 4, 5], dtype=int32)
    """
    return _turned(x, axis, lambda n: (devices, n // devices), devices)


def _turned(x: Any, axis: int, split: Any, devices: int) -> jax.Array:
    x = checks.as_array("x", x)
    axis %= x.ndim
    if x.shape[axis] % checks.size("devices", devices):
        raise ValueError(f"{devices} devices do not divide {x.shape[axis]} tokens evenly")
    parts = x.reshape(*x.shape[:axis], *split(x.shape[axis]), *x.shape[axis + 1 :])
    return parts.swapaxes(axis, axis + 1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is known before the arrays are."""

    backend: dispatch.Backend
    problem: spec.Problem  # of a step; without sinks, which take part once
    axis: str
    size: int
    is_striped: bool

    def offset(self, step: Any) -> Any:
        """The position of the first row of the queries, from the first key of a step."""
        me = lax.axis_index(self.axis)
        size = jnp.int32(self.size)
        other = lax.rem(me - step + size, size)
        if self.is_striped:
            return jnp.where(other <= me, 0, -1)
        return (me - other) * self.problem.T

    def operands(self, operands: spec.Operands, travelling: "_Travelling", step: Any) -> Any:
        """Of a step."""
        offset = operands.query_offset
        if offset is not None:
            offset = varying_like(operands.query, offset + self.offset(step).astype(jnp.int32))
        key, value, ids = travelling
        return operands._replace(
            key=key, value=value, key_value_segment_ids=ids, query_offset=offset, sinks=None
        )

    def is_seen(self, step: Any) -> Any:
        """Whether some row may see some key of a step."""
        p = self.problem
        if p.band.is_unbounded or self.is_striped:
            return True
        start, stop = p.band.shift(self.offset(step)).any_keys(0, p.T, p.S)
        return start < stop

    def walk(self, operands: spec.Operands, first: Any, add: Any) -> Any:
        """The result of all steps.

        Args:
          operands: of this device.
          first: ``first(travelling, step)`` is the result of the first step.
          add: ``add(result, travelling, step)`` is that of one step more.
        """

        def one(carry: Any, step: Any) -> Any:
            result, travelling = carry
            # On its way while this step computes.
            following = self.onward(travelling)
            return (add(result, travelling, step), following), None

        here, last = _Travelling.of(operands), self.size - 1
        following, result = self.onward(here), first(here, jnp.int32(0))
        if last == 0:
            return result
        if last > 1:
            steps = jnp.arange(1, last, dtype=jnp.int32)
            (result, following), _ = lax.scan(one, (result, following), steps)
        return add(result, following, jnp.int32(last))

    def onward(self, tree: Any) -> Any:
        """To the next device."""
        to = [(i, (i + 1) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, to), tree)


class _Travelling(NamedTuple):
    """What goes around."""

    key: Any
    value: Any
    key_value_segment_ids: Any

    @classmethod
    def of(cls, x: spec.Operands) -> "_Travelling":
        return cls(x.key, x.value, x.key_value_segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, operands: spec.Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in the query's dtype and lse [B, T, N] in float32."""
    p = ring.problem

    def attend(travelling: _Travelling, step: Any) -> tuple[jax.Array, jax.Array]:
        out, lse = ring.backend.forward(p, ring.operands(operands, travelling, step))
        return out.astype(lse.dtype), lse

    def add(so_far: Any, travelling: _Travelling, step: Any) -> Any:
        def more(so_far: Any) -> Any:
            return softmax.merge(so_far[0], so_far[1], *attend(travelling, step))

        return _where_seen(ring.is_seen(step), more, so_far)

    out, lse = ring.walk(operands, attend, add)
    if operands.sinks is None:
        return out.astype(p.dtype), lse
    sinks = operands.sinks.astype(lse.dtype)
    with_sinks = jnp.where(lse == -jnp.inf, lse, jnp.logaddexp(lse, sinks))
    weight = softmax.probabilities(lse[..., None], with_sinks)
    return jnp.where(weight > 0, weight * out, 0).astype(p.dtype), with_sinks


def _where_seen(seen: Any, function: Any, x: Any) -> Any:
    """``function(x)`` where something is seen, else ``x``."""
    return function(x) if seen is True else lax.cond(seen, function, lambda x: x, x)


def _forward(ring: _Ring, operands: spec.Operands) -> Any:
    results = _ring_attention(ring, operands)
    out, lse = (checkpoint_name(x, n) for x, n in zip(results, CHECKPOINT_NAMES, strict=True))
    return (out, lse), (operands, out, lse)


class _Sums(NamedTuple):
    """Gradients so far, in float32."""

    query: Any
    alibi_slopes: Any
    key: Any  # of the keys that are here; they travel with them
    value: Any


def _backward(ring: _Ring, residuals: Any, cotangents: Any) -> tuple[spec.Operands]:
    operands, out, lse = residuals
    dout, dlse = cotangents
    p = dataclasses.replace(ring.problem, constant=frozenset())
    given = out, lse, dout, dlse
    backward = _backward_of(ring.backend)

    def attend(travelling: _Travelling, step: Any) -> _Sums:
        found = backward(p, ring.operands(operands, travelling, step), *given)
        sums = _Sums(found.query, found.alibi_slopes, found.key, found.value)
        return jax.tree.map(lambda x: x.astype(p.compute_dtype), sums)

    def add(sums: _Sums, travelling: _Travelling, step: Any) -> _Sums:
        # On their way while this step computes, which does not wait for them.
        key, value = ring.onward((sums.key, sums.value))
        sums = sums._replace(key=key, value=value)
        nothing = jax.tree.map(jnp.zeros_like, sums)
        found = _where_seen(ring.is_seen(step), lambda _: attend(travelling, step), nothing)
        return jax.tree.map(jnp.add, sums, found)

    sums = ring.walk(operands, attend, add)
    # Rounded before the last transfer, which nothing hides.
    key, value = ring.onward((sums.key.astype(p.dtype), sums.value.astype(p.dtype)))
    delta = softmax.delta(out, lse, dout, dlse)
    result = spec.Operands(
        query=sums.query,
        key=key,
        value=value,
        alibi_slopes=sums.alibi_slopes,
        sinks=softmax.of_sinks(operands.sinks, lse, delta),
    )
    return (spec.gradients(operands, result),)


def _backward_of(backend: dispatch.Backend) -> Any:
    """One from the lse of all steps; the reference has none of its own."""
    named = (b.backward for b in dispatch.BACKENDS if b.name == "xla")
    return backend.backward or next(named)


_ring_attention.defvjp(_forward, _backward)
