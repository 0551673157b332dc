"""The cross entropy of the next token, over a large vocabulary in chunks."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from qlora_jax.sharding import row_parts
from qlora_jax.train.cross_entropy import chunked_cross_entropy

if TYPE_CHECKING:
    from jax.sharding import NamedSharding
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
    rows: "NamedSharding | None" = None,
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
    rows = rows if hasattr(model, "head_on") else None
    options |= {} if rows is None else {"rows": rows}
    parts = row_parts(rows)
    if tokens.shape[0] % parts:
        raise ValueError(
            f"A batch of {tokens.shape[0]} rows cannot be split over the {parts} parts "
            f"of {rows}."
        )
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
    count = min(chunk_size, targets.size // parts)
    head = model.head if rows is None else model.head_on(rows)
    total = chunked_cross_entropy(head, hidden, targets, weights, count, parts=parts)
    return total, jnp.sum(weights)


def next_token_loss(
    model: Any,
    batch: "Batch",
    *,
    remat: str = "full",
    unroll: bool = False,
    chunk_size: int = 512,
    perturb: "Callable[[Array], Array] | None" = None,
    rows: "NamedSharding | None" = None,
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
        rows: how the rows of the batch lie on a mesh, `sharding.batch_sharding(mesh)`.
            Each device then computes those that it has, `chunk_size` tokens of them at
            a time. Without it the numbers are the same, and devices do work twice. Of
            no use to a model that has no `head_on(rows)`, as `Llama` has.

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
        rows=rows,
    )
    return total / jnp.maximum(count, 1)
