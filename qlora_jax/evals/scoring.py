"""Log-probabilities of tokens that are given."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qlora_jax.sharding import committed

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


def log_probs(
    model: Any, tokens: "Int[Array | np.ndarray, 'b t']", *, chunk_size: int = 512
) -> "Float[Array, 'b t-1']":
    """Returns the log-probability of each token after the first, given those before it.

    Padding on the right does no harm, since nothing looks ahead.

    Args:
        model: has `hidden` and `head`, as `Llama`.
        tokens: ids.
        chunk_size: tokens whose logits are in memory at a time.
    """
    return _compiled("log_probs", chunk_size)(
        *committed(nnx.split(model)), jnp.asarray(tokens)
    )


def next_log_probs(
    model: Any,
    tokens: "Int[Array | np.ndarray, 'b t']",
    lengths: "Int[Array | np.ndarray, ' b']",
) -> "Float[Array, 'b v']":
    """Returns the log-probabilities of what follows the first tokens of each row.

    Args:
        model: has `hidden` and `head`, as `Llama`.
        tokens: ids, padded on the right.
        lengths: how many tokens of each row count.
    """
    step = _compiled("next_log_probs", 0)
    return step(*committed(nnx.split(model)), jnp.asarray(tokens), jnp.asarray(lengths))


@functools.cache
def _compiled(name: str, chunk_size: int) -> Callable[..., Any]:
    function = {"log_probs": _log_probs, "next_log_probs": _next_log_probs}[name]

    @jax.jit
    def step(graph, state, *inputs):
        return function(nnx.merge(graph, state), *inputs, chunk_size=chunk_size)

    return step


def _log_probs(model, tokens, *, chunk_size):
    targets = tokens[:, 1:].reshape(-1)
    hidden = model.hidden(tokens)[:, :-1].reshape(targets.size, -1)
    count = min(chunk_size, targets.size)
    padding = -targets.size % count
    hidden = jnp.pad(hidden, [(0, padding), (0, 0)]).reshape(-1, count, hidden.shape[1])
    padded = jnp.pad(targets, (0, padding)).reshape(-1, count)  # [chunks, count]

    def of_chunk(chunk):
        x, target = chunk
        logits = model.head(x)  # float32 [count, v]
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    found = lax.map(of_chunk, (hidden, padded)).reshape(-1)[: targets.size]
    return found.reshape(tokens.shape[0], -1)


def _next_log_probs(model, tokens, lengths, *, chunk_size):
    hidden = model.hidden(tokens)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return jax.nn.log_softmax(model.head(last), axis=-1)
