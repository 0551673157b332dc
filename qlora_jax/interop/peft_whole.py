"""What an adapter file holds beside the low-rank factors: modules trained whole.

PEFT writes a module of `modules_to_save` under its own name

    base_model.model.model.embed_tokens.weight                  [vocabulary, hidden]
    base_model.model.lm_head.weight                             [vocabulary, hidden]

and single rows of the embedding, those of `trainable_token_indices`, as

    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta

(the rows themselves, not differences). With `bias="lora_only"` in the config it also
has the biases beside the adapters, with "all" those of all modules:

    base_model.model.<module>.base_layer.bias     [out], of a module with an adapter
    base_model.model.<module>.bias                [out], of another
"""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.interop.weights import ModelFileError
from qlora_jax.lora.places import is_weight, listed, named_weights, replace_weights

# Which biases a file has, as PEFT's config says it.
Bias = Literal["none", "lora_only", "all"]
BIAS = get_args(Bias)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WHOLE = re.compile(r"base_model\.model\.(?P<tensor>.+\.(?:weight|bias))")
_ROWS = re.compile(
    r"base_model\.model\.(?P<module>.+)\.token_adapter\.trainable_tokens_delta"
)


@dataclasses.dataclass
class Whole:
    """What a file holds beside factors: tensors and rows, by the tensor's name."""

    tensors: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]

    def take(self, key: str, read: Callable[[str], np.ndarray]) -> bool:
        """Reads the tensor of a key, if it is one of these; says whether it is."""
        if match := _ROWS.fullmatch(key):
            self.rows[f"{match['module']}.weight"] = read(key)
        elif match := _WHOLE.fullmatch(key):
            # A module with an adapter is the `base_layer` of what PEFT makes of it.
            tensor = match["tensor"].replace(".base_layer.bias", ".bias")
            self.tensors[tensor] = read(key)
        return match is not None


def places(
    model: Any, module_name: Callable[[str], str]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns path and layer of every array of a model, by its tensor's name."""
    found = {}
    for where, weight in named_weights(model).items():
        name = module_name(where)
        name = name if name.endswith(".bias") else f"{name}.weight"
        for index in np.ndindex(*weight.shape[: name.count("{}")]):
            found[name.format(*index)] = where, index
    return found


def is_transposed(where: str, array: Any) -> bool:
    """Whether a file holds the array [in, out] of a path as [out, in]."""
    return array.ndim == 2 and re.search("embed", where.rpartition("/")[2]) is None


def chosen(
    model: Any, names: Sequence[str], module_name: Callable[[str], str]
) -> dict[str, np.ndarray]:
    """Returns the tensors of the modules of these names.

    As PEFT finds them: "norm" is every module whose name ends so.

    Args:
        model: with plain arrays at those places.
        names: a module's name, or the end of it: "lm_head", "input_layernorm".
        module_name: from a path to the module.

    Raises:
        ValueError: if a name is of no module, or of one that is no plain array.
    """
    weights, tensors = named_weights(model), {}
    found = places(model, module_name)
    for name in names:
        hits = [tensor for tensor in found if tensor.rpartition(".")[0].endswith(name)]
        if not hits:
            modules = [tensor.rpartition(".")[0] for tensor in found]
            raise ValueError(
                f"modules_to_save {name!r} is of no module; there are "
                f"{listed(sorted(set(modules)))}."
            )
        for tensor in hits:
            where, index = found[tensor]
            array = weights[where]
            if is_weight(array):
                raise ValueError(
                    f"modules_to_save {name!r}: {tensor} is {type(array).__name__}; "
                    "only plain arrays are saved whole."
                )
            array = np.asarray(array[index])
            array = array.T if is_transposed(where, array) else array
            tensors[tensor] = np.ascontiguousarray(array)
    return tensors


def biases(
    model: Any,
    which: Bias,
    adapted: Collection[str],
    module_name: Callable[[str], str],
) -> dict[str, np.ndarray]:
    """Returns biases by the names that a file has for them.

    Args:
        model: with plain arrays for them.
        which: "none", "lora_only": those of modules with an adapter, or "all".
        adapted: the modules with an adapter.
        module_name: from a path to the module.

    Raises:
        ValueError: if there is none of these.
    """
    if which not in BIAS:
        raise ValueError(f"bias={which!r} must be one of {', '.join(BIAS)}.")
    weights, tensors = named_weights(model), {}
    for tensor, (where, index) in places(model, module_name).items():
        module, _, kind = tensor.rpartition(".")
        if which == "none" or kind != "bias":
            continue
        if module in adapted:
            tensors[f"{module}.base_layer.bias"] = np.asarray(weights[where][index])
        elif which == "all":
            tensors[tensor] = np.asarray(weights[where][index])
    if which != "none" and not tensors:
        whose = "the model" if which == "all" else "no module with an adapter"
        has = "has none" if which == "all" else "has one"
        raise ValueError(f"bias={which!r}: there is no bias to save, {whose} {has}.")
    return tensors


def put(
    path: str | os.PathLike[str],
    model: Any,
    whole: Whole,
    indices: Mapping[str, Sequence[int]],
    module_name: Callable[[str], str],
) -> Any:
    """Returns the model with the tensors and rows of a file in it.

    Args:
        path: of the file, for errors.
        model: the base.
        whole: what was read.
        indices: which rows those of `whole.rows` are, by the tensor's name.
        module_name: from a path to the module.

    Raises:
        ModelFileError: if a tensor does not fit the model.
    """
    weights, new = named_weights(model), {}
    found = places(model, module_name)
    config = getattr(model, "config", None)
    vocabulary = None
    for tensor, value in whole.tensors.items():
        if tensor not in found:
            if tensor == HEAD and getattr(config, "tie_embeddings", False):
                # It may replace the tied one, and is looked at again below.
                rows: Any = whole.tensors.get(EMBEDDING, weights["embed"])
                if value.shape == rows.shape:
                    continue
                raise ModelFileError(
                    f"{path}: {tensor} is {list(value.shape)}, and the embedding "
                    f"{list(rows.shape)}."
                )
            raise ModelFileError(
                f"{path}: {tensor!r} is of a module that the model has not. It has: "
                f"{listed(sorted(found))}."
            )
        where, index = found[tensor]
        array = _array(path, tensor, new.get(where, weights[where]))
        wanted = array.shape[len(index) :]
        value = value.T if is_transposed(where, value) else value
        grows = tensor in (EMBEDDING, HEAD) and value.ndim == 2
        axis = 1 if tensor == HEAD else 0
        if grows and value.shape[axis] > wanted[axis]:
            vocabulary = value.shape[axis]
            wanted = tuple(vocabulary if a == axis else n for a, n in enumerate(wanted))
        if value.shape != wanted:
            raise ModelFileError(
                f"{path}: {tensor} is {list(value.shape)} as [in, out], and the model "
                f"has {list(wanted)}."
            )
        value = jnp.asarray(value, array.dtype)
        new[where] = array.at[index].set(value) if index else value
    for tensor, rows in whole.rows.items():
        where, array = _rows_fit(path, tensor, rows, indices, found, weights)
        array = new.get(where, array)
        at = jnp.asarray(indices[tensor], jnp.int32)
        new[where] = array.at[at].set(jnp.asarray(rows, array.dtype))
    if not new:
        return model
    return _finished(path, model, new, whole, vocabulary)


def _array(path: Any, tensor: str, array: Any) -> jax.Array:
    if is_weight(array):
        raise ModelFileError(
            f"{path}: {tensor} was trained whole, and in the model it is "
            f"{type(array).__name__}: load the base without quantize."
        )
    return array


def _rows_fit(
    path: Any,
    tensor: str,
    rows: np.ndarray,
    indices: Mapping[str, Sequence[int]],
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    weights: Mapping[str, Any],
) -> tuple[str, jax.Array]:
    if tensor not in found or tensor not in indices:
        raise ModelFileError(
            f"{path}: rows of {tensor}, of which trainable_token_indices or the model "
            "knows nothing."
        )
    where, _ = found[tensor]
    array = _array(path, tensor, weights[where])
    at = indices[tensor]
    fits = rows.shape == (len(at), array.shape[-1])
    if not fits or not all(type(i) is int and 0 <= i < array.shape[0] for i in at):
        raise ModelFileError(
            f"{path}: rows {list(rows.shape)} of {tensor} for the indices "
            f"{listed(list(map(str, at)))}, and the model has {list(array.shape)}."
        )
    return where, array


def _finished(
    path: Any, model: Any, new: dict[str, Any], whole: Whole, vocabulary: int | None
) -> Any:
    """Replaces the arrays; a tied head that the file parts from the embedding stays."""
    config = getattr(model, "config", None)
    embedding, head = whole.tensors.get(EMBEDDING), whole.tensors.get(HEAD)
    tied = getattr(config, "tie_embeddings", False)
    untie = tied and (
        (embedding is None) != (head is None)
        if embedding is None or head is None
        else not np.array_equal(embedding, head)
    )
    old = named_weights(model)
    result = replace_weights(model, {k: v for k, v in new.items() if k in old})
    changes: dict[str, Any] = {}
    if untie:
        from flax import nnx

        kept = old["embed"] if head is None else jnp.asarray(head, old["embed"].dtype)
        result.lm_head = nnx.Param(kept.T)
        changes["tie_embeddings"] = False
    if vocabulary is not None:
        changes["vocab_size"] = vocabulary
        head_rows = None if tied and not untie else result.lm_head.shape[-1]
        if head_rows not in (None, vocabulary) or result.embed.shape[0] != vocabulary:
            raise ModelFileError(
                f"{path}: embedding and head would have {result.embed.shape[0]} and "
                f"{head_rows} tokens; the file must hold both."
            )
    if changes and config is not None:
        result.config = dataclasses.replace(config, **changes)
    return result
