"""The loss of a model on held-out batches."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from qlora_jax.sharding import committed
from qlora_jax.train.loss import next_token_loss_sum

if TYPE_CHECKING:
    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]


@functools.cache
def _eval_step(chunk_size: int) -> Callable[..., Any]:
    @jax.jit
    def step(graph, state, batch):
        model = nnx.merge(graph, state)
        return next_token_loss_sum(model, batch, remat="none", chunk_size=chunk_size)

    return step


def evaluate(model: Any, batches: Iterable["Batch"], *, chunk_size: int = 512) -> float:
    """Returns the mean loss over all tokens of the batches, in nats.

    Args:
        model: an NNX module with `hidden` and `head`, with adapters or without.
        batches: as `next_token_loss` takes them, best of one shape.
        chunk_size: tokens whose logits are in memory at a time.

    Raises:
        ValueError: if there is no token to predict.
    """
    graph, state = committed(nnx.split(model))
    step = _eval_step(chunk_size)
    sums = [step(graph, state, batch) for batch in batches]
    count = sum(float(count) for _, count in sums)
    if not count:
        raise ValueError("The batches have no token to predict: is the mask all 0?")
    return sum(float(loss) for loss, _ in sums) / count
