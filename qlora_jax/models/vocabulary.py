"""Room for new tokens: embedding and head with more rows."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from qlora_jax.models.llama import Llama


def resize_vocabulary(model: Llama, size: int) -> Llama:
    """Returns the model with another number of tokens.

    The rows of new tokens are the mean of the old ones, in the embedding and, unless it
    is tied, in the head; a token that was never trained is then as likely as the
    average one and does not upset the others. Train them with
    `split_trainable(model, also="embed|lm_head")` and save them with
    `save_adapter(..., modules_to_save=["embed_tokens", "lm_head"])`.

    Args:
        model: with a dense embedding and head. It stays as it was.
        size: number of tokens; fewer than there are drops the last ones.

    Raises:
        ValueError: if `size` is not positive, or the embedding or head is not a plain
            array.
    """
    if size < 1:
        raise ValueError(f"{size=} must be positive.")
    model = nnx.merge(*nnx.split(model))
    model.config = dataclasses.replace(model.config, vocab_size=size)
    model.embed = nnx.Param(_resized(model.embed, size, axis=0, name="embed"))
    if not model.config.tie_embeddings:
        head = _resized(model.lm_head, size, axis=1, name="lm_head")
        model.lm_head = nnx.Param(head)
    return model


def _resized(param: Any, size: int, *, axis: int, name: str) -> Any:
    array = param.get_value() if isinstance(param, nnx.Variable) else param
    if not hasattr(array, "at"):
        raise ValueError(f"{name} is {array!r}; only a plain array can be resized.")
    if size <= array.shape[axis]:
        return jnp.take(array, jnp.arange(size), axis=axis)
    mean = array.astype(jnp.float32).mean(axis=axis, keepdims=True).astype(array.dtype)
    more = jnp.repeat(mean, size - array.shape[axis], axis=axis)
    return jnp.concatenate([array, more], axis=axis)
