"""NEFTune: noise on the embeddings of the tokens that are trained on."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Key

    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]


def neftune(
    batch: "Batch", alpha: float, key: "Key[Array, '']"
) -> "Callable[[Float[Array, 'b t d']], Float[Array, 'b t d']]":
    """Returns the function that adds NEFTune's noise to the embeddings of a batch.

        x + u · alpha / sqrt(L · d),    u uniform in [-1, 1)

    with L the tokens of a token's document and d the numbers of an embedding
    (https://arxiv.org/abs/2310.05914, which has alpha 5, 10 and 15). Padding does not
    count, so that a document has the same noise, in size, alone in a row or packed with
    others. Only what is trained on has it; evaluation and generation have none.

    Args:
        batch: as `next_token_loss` takes it.
        alpha: see the equation.
        key: the same key gives the same noise.
    """
    lengths = document_lengths(batch)

    def perturb(x):
        noise = jax.random.uniform(key, x.shape, jnp.float32, -1, 1)
        scale = alpha / jnp.sqrt(lengths.astype(jnp.float32) * x.shape[-1])
        return (x.astype(jnp.float32) + noise * scale[..., None]).astype(x.dtype)

    return perturb


def document_lengths(batch: "Batch") -> "Int[Array, 'b t']":
    """Returns how many tokens the document of each token has in its row.

    Of packed rows the segments tell; of others the mask: a document ends with the last
    token that is learned, and what follows is padding, or changes nothing.
    """
    tokens = jnp.asarray(batch["tokens"])
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    if "segment_ids" in batch:
        ids = jnp.asarray(batch["segment_ids"])
        changes = ids[:, 1:] != ids[:, :-1]
        is_first = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
        is_last = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
        first = lax.cummax(jnp.where(is_first, index, 0), axis=1)
        last = lax.cummin(jnp.where(is_last, index, index[-1]), axis=1, reverse=True)
        return last - first + 1
    if "loss_mask" not in batch:
        return jnp.full_like(tokens, tokens.shape[1])
    learned = jnp.asarray(batch["loss_mask"]) != 0
    ends = jnp.max(jnp.where(learned, index + 1, 1), axis=1, keepdims=True)
    return jnp.broadcast_to(ends, tokens.shape)
