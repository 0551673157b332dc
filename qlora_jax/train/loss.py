"""The cross entropy of the next token, over a large vocabulary in chunks."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from qlora_jax.train.cross_entropy import chunked_cross_entropy

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]


def next_token_loss_sum(
    model: Any,
    batch: "Batch",
    *,
    remat: str = "full",
    unroll: bool = False,
    chunk_size: int = 512,
    perturb: "Callable[[Array], Array] | None" = None,
) -> "tuple[Float[Array, ''], Float[Array, '']]":
    """Returns the summed loss of a batch and how many tokens it is the sum over.

    As `next_token_loss`, whose quotient these are: sums of parts of a batch add up to
    those of the whole.
    """
    tokens = jnp.asarray(batch["tokens"])
    segment_ids, positions = batch.get("segment_ids"), batch.get("positions")
    # A model of another class need not know what is not asked for.
    options: dict[str, Any] = {"remat": remat}
    options |= {"unroll": True} if unroll else {}
    options |= {} if perturb is None else {"perturb": perturb}
    hidden = model.hidden(tokens, segment_ids, positions, **options)
    weights = jnp.ones(tokens.shape, jnp.float32)
    if "loss_mask" in batch:
        weights = jnp.asarray(batch["loss_mask"], jnp.float32)
    if segment_ids is not None:
        # The last token of a document does not predict the first of the next.
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        weights = weights.at[:, 1:].multiply(same)
    # The last of a row predicts nothing: its weight is 0, and shapes stay even.
    targets = jnp.roll(tokens, -1, axis=1).reshape(-1)
    weights = jnp.roll(weights.at[:, 0].set(0), -1, axis=1).reshape(-1)
    hidden = hidden.reshape(targets.size, -1)
    count = min(chunk_size, targets.size)
    total = chunked_cross_entropy(model.head, hidden, targets, weights, count)
    return total, jnp.sum(weights)


def next_token_loss(
    model: Any,
    batch: "Batch",
    *,
    remat: str = "full",
    unroll: bool = False,
    chunk_size: int = 512,
    perturb: "Callable[[Array], Array] | None" = None,
) -> "Float[Array, '']":
    """Returns the mean cross entropy of the tokens that are to be predicted.

        loss = -sum(mask[t] · log p(tokens[t] | tokens[<t])) / sum(mask),   t > 0

    The logits are made `chunk_size` tokens at a time, and their gradient with them:
    [tokens, vocab] is never whole in memory, see `chunked_cross_entropy`.

    Args:
        model: has `hidden(tokens, segment_ids, positions, remat=)` and `head(hidden)`.
        batch: `tokens` int [batch, seq]; optional, of the same shape, `loss_mask` (1
            where a token is to be predicted; all, if absent), `segment_ids` and
            `positions` (of packed rows).
        remat: what the backward recomputes, see `Llama.hidden`.
        unroll: whether layers are compiled one by one, see `Llama.hidden`.
        chunk_size: tokens whose logits are in memory at a time.
        perturb: what the embeddings go through first, as `neftune` gives it.

    Returns:
        In nats, float32; 0 if nothing is to be predicted.
    """
    total, count = next_token_loss_sum(
        model,
        batch,
        remat=remat,
        unroll=unroll,
        chunk_size=chunk_size,
        perturb=perturb,
    )
    return total / jnp.maximum(count, 1)
