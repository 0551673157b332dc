"""The loss of a model on held-out batches."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from qlora_jax.sharding import batch_sharding, committed, mesh_of, row_parts
from qlora_jax.train.loss import next_token_loss_sum

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]


@functools.cache
def _eval_step(chunk_size: int, rows: "NamedSharding | None") -> Callable[..., Any]:
    @jax.jit
    def step(graph, state, batch):
        return next_token_loss_sum(
            nnx.merge(graph, state),
            batch,
            remat="none",
            chunk_size=chunk_size,
            rows=rows,
        )

    return step


def evaluate(model: Any, batches: Iterable["Batch"], *, chunk_size: int = 512) -> float:
    """Returns the mean loss over all tokens of the batches, in nats.

    The rows of a batch are split over the devices of a model's mesh where they divide.

    Args:
        model: an NNX module with `hidden` and `head`, with adapters or without.
        batches: as `next_token_loss` takes them, best of one shape.
        chunk_size: tokens whose logits are in memory at a time.

    Raises:
        ValueError: if there is no token to predict.
    """
    graph, state = committed(nnx.split(model))
    mesh = mesh_of(state)
    rows = None if mesh is None else batch_sharding(mesh)

    def summed(batch: "Batch") -> Any:
        if rows is None or len(batch["tokens"]) % row_parts(rows):
            return _eval_step(chunk_size, None)(graph, state, batch)
        batch = jax.device_put(dict(batch), rows)
        return _eval_step(chunk_size, rows)(graph, state, batch)

    sums = [summed(batch) for batch in batches]
    count = sum(float(count) for _, count in sums)
    if not count:
        raise ValueError("The batches have no token to predict: is the mask all 0?")
    return sum(float(loss) for loss, _ in sums) / count
