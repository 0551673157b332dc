"""Stacked layers taken apart for a loop over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def stack_of(layers: nnx.Module) -> tuple[nnx.GraphDef, Any, Callable]:
    """Splits stacked layers into what a scan slices and what it only indexes.

    A weight that has views of a layer (`at_layer`) is not sliced: the kernel that
    multiplies by it indexes the stack, which saves a copy of the layer in front of it.

    Returns:
        The graph, the tree to scan over, and the function from a slice of that tree to
        the state of one layer.
    """
    graph, stacked = nnx.split(layers)

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    def is_indexed(variable):
        return is_variable(variable) and hasattr(variable.get_value(), "at_layer")

    variables, treedef = jax.tree.flatten(stacked, is_leaf=is_variable)
    indexed = [v if is_indexed(v) else None for v in variables]
    sliced = [None if is_indexed(v) else v for v in variables]
    count = jax.tree.leaves(sliced)[0].shape[0]

    def at_layer(index, slices):
        layer = [
            part if whole is None else whole.replace(whole.get_value().at_layer(index))
            for part, whole in zip(slices, indexed, strict=True)
        ]
        return treedef.unflatten(layer)

    return graph, (jnp.arange(count, dtype=jnp.int32), sliced), at_layer
