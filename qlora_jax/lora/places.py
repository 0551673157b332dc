"""Where the weights of a model are: by path, in plain pytrees and in NNX modules."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.lora import nnx as layers
from qlora_jax.lora.forms import KernelForm
from qlora_jax.lora.lora import Frozen, LoRAParam, LoraTensor, unwrapped
from qlora_jax.lora.rows import TrainedRows
from qlora_jax.quant.rules import leaf_path

# A regular expression, several of them, or a predicate over path and weight.
Targets = str | Sequence[str] | Callable[[str, Any], bool]

TRAINED = ("a", "b", "magnitude")
BASE = ("w", "square_norm", "merged")

# Of a weight that is trained in part: its leaves that are, and those of the base.
Partly = LoraTensor | TrainedRows
PARTS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {
    LoraTensor: (TRAINED, BASE),
    TrainedRows: (("rows",), ("w", "at")),
}

# Metadata of a Variable that says something of each axis.
_OF_AXES = ("out_sharding", "sharding", "sharding_names", "mesh")


def is_module(model: Any) -> bool:
    """Whether the model is an NNX module and not a plain pytree of weights."""
    return isinstance(model, nnx.Module)


def is_weight(node: Any) -> bool:
    """Whether a node is used as `x @ node` and is no array: a leaf of these walks."""
    arrays = jax.Array | np.ndarray | np.generic | nnx.Variable
    return hasattr(type(node), "__rmatmul__") and not isinstance(node, arrays)


def named_weights(model: Any) -> dict[str, Any]:
    """Returns every array and weight of a model by its path, Variables opened.

    A path is the keys joined by "/", as in `quantize_tree`.

    An array that is shared between places of a module is listed at each of them.
    """
    if is_module(model):
        return {
            path: unwrapped(value)
            for path, _, _, value in _attributes(model)
            if isinstance(value, nnx.Param | Frozen) or is_weight(value)
        }
    leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_weight)
    return {leaf_path(path): leaf for path, leaf in leaves if hasattr(leaf, "shape")}


def replace_weights(model: Any, new: Mapping[str, Any]) -> Any:
    """Returns the model with the weights at these paths replaced.

    Nothing is copied: what is not replaced is shared with the model given, which stays
    as it was. In a module a LoraTensor comes to hold Variables, anything else becomes
    an nnx.Param, and both keep the metadata of the Variable they replace; a layer of
    Flax's own becomes one that takes any weight, or its former self for an array.
    """
    if not is_module(model):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: new.get(leaf_path(path), leaf), model, is_leaf=is_weight
        )
    model = nnx.merge(*nnx.split(model))
    # By identity, so that what was one object in two places stays one.
    made = {}
    for path, module, name, old in list(_attributes(model)):
        if path not in new:
            continue
        if id(old) not in made:
            made[id(old)] = _in_module(new[path], old)
        setattr(module, name, made[id(old)])
        if layers.is_kernel(module, name):
            change = layers.adapt if is_weight(new[path]) else layers.restore
            change(module)
    return model


def kernel_forms(model: Any) -> "Callable[[str], KernelForm | None]":
    """Returns the function from the path of a weight to its form.

    It gives None for a weight of no layer of Flax's own.
    """
    if not is_module(model):
        return lambda path: None
    holders = {
        path: module
        for path, module, name, _ in _attributes(model)
        if layers.is_kernel(module, name)
    }

    def form_of(path: str) -> KernelForm | None:
        if path not in holders:
            return None
        try:
            return layers.layer_form(holders[path])
        except NotImplementedError as error:
            raise NotImplementedError(f"{path!r}: {error}") from error

    return form_of


def map_lora(model: Any, function: Callable[[str, LoraTensor], Any]) -> Any:
    """Returns the model with `function(path, lt)` in place of each LoraTensor."""
    new = {
        path: function(path, weight)
        for path, weight in named_weights(model).items()
        if isinstance(weight, LoraTensor)
    }
    return replace_weights(model, new)


def opened(lt: LoraTensor) -> LoraTensor:
    """Returns a LoraTensor of arrays for one that may hold Variables."""
    return dataclasses.replace(
        lt, **{name: unwrapped(getattr(lt, name)) for name in TRAINED + BASE}
    )


def pattern_of(
    patterns: Iterable[str],
    paths: Iterable[str],
    *,
    what: str,
    of: str = "weight with two axes or more",
) -> dict[str, str]:
    """Returns which pattern names each path.

    Args:
        patterns: regular expressions, to be found in the path (`re.search`).
        paths: the paths that may be named.
        what: what the patterns are called in errors.
        of: what the paths are of, in errors.

    Returns:
        A dict from each path that is named to its pattern, in the order of the paths.

    Raises:
        ValueError: if a pattern names nothing, is no regular expression, or if two
            name the same path.
    """
    patterns, paths = list(patterns), list(paths)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{what} {pattern!r} is no regular expression: {error}."
            ) from error
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"{what} {pattern!r} is found in the path of no {of}. Those are: "
                f"{listed(paths)}."
            )
    chosen = {}
    for path in paths:
        hits = [pattern for pattern in patterns if re.search(pattern, path)]
        if len(hits) > 1:
            raise ValueError(
                f"{what} {hits[0]!r} and {hits[1]!r} are both found in {path!r}: make "
                "them exclude each other."
            )
        if hits:
            chosen[path] = hits[0]
    return chosen


def listed(paths: Sequence[str], limit: int = 12) -> str:
    """Returns paths for an error message, the first of many."""
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(paths[:limit]) + more if paths else "none"


def _in_module(new: Any, old: Any) -> Any:
    """Wraps a weight for a module, with the metadata of the Variable it replaces."""
    reshaped = getattr(new, "form", None) is not None
    if isinstance(old, Partly):
        reshaped = reshaped or getattr(old, "form", None) is not None
        old = old.w
    metadata = old.get_metadata() if isinstance(old, nnx.Variable) else {}
    if reshaped:  # what names axes would name others now
        metadata = {k: v for k, v in metadata.items() if k not in _OF_AXES}
    if not isinstance(new, Partly):
        return _variable(nnx.Param, new, metadata)
    fields = {}
    trained, base = PARTS[type(new)]
    for name in trained + base:
        value = getattr(new, name)
        if value is None or isinstance(value, nnx.Variable):
            continue
        if name in trained:
            fields[name] = LoRAParam(value)
        else:
            fields[name] = _variable(Frozen, value, metadata if name == "w" else {})
    return nnx.data(dataclasses.replace(new, **fields))


def _variable(kind: type[nnx.Variable], value: Any, metadata: dict[str, Any]) -> Any:
    return kind.from_metadata(value, metadata) if metadata else kind(value)


def _attributes(model: nnx.Module):
    """Yields (path, holder, name, value) of what may be a weight in a module."""
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Pytree):
            continue
        for name, value in vars(node).items():
            if isinstance(value, nnx.Variable) or is_weight(value):
                yield "/".join(map(str, (*path, name))), node, name, value
