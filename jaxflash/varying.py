"""The one difference that shard_map makes to a program: which mesh axes a value varies over."""

from typing import Any, TypeVar

import jax
from jax import lax

_Tree = TypeVar("_Tree")


def varying_like(arrays: Any, tree: _Tree) -> _Tree:
    """``tree`` made to vary over every mesh axis that some of ``arrays`` varies over.

    The transpose of this sums over those axes, so the gradient of a replicated operand is summed
    over the devices that used it. Outside shard_map nothing varies and nothing happens.
    """
    axes = frozenset().union(*(_axes(x) for x in jax.tree.leaves(arrays)))

    def vary(x: Any) -> Any:
        missing = tuple(sorted(axes - _axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def _axes(x: Any) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
