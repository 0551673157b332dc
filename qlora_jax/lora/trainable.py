"""A model with adapters taken apart for training, put together again, stacked."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from qlora_jax.lora.lora import LoRAParam, LoraTensor
from qlora_jax.lora.places import (
    PARTS,
    TRAINED,
    Partly,
    Targets,
    is_module,
    is_weight,
    listed,
    map_lora,
    named_weights,
    opened,
    pattern_of,
)
from qlora_jax.quant.rules import leaf_path

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, Key


def split_trainable(model: Any, *, also: Targets | None = None) -> tuple[Any, Any]:
    """Takes a model apart into what is trained and what is frozen.

    Both are pytrees, fit to be arguments of jit; gradients and optimizers take the
    first. Of an NNX module the parts are `State` and `(graphdef, State)`, as
    `nnx.split(model, LoRAParam, ...)` gives them. Of a plain tree both have its
    structure, None standing for what is in the other part.

    Args:
        model: a model with adapters in it, see `add_lora`, or rows, see `train_rows`.
        also: arrays to be trained whole beside the adapters, by pattern or predicate as
            in `add_lora`, biases and norms included: `"bias$|norm"`, `"embed|lm_head"`.
            They are trained in the type they have.

    Returns:
        `(trainable, frozen)`, for `join_trainable`.

    Raises:
        ValueError: if nothing is trained, an adapter is merged, or `also` names
            nothing or a weight that cannot be trained.
    """
    weights = named_weights(model)
    lora = {p: w for p, w in weights.items() if isinstance(w, LoraTensor)}
    whole = frozenset() if also is None else trained_whole(weights, also)
    partly = any(isinstance(w, Partly) for w in weights.values())
    if not partly and not whole:
        raise ValueError("The model holds no adapter: call add_lora first.")
    for path, lt in lora.items():
        if lt.merged is not None:
            raise ValueError(
                f"The adapter of {path!r} is merged and would get no gradient: call "
                "unmerge_lora first."
            )
    if is_module(model):
        named = lambda path, _: "/".join(map(str, path)) in whole
        chosen = nnx.Any(LoRAParam, named) if whole else LoRAParam
        graphdef, trainable, rest = nnx.split(model, chosen, ...)
        return trainable, (graphdef, rest)

    def part(rest: bool):
        def take(path, leaf):
            if isinstance(leaf, Partly):
                trained, base = PARTS[type(leaf)]
                own = ("key", "ids") if isinstance(leaf, LoraTensor) else ()
                emptied = trained if rest else (*base, *own)
                return dataclasses.replace(leaf, **dict.fromkeys(emptied))
            return leaf if rest != (leaf_path(path) in whole) else None

        return jax.tree_util.tree_map_with_path(take, model, is_leaf=is_weight)

    return part(rest=False), part(rest=True)


def join_trainable(
    trainable: Any,
    frozen: Any,
    *,
    key: "Key[Array, ''] | None" = None,
    adapter_ids: "Int32[Array, ' rows'] | Int32[Array, ''] | None" = None,
) -> Any:
    """Puts together what `split_trainable` took apart: a model to be called.

    Args:
        trainable: the first part, or, stacked, several (see `stack_adapters`).
        frozen: the second part.
        key: a PRNG key for the adapters' dropout, split over weights and layers. The
            same key gives the same masks. None: no dropout.
        adapter_ids: which of several stacked adapters to use: one for each row of the
            batch, or one for all; -1 is the base alone. They are not checked under
            jit, where an id that does not exist gives NaN.

    Returns:
        The model.

    Raises:
        ValueError: if the parts are not of one model, an adapter does not fit its
            weight, or an id is out of range.
    """
    is_nnx = isinstance(frozen, tuple) and isinstance(frozen[0], nnx.GraphDef)
    model = (_join_module if is_nnx else _join_tree)(trainable, frozen)
    for path, weight in named_weights(model).items():
        if isinstance(weight, LoraTensor):
            _check_fits(path, opened(weight))
    if key is None and adapter_ids is None:
        return model
    if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if adapter_ids is not None:
        adapter_ids = jnp.asarray(adapter_ids, jnp.int32)

    def chosen(path: str, lt: LoraTensor) -> LoraTensor:
        stack = lt.shape[:-2]
        changes: dict[str, Any] = {}
        if key is not None and lt.dropout:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            changes["key"] = jax.random.split(own, stack) if stack else own
        if adapter_ids is not None:
            _check_ids(path, lt, adapter_ids)
            changes["ids"] = jnp.broadcast_to(adapter_ids, stack + adapter_ids.shape)
        return dataclasses.replace(lt, **changes)

    return map_lora(model, chosen)


def stack_adapters(trainables: Sequence[Any]) -> Any:
    """Stacks several adapters of one base, to be chosen by row of a batch.

        model = join_trainable(stack_adapters([t0, t1]), frozen, adapter_ids=ids)

    Args:
        trainables: first parts of `split_trainable`, of adapters with the same targets
            and ranks. The alphas that hold are those of the frozen part.

    Returns:
        One such part, whose leaves have an axis for the adapters before their last
        two: `a` [*stack, adapters, in, rank].

    Raises:
        ValueError: if there are none, or they differ in structure or shape.
    """
    if not trainables:
        raise ValueError("stack_adapters needs at least one adapter.")
    first, *others = trainables
    shapes = list(map(jnp.shape, jax.tree.leaves(first)))
    for i, other in enumerate(others, 1):
        if jax.tree.structure(other) != jax.tree.structure(first):
            raise ValueError(
                f"Adapters 0 and {i} differ in targets, alpha or dropout: give all "
                "the same."
            )
        if list(map(jnp.shape, jax.tree.leaves(other))) != shapes:
            raise ValueError(
                f"Adapters 0 and {i} differ in the shape of a leaf: give all the same "
                "rank."
            )

    def stack(path, *leaves):
        # A magnitude has one axis behind the stack, [*stack, out]; a and b have two.
        name = leaf_path(path).rsplit("/", 1)[-1]
        if name not in TRAINED:
            raise ValueError(
                f"{leaf_path(path)!r} is trained whole (also=...), and only adapters "
                "can be chosen by row."
            )
        return jnp.stack(leaves, -2 if name == "magnitude" else -3)

    return jax.tree_util.tree_map_with_path(stack, *trainables)


def trained_whole(weights: Mapping[str, Any], also: Targets) -> frozenset[str]:
    """Returns the paths of the arrays that `also` of `split_trainable` names.

    Raises:
        ValueError: if it names nothing, or what cannot be trained.
    """
    fit = [
        path
        for path, w in weights.items()
        if not is_weight(w) and jnp.issubdtype(w.dtype, jnp.floating)
    ]
    if callable(also):
        chosen = [path for path in weights if also(path, weights[path])]
    else:
        patterns = [also] if isinstance(also, str) else also
        of = "array that can be trained whole"
        chosen = list(pattern_of(patterns, fit, what="also", of=of))
    for path in chosen:
        if path not in fit:
            raise ValueError(
                f"{path!r} is {type(weights[path]).__name__} and cannot be trained "
                f"whole; these can: {listed(fit)}."
            )
    return frozenset(chosen)


def _check_ids(path: str, lt: LoraTensor, ids: Any) -> None:
    if ids.ndim > 1:
        raise ValueError(f"adapter_ids has shape {list(ids.shape)}: give one axis.")
    several = lt.num_adapters
    if several is None:
        raise ValueError(
            f"adapter_ids were given and {path!r} holds one adapter: stack several "
            "with stack_adapters."
        )
    if not isinstance(ids, Tracer):
        known = np.asarray(ids)
        if known.size and (known.min() < -1 or known.max() >= several):
            raise ValueError(
                f"adapter_ids from {known.min()} to {known.max()} must lie in -1 to "
                f"{several - 1}: {path!r} holds {several} adapters."
            )


def _join_module(trainable: Any, frozen: Any) -> Any:
    graphdef, rest = frozen
    try:
        # Variables of this trace, not the ones in the arguments, or transforms of NNX
        # inside of a model would refuse them under grad. No array is copied.
        return nnx.merge(graphdef, trainable, rest, copy=True)
    except (TypeError, ValueError) as error:
        given = type(trainable).__name__
        if isinstance(trainable, nnx.State):
            paths = nnx.to_flat_state(trainable)
            given = listed(["/".join(map(str, path)) for path, _ in paths])
        raise ValueError(
            "trainable and frozen are not of one model: the frozen part lacks other "
            f"arrays than it is given ({given})."
        ) from error


def _check_fits(path: str, lt: LoraTensor) -> None:
    """Raises unless the adapter is one of its weight."""
    *stack, n_in, n_out = lt.shape
    sizes = {"a": (n_in, None), "b": (None, n_out), "magnitude": (n_out,)}
    for name, wanted in sizes.items():
        leaf = getattr(lt, name)
        if leaf is None and name == "magnitude":
            continue
        if leaf is None:
            raise ValueError(
                f"{path!r} was adapted and has no adapter here: trainable is of a "
                "model with other targets."
            )
        shape = getattr(leaf, "shape", None)
        if shape is None:  # a tree of something else than arrays
            continue
        own = shape[len(stack) :]
        same = all(
            w in (None, n) for w, n in zip(wanted[::-1], own[::-1], strict=False)
        )
        adapters = len(own) - len(wanted)
        if list(shape[: len(stack)]) != stack or adapters not in (0, 1) or not same:
            raise ValueError(
                f"{path!r}: {name} has shape {list(shape)}, and the weight is "
                f"{list(lt.shape)}: the adapter is of another base."
            )


def _join_tree(trainable: Any, frozen: Any) -> Any:
    def join(part, rest):
        if part is None or rest is None:
            return rest if part is None else part
        if not isinstance(rest, Partly) or type(rest) is not type(part):
            raise ValueError(
                "trainable and frozen are not of one model: an adapter meets "
                f"{type(rest).__name__}."
            )
        trained = {name: getattr(part, name) for name in PARTS[type(rest)][0]}
        return dataclasses.replace(rest, **trained)

    is_leaf = lambda node: node is None or is_weight(node)
    parts, treedef = jax.tree.flatten(trainable, is_leaf=is_leaf)
    rests, other = jax.tree.flatten(frozen, is_leaf=is_leaf)
    if treedef != other:
        raise ValueError(
            "trainable and frozen are not of one model: they are trees of "
            f"{treedef.num_leaves} and {other.num_leaves} weights, in different places."
        )
    return treedef.unflatten(map(join, parts, rests))
