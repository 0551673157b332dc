"""The rows of new tokens trained, in a vocabulary that is frozen otherwise."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.lora.places import is_weight, named_weights, pattern_of, replace_weights
from qlora_jax.lora.rows import TrainedRows


def train_rows(
    model: Any,
    rows: Mapping[str, Sequence[int]],
    *,
    dtype: Any = jnp.float32,
) -> Any:
    """Makes rows of embeddings and heads trainable, those of new tokens as a rule.

        model = train_rows(model, {"embed|lm_head": [128002, 128003]})

    `split_trainable` then has the rows beside the adapters. Their optimizer state and
    gradients are those of the rows alone, where `split_trainable(also="embed|lm_head")`
    trains every token. A head that is tied to the embedding has its rows.

    Args:
        model: an NNX module or a plain tree; it stays as it was. No table is copied.
        rows: tokens by pattern, found (`re.search`) in the paths of matrices. Those of
            a path whose last words speak of an embedding are [tokens, features], as in
            `Llama.embed` and Flax's Embed; all others, as heads, [features, tokens].
        dtype: of the trained rows.

    Returns:
        The model with `TrainedRows` in it. `merge_lora` and `fold_rows` make them
        arrays again.

    Raises:
        ValueError: if a pattern names no matrix or two name one, a matrix is quantized
            or has an adapter or rows already, or a token is given twice or is none of
            the table's.
    """
    weights = named_weights(model)
    fit = [path for path, w in weights.items() if len(w.shape) == 2]
    new = {}
    for path, pattern in pattern_of(rows, fit, what="rows", of="matrix").items():
        w, axis = weights[path], 0 if re.search(r"embed[^/]*(/\w+)?$", path) else 1
        if is_weight(w):
            raise ValueError(
                f"{path!r} is {type(w).__name__}: rows of plain arrays can be trained."
            )
        at = np.sort(np.asarray(rows[pattern], np.int32))
        count = w.shape[axis]
        if not at.size or at[0] < 0 or at[-1] >= count or len(set(at)) < at.size:
            raise ValueError(
                f"rows {list(rows[pattern])} of {path!r} must be different tokens in "
                f"[0, {count}), and at least one."
            )
        # A copy: the step that trains it donates it.
        own = jnp.array(jnp.take(w, at, axis=axis), dtype, copy=True)
        new[path] = TrainedRows(w, own, jnp.asarray(at), axis)
    return replace_weights(model, new)


def rows_of(model: Any) -> dict[str, TrainedRows]:
    """Returns the tables of a model with trained rows, by path."""
    weights = named_weights(model)
    return {path: w for path, w in weights.items() if isinstance(w, TrainedRows)}


def fold_rows(model: Any) -> Any:
    """Returns the model with trained rows written into their tables."""
    folded = {
        path: jax.jit(lambda t: t.array())(t) for path, t in rows_of(model).items()
    }
    return replace_weights(model, folded) if folded else model
