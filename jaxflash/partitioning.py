"""Kernels under ``jit`` over a mesh: each device runs one on its batch elements and its heads.

The partitioner calls the rule here when it has decided how arrays are sharded. Query rows, keys and
columns are gathered where they are sharded: see `jaxflash.ring_attention` for those. So are heads
that do not divide evenly, and everything where a function or dropout asks for the number of a batch
element or of a head. Inside `jax.shard_map` a kernel runs on what a device was given; over axes
that were left out there, everything is gathered.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxflash.folding import Function
from jaxflash.varying import varying_like
from pallas_kernels import spec

# Axes of results, as `spec.AXES` has those of operands.
_OUTPUT, _LSE = "b.n.", "b.n"


class _Split(NamedTuple):
    """Mesh axes by which batch and heads are divided."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]

    @classmethod
    def of(cls, problem: spec.Problem, mesh: Any, query: PartitionSpec) -> "_Split":
        """As the query is, where that can be kept."""
        if problem.asks_for_numbers:
            return cls((), ())
        batch, _, heads, _ = (_names(axis) for axis in query)

        def even(names: tuple[str, ...], size: int) -> tuple[str, ...]:
            return names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()

        # A single key head is for all devices.
        return cls(even(batch, problem.B), even(heads, problem.K if problem.K > 1 else problem.N))

    def spec(self, roles: str) -> PartitionSpec:
        of_role = {"b": self.batch, "n": self.heads, "k": self.heads}
        return PartitionSpec(*(of_role.get(role) or None for role in roles))

    def summed(self, roles: str) -> tuple[str, ...]:
        """Axes whose devices each have a part of a sum."""
        batch = () if "b" in roles else self.batch
        return batch if set(roles) & {"n", "k"} else (*batch, *self.heads)


def described(problem: spec.Problem, query: Any) -> str | None:
    """What ``jit`` makes of how a query [..., T, N, H] is sharded; None where it is not."""
    sharding = getattr(query, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    axes = (*sharding.spec, *(None,) * (len(query.shape) - len(sharding.spec)))
    *leading, rows, heads, columns = map(_names, axes)
    batch = tuple(name for axis in leading for name in axis)
    split = _Split.of(problem, sharding.mesh, PartitionSpec(batch, None, heads, None))

    divided = {"batch": split.batch, "heads": split.heads}
    given = {"batch": batch, "heads": heads, "tokens": rows, "head dim": columns}
    gathered = {part: names for part, names in given.items() if not divided.get(part)}
    lines = []
    for what, parts in (("divided", divided), ("gathered", gathered)):
        over = [f"{part} over {' and '.join(names)}" for part, names in parts.items() if names]
        lines += [f"{what}: {', '.join(over)}"] if over else []
    return "; ".join(lines) or None


Attention = Callable[[spec.Problem, spec.Operands], tuple[jax.Array, jax.Array]]


def divided_as_typed(
    attention: Attention, problem: spec.Problem, operands: spec.Operands
) -> tuple[jax.Array, jax.Array] | None:
    """``attention`` on each device's part, where types say how the query is sharded; else None.

    They do over the explicit axes of a mesh (`jax.set_mesh`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(mesh.explicit_axes):
        return None
    split = _Split.of(problem, mesh, jax.typeof(operands.query).sharding.spec)
    parts = jax.tree.map(split.spec, _roles_of_arguments(operands)[0])

    def local(operands: spec.Operands) -> tuple[jax.Array, jax.Array]:
        return attention(problem.of(operands), operands)

    run = jax.shard_map(
        local,
        in_specs=(parts,),
        out_specs=(split.spec(_OUTPUT), split.spec(_LSE)),
        axis_names=set(mesh.explicit_axes),
    )
    return run(jax.tree.map(jax.sharding.reshard, operands, parts))


def partitioned(function: Function, has_effects: Callable[[], bool] = lambda: False) -> Function:
    """``function`` with a rule for sharded operands, unless it has effects (interpreted)."""
    rule = _rule(function)

    def run(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
        if not (is_local() or has_effects()):
            return rule(problem, operands, *rest)
        # Results of a kernel are typed as the same on all devices. Were they made to vary by the
        # caller, their cotangents would be summed over devices.
        return varying_like(operands, function(problem, operands, *rest))

    return run


def is_local() -> bool:
    """Whether what is traced is for one device, as far as it is known."""
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


@functools.cache
def _rule(function: Function) -> Any:
    def run(problem: spec.Problem, operands: spec.Operands, *rest: jax.Array) -> Any:
        return function(problem, operands, *rest)

    def partition(problem: spec.Problem, mesh: Mesh, given: Any, results: Any) -> Any:
        split = _Split.of(problem, mesh, given[0].query.sharding.spec)
        of_results = _roles_of_results(results)

        def local(operands: spec.Operands, *rest: jax.Array) -> Any:
            # By the rule again, which is one operation where all axes are divided: within it JAX
            # replaces the mutable arrays that kernels add to, which the partitioner cannot lower.
            found = call(problem.of(operands), operands, *rest)
            if not isinstance(found, spec.Operands):
                return found
            return jax.tree.map(
                lambda x, roles: lax.psum(x, axes) if (axes := split.summed(roles)) else x,
                found,
                of_results,
            )

        shardings = [
            jax.tree.map(lambda roles: NamedSharding(mesh, split.spec(roles)), roles)
            for roles in (of_results, _roles_of_arguments(*given))
        ]
        return mesh, local, *shardings

    call = custom_partitioning(run, static_argnums=(0,))
    call.def_partition(partition=partition, sharding_rule=_propagation)
    return call


def _propagation(
    problem: spec.Problem, _: Mesh, arguments: Sequence[Any], results: Sequence[Any]
) -> str:
    """Which axes are sharded alike, as an einsum of factors."""
    given = jax.tree.leaves(problem.operands)
    operands, *rest = _roles_of_arguments(problem.operands, *arguments[len(given) :])
    leaves = list(zip(jax.tree.leaves(operands), given, strict=True))
    if rest:  # gradients: of some of the operands, in their order
        of_results, candidates = [], iter(leaves)
        for result in results:
            same = (roles for roles, x in candidates if tuple(x.shape) == tuple(result.shape))
            of_results.append(next(same))
    else:
        of_results = [_OUTPUT, _LSE]
    of_arguments = [roles for roles, _ in leaves] + rest
    count = iter(range(1000))

    def factors(roles: str) -> str:
        return " ".join(f"x{next(count)}" if role == "." else role for role in roles)

    sides = (", ".join(map(factors, side)) for side in (of_arguments, of_results))
    return " -> ".join(sides)


def _roles_of_arguments(operands: spec.Operands, *rest: Any) -> tuple[Any, ...]:
    """For each array a letter for each axis."""
    axes = spec.AXES if operands.page_table is None else spec.AXES_OF_PAGES

    def of_operand(name: str) -> Any:
        roles = axes.get(name)
        return jax.tree.map(lambda x: _of_axes(roles, x.shape), getattr(operands, name))

    others = (_OUTPUT if len(x.shape) == len(_OUTPUT) else _LSE for x in rest)
    return spec.Operands(*map(of_operand, operands._fields)), *others


def _roles_of_results(results: Any) -> Any:
    if isinstance(results, spec.Operands):
        return _roles_of_arguments(results)[0]
    return _OUTPUT, _LSE


def _of_axes(roles: str | None, shape: Sequence[int]) -> str:
    """An axis of size 1 is divided by nothing: it may speak of all batch elements, or heads."""
    if roles is None:
        return "." * len(shape)
    return "".join("." if size == 1 else role for role, size in zip(roles, shape, strict=True))


def _names(axis: Any) -> tuple[str, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)
