"""The cross entropy of the next token, over a large vocabulary in chunks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]


def next_token_loss_sum(
    model: Any, batch: "Batch", *, remat: str = "full", chunk_size: int = 512
) -> "tuple[Float[Array, ''], Float[Array, '']]":
    """Returns the summed loss of a batch and how many tokens it is the sum over.

    As `next_token_loss`, whose quotient these are: sums of parts of a batch add up to
    those of the whole.
    """
    tokens = batch["tokens"]
    segment_ids, positions = batch.get("segment_ids"), batch.get("positions")
    hidden = model.hidden(tokens, segment_ids, positions, remat=remat)
    weights = jnp.ones(tokens.shape, jnp.float32)
    if "loss_mask" in batch:
        weights = batch["loss_mask"].astype(jnp.float32)
    if segment_ids is not None:
        # The last token of a document does not predict the first of the next.
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        weights = weights.at[:, 1:].multiply(same)
    targets, weights = tokens[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    hidden = hidden[:, :-1].reshape(targets.size, -1)
    # Tokens that count come first; chunks without any are then skipped. Prompts and
    # padding are most of an instruction batch, and the head is a large part of a step.
    order = jnp.argsort(weights == 0, stable=True)
    hidden, targets, weights = hidden[order], targets[order], weights[order]

    count = min(chunk_size, targets.size)
    padding = -targets.size % count

    def chunked(x: "Array") -> "Array":
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, count, *x.shape[1:])  # [chunks, count, ...]

    # Recomputed in the backward, so that the logits of one chunk are all there is.
    @jax.checkpoint
    def chunk_loss(total, chunk):
        x, target, weight = chunk

        def loss_of_chunk():
            logits = model.head(x)  # float32 [count, vocab]
            picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
            return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weight)

        counts = jnp.any(weight != 0)
        return total + lax.cond(counts, loss_of_chunk, lambda: jnp.float32(0)), None

    chunks = (chunked(hidden), chunked(targets), chunked(weights))
    total, _ = lax.scan(chunk_loss, jnp.float32(0), chunks)
    return total, jnp.sum(weights)


def next_token_loss(
    model: Any, batch: "Batch", *, remat: str = "full", chunk_size: int = 512
) -> "Float[Array, '']":
    """Returns the mean cross entropy of the tokens that are to be predicted.

        loss = -sum(mask[t] · log p(tokens[t] | tokens[<t])) / sum(mask),   t > 0

    The logits are made `chunk_size` tokens at a time, in the backward again: [tokens,
    vocab] is never whole in memory.

    Args:
        model: has `hidden(tokens, segment_ids, positions, remat=)` and `head(hidden)`.
        batch: `tokens` int [batch, seq]; optional, of the same shape, `loss_mask` (1
            where a token is to be predicted; all, if absent), `segment_ids` and
            `positions` (of packed rows).
        remat: what the backward recomputes, see `Llama.hidden`.
        chunk_size: tokens whose logits are in memory at a time.

    Returns:
        In nats, float32; 0 if nothing is to be predicted.
    """
    total, count = next_token_loss_sum(model, batch, remat=remat, chunk_size=chunk_size)
    return total / jnp.maximum(count, 1)
