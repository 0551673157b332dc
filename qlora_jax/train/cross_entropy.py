"""Cross entropy over a large vocabulary, its gradient computed in the same pass."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Head = Callable[[Float[Array, "chunk d"]], Float[Array, "chunk v"]]


def chunked_cross_entropy(
    head: "Head",
    hidden: "Float[Array, 't d']",
    targets: "Int[Array, ' t']",
    weights: "Float[Array, ' t']",
    chunk_size: int,
    *,
    parts: int = 1,
) -> "Float[Array, '']":
    """Returns the weighted sum of -log softmax(head(hidden))[targets].

    A chunk of tokens at a time: [t, v] logits are never whole in memory. Where the sum
    is differentiated, the gradient of a chunk is computed while its logits are there,
    so that the head is multiplied by once forward and once backward; what is kept is
    the gradient with respect to `hidden`, in its type, and, only if it is asked for,
    the one with respect to what `head` holds, in float32.

    Tokens of weight 0 are sorted to the end, and chunks without any other are skipped:
    prompts and padding are most of an instruction batch.

    Args:
        head: from hidden states to float32 logits; it may close over parameters.
        hidden: hidden states.
        targets: the id to be predicted from each.
        weights: what each counts, float32.
        chunk_size: tokens in a chunk.
        parts: of the tokens, one after another, on as many devices. A chunk then has
            `chunk_size` tokens of each of them.

    Raises:
        ValueError: if `chunk_size` is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"{chunk_size=} must be at least 1.")
    order = jnp.argsort(_of_parts(weights == 0, parts), stable=True)
    # Parameters that the head holds become arguments: they may be differentiated.
    rows = parts * chunk_size
    example = jax.ShapeDtypeStruct((rows, hidden.shape[1]), hidden.dtype)
    pure_head, held = jax.closure_convert(head, example)
    targets, weights = (
        _chunks(_taken(x, order, parts), chunk_size, parts) for x in (targets, weights)
    )
    return _cross_entropy(
        pure_head, (chunk_size, parts), hidden, held, order, targets, weights
    )


def _of_parts(x: "Array", parts: int) -> "Array":
    """[t, ...] as [parts, t / parts, ...]; as it is, if there is one part."""
    return x if parts == 1 else x.reshape(parts, -1, *x.shape[1:])


def _taken(x: "Array", index: "Array", parts: int) -> "Array":
    """x[index], of each part its own.

    Args:
        x: [t, ...].
        index: [i], or [parts, i] of places in a part.
        parts: of x.

    Returns:
        [parts · i, ...].
    """
    if parts == 1:
        return x[index]
    taken = jax.vmap(lambda part, i: part[i])(_of_parts(x, parts), index)
    return taken.reshape(-1, *x.shape[1:])


def _chunks(x: "Array", chunk_size: int, parts: int) -> "Array":
    """[t] as [chunks, parts · chunk_size], filled up with zeros."""
    padding = -(x.size // parts) % chunk_size
    if parts == 1:
        return jnp.pad(x, (0, padding)).reshape(-1, chunk_size)
    x = jnp.pad(_of_parts(x, parts), ((0, 0), (0, padding)))
    x = x.reshape(parts, -1, chunk_size).swapaxes(0, 1)
    return x.reshape(-1, parts * chunk_size)


def _unchunked(x: "Array", chunk_size: int, parts: int) -> "Array":
    """[chunks, parts · chunk_size, d] as [tokens and what fills them up, d]."""
    if parts > 1:
        x = x.reshape(-1, parts, chunk_size, x.shape[-1]).swapaxes(0, 1)
    return x.reshape(-1, x.shape[-1])


def _chunk_loss(head: Any, x: Any, held: Any, target: Any, weight: Any) -> Any:
    return jnp.sum(token_losses(head(x, *held), target) * weight)


@jax.custom_vjp
def token_losses(
    logits: "Float[Array, 'chunk v']", target: "Int[Array, ' chunk']"
) -> "Float[Array, ' chunk']":
    """Returns -log softmax(logits)[target] of each row.

    The logits are read once, and once more for their gradient, which is written by one
    pass in the type that asks for it.
    """
    return _token_losses_fwd(logits, target)[0]


def _token_losses_fwd(logits, target):
    total = _log_sum_exp(logits)
    picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return total - picked, (logits, total, target)


def _token_losses_bwd(residuals, ct):
    logits, total, target = residuals
    # Compared, not scattered: a scatter would need the array in float32, as it is.
    is_target = lax.broadcasted_iota(target.dtype, logits.shape, 1) == target[:, None]
    gradient = jnp.exp(logits - total[:, None]) - is_target.astype(logits.dtype)
    return gradient * ct[:, None], None


token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


def _log_sum_exp(x: "Float[Array, 'chunk v']") -> "Float[Array, ' chunk']":
    """The logarithm of the sum of exponentials of each row, in one pass over it.

    What is added up are pairs: a maximum, and the sum of exp(x - maximum) so far.
    """

    def add(one, other):
        top = jnp.maximum(one[0], other[0])
        return top, one[1] * jnp.exp(one[0] - top) + other[1] * jnp.exp(other[0] - top)

    lowest = jnp.asarray(jnp.finfo(x.dtype).min, x.dtype)
    start = (lowest, jnp.zeros((), x.dtype))
    top, total = lax.reduce((x, jnp.ones_like(x)), start, add, (1,))
    return top + jnp.log(total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(head, cut, hidden, held, order, targets, weights):
    total, _ = _scan_chunks(
        lambda x, target, weight: (_chunk_loss(head, x, held, target, weight), ()),
        cut,
        hidden,
        order,
        targets,
        weights,
        jnp.float32(0),
    )
    return total


def _cross_entropy_fwd(head, cut, hidden, held, order, targets, weights):
    held_values = [leaf.value for leaf in held]
    wanted = [i for i, leaf in enumerate(held) if leaf.perturbed]
    if not (wanted or hidden.perturbed):
        values = (x.value for x in (order, targets, weights))
        return _cross_entropy(head, cut, hidden.value, held_values, *values), None
    order, targets, weights = order.value, targets.value, weights.value

    def chunk(x, target, weight):
        def loss(x, parameters):
            full = list(held_values)
            for i, parameter in zip(wanted, parameters, strict=True):
                full[i] = parameter
            return _chunk_loss(head, x, full, target, weight)

        parameters = [held_values[i] for i in wanted]
        total, (dx, gradients) = jax.value_and_grad(loss, (0, 1))(x, parameters)
        return (total, [g.astype(jnp.float32) for g in gradients]), dx

    zeros = [jnp.zeros(held_values[i].shape, jnp.float32) for i in wanted]
    (total, gradients), dx = _scan_chunks(
        chunk, cut, hidden.value, order, targets, weights, (jnp.float32(0), zeros)
    )
    # Back into the order of the tokens: a gather, where a scatter would add.
    dx = _taken(_unchunked(dx, *cut), jnp.argsort(order), cut[1])
    gradients = [
        g.astype(held_values[i].dtype) for i, g in zip(wanted, gradients, strict=True)
    ]
    filled = dict(zip(wanted, gradients, strict=True))
    return total, (dx, [filled.get(i) for i in range(len(held))])


def _cross_entropy_bwd(head, cut, residuals, ct):
    del head, cut
    if residuals is None or isinstance(ct, SymbolicZero):
        return None, None, None, None, None
    dx, gradients = residuals
    gradients = [None if g is None else g * ct.astype(g.dtype) for g in gradients]
    return dx * ct.astype(dx.dtype), gradients, None, None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd, symbolic_zeros=True)


def _scan_chunks(chunk, cut, hidden, order, targets, weights, zero):
    """Adds up what `chunk(x, target, weight)` gives first, and stacks the second."""
    chunk_size, parts = cut
    indices = _chunks(order.reshape(-1), chunk_size, parts)

    def step(total, rows):
        index, target, weight = rows
        x = _taken(hidden, index.reshape(*order.shape[:-1], -1), parts)
        shapes = jax.eval_shape(chunk, x, target, weight)
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        counts = jnp.any(weight != 0)
        new, kept = lax.cond(counts, lambda: chunk(x, target, weight), lambda: nothing)
        return jax.tree.map(jnp.add, total, new), kept

    return lax.scan(step, zero, (indices, targets, weights))
