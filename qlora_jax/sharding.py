"""How a model lies on several devices: one rule, by the names of its weights.

A mesh has axes of these names, any of which may be absent or of size 1:

    data     the batch is split, weights are whole on each device
    fsdp     the batch is split, and so is one axis of each weight, which XLA gathers
             when it is used
    model    tensor parallel: q, k, v, gate and up by output features, o and down by
             input features (Megatron's pairs: one sum over devices for each pair), the
             embedding and the head by the vocabulary

An axis that does not divide by the devices stays whole. All of it says where numbers
are, never what they are: a sharded model computes what the model on one device does,
but for the order of sums.
"""

import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

AXES = ("data", "fsdp", "model")
_ROWS = ("data", "fsdp")  # those that the rows of a batch are split over

# The mesh axes of [in, out] of the linear weights of a layer and of the head.
_BY_OUTPUT, _BY_INPUT = ("fsdp", "model"), ("model", "fsdp")
_MATRICES = {
    "q_proj": _BY_OUTPUT,
    "k_proj": _BY_OUTPUT,
    "v_proj": _BY_OUTPUT,
    "o_proj": _BY_INPUT,
    "gate_proj": _BY_OUTPUT,
    "up_proj": _BY_OUTPUT,
    "down_proj": _BY_INPUT,
    "lm_head": _BY_OUTPUT,
    "embed": ("model", "fsdp"),  # [vocabulary, hidden]
}


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    model: int = 1,
    devices: "Sequence[Any] | None" = None,
) -> Mesh:
    """Returns a mesh with the axes data, fsdp and model.

    Args:
        data: parts of the batch on whole copies of the weights.
        fsdp: parts of the batch and of the weights.
        model: parts of the weights (tensor parallel).
        devices: the devices; None: the first of all.

    Raises:
        ValueError: if there are fewer devices than parts, or others were given.
    """
    sizes = (data, fsdp, model)
    found = jax.devices() if devices is None else list(devices)
    count = int(np.prod(sizes))
    if (
        min(sizes) < 1
        or count > len(found)
        or (devices is not None and count != len(found))
    ):
        raise ValueError(
            f"{data=} x {fsdp=} x {model=} takes {count} devices, there are "
            f"{len(found)}."
        )
    grid = np.asarray(found[:count], dtype=object).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def checked(mesh: Mesh) -> Mesh:
    """Returns the mesh with axes that XLA propagates by itself.

    Raises:
        ValueError: if an axis has another name than those of `AXES`.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ValueError(
            f"The mesh has axes {list(mesh.axis_names)}; {unknown} mean nothing here, "
            f"known are {', '.join(AXES)} (see qlora_jax.sharding)."
        )
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def matrix_axes(name: str) -> tuple[str | None, str | None]:
    """Returns the mesh axes of the two axes of a matrix, by the weight's name.

    Args:
        name: of the attribute: "q_proj", ..., "lm_head", "embed". Any other is whole
            on every device.

    Returns:
        Those of [in, out]; of the embedding, of [vocabulary, hidden].
    """
    return _MATRICES.get(name, (None, None))


def vector_axis(name: str) -> str | None:
    """Returns the mesh axis of a vector [out]: biases follow their weight's output."""
    weight, bias, _ = name.partition("_bias")
    is_split = bool(bias) and _MATRICES.get(weight) == _BY_OUTPUT
    return "model" if is_split else None


def fitting(mesh: Mesh, axis: str | None, *sizes: int) -> str | None:
    """Returns the axis if the mesh has it and its devices divide all of `sizes`."""
    if axis is None or axis not in mesh.axis_names:
        return None
    return axis if all(size % mesh.shape[axis] == 0 for size in sizes) else None


def array_sharding(mesh: Mesh, name: str, shape: tuple[int, ...], stack: int) -> Any:
    """Returns the sharding of a dense weight.

    Args:
        mesh: from `make_mesh` or `checked`.
        name: of the attribute that holds it.
        shape: stack axes in front.
        stack: how many of those there are; they are never split.
    """
    own = shape[stack:]
    axes = matrix_axes(name) if len(own) == 2 else (vector_axis(name),)
    named = [fitting(mesh, axis, size) for axis, size in zip(axes, own, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*[None] * stack, *named))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [batch, ...]: the rows over data and fsdp."""
    axes = tuple(name for name in _ROWS if name in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes or None))


def row_parts(rows: NamedSharding | None) -> int:
    """Returns over how many parts a sharding splits the first axis; 1 for None."""
    if rows is None or not len(rows.spec):
        return 1
    return parts_of(rows.mesh, rows.spec[0])


def parts_of(mesh: Any, axes: Any) -> int:
    """Returns over how many parts a mesh splits what lies on `axes`.

    Args:
        mesh: a `Mesh`, or an abstract one.
        axes: an entry of a `PartitionSpec`: a name, several, or None.
    """
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def on_rows(x: jax.Array, rows: NamedSharding | None) -> jax.Array:
    """Keeps the rows of x, and of its gradient, where those of the batch are.

    Without it a compiler may follow a weight that is split, and split its features.
    """
    return x if rows is None else lax.with_sharding_constraint(x, rows)


def mesh_of(tree: Any) -> Mesh | None:
    """Returns the mesh of several devices that arrays of a tree lie on, or None.

    That with the most devices, where they differ; traced arrays tell of none.
    """
    shardings = [leaf.sharding for leaf in jax.tree.leaves(tree) if is_concrete(leaf)]
    named = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    meshes = [mesh for mesh in named if isinstance(mesh, Mesh)]
    largest = max(meshes, key=lambda mesh: mesh.size, default=None)
    return largest if largest is not None and largest.size > 1 else None


def on_all_of(mesh: Mesh, tree: Any) -> Any:
    """Returns the tree with every array that is on one device put on all of a mesh."""

    def put(leaf: Any) -> Any:
        if not is_concrete(leaf) or len(leaf.sharding.device_set) > 1:
            return leaf
        kind = leaf.sharding.memory_kind
        return jax.device_put(
            leaf, NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
        )

    return jax.tree.map(put, tree)


def committed(tree: Any) -> Any:
    """Returns the tree with every array bound to the device it is on; none is copied.

    A program is compiled once for arrays that are bound and once for those that are
    not. What a train step returns is bound, since paged state binds it: without this
    its second call, and every evaluation after a training, would compile anew.

    Beside arrays on a mesh, one that is on one device (a count of steps, keys of
    dropout) is put on all of the mesh: bound to the one, it would be refused. A tree
    whose arrays are on different devices all the same stays as it is.
    """
    if (mesh := mesh_of(tree)) is not None:
        tree = on_all_of(mesh, tree)
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    if len({frozenset(leaf.sharding.device_set) for leaf in arrays}) > 1:
        return tree

    def bound(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.device_put(leaf, leaf.sharding)

    return jax.tree.map(bound, tree)


def is_concrete(leaf: Any) -> bool:
    """Whether it is an array that lies somewhere, and not one that is traced."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
