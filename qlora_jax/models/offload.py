"""Layers of which the host's memory keeps what the backward pass starts from.

Between the passes the input of a layer, its q, k, v and its residual stream in the
middle are on the host. In the forward pass they leave as soon as they are computed. In
the backward pass those of a layer arrive while the layer after it is computed:

    forward    y, kept = layer(x);   host[l] = x, kept
    backward   ahead = host[l - 1];  dx = the pullback of layer at x, kept, of dy

A loop of JAX with a policy of `jax.checkpoint` would ask for them when it needs them,
and wait.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# From a value, or several, and their name to them: what may be kept goes through it.
Keep = Callable[[Any, str], Any]
# From the input, a slice of the stack and `Keep` to the output.
KeepingLayer = Callable[[jax.Array, Any, Keep], jax.Array]

# Of q, k and v, [b, t, h or k, c].
_HEADS = 2


class _Kept(NamedTuple):
    """What is kept of a layer: what takes long to compute and little to copy.

    Attributes:
        x: [b, t, d], its input.
        qkv: [b, t, h + 2k, c], one array, since one copy waits for another.
        residual: [b, t, d] or [b * t, d], what the MLP is added to.
    """

    x: jax.Array
    qkv: jax.Array
    residual: jax.Array


def run_offloaded(layer: KeepingLayer, x: jax.Array, stack: Any) -> jax.Array:
    """Applies stacked layers, between whose passes little is left on the device.

    Args:
        layer: (x, slice of the stack, keep) -> x. It goes on with what keep((q, k, v),
            "qkv") and keep(x, "residual") return, and closes over no array that has a
            gradient.
        x: the input of the first layer.
        stack: a tree of arrays [layers, ...].
    """
    leaves, treedef = jax.tree.flatten(stack)

    def apply(x, slices, keep):
        return layer(x, treedef.unflatten(slices), keep)

    @jax.custom_vjp
    def run(x, leaves):
        def body(x, slices):
            return apply(x, slices, lambda value, name: value), None

        return lax.scan(body, x, leaves)[0]

    def run_fwd(x, leaves):
        # What nobody asks a gradient of has none computed.
        trained = [s.value if s.perturbed else None for s in leaves]
        x, leaves = x.value, [s.value for s in leaves]
        y, last, host = _forward(apply, x, leaves)
        return y, (last, host, leaves, trained)

    def run_bwd(residuals, dy):
        last, host, leaves, trained = residuals
        return _backward(apply, last, host, leaves, trained, dy)

    run.defvjp(run_fwd, run_bwd, symbolic_zeros=True)
    return run(x, leaves)


def _forward(apply, x, leaves):
    """The output, what the last layer keeps, and on the host what each does."""

    def body(carry, _):
        number, x, _ = carry
        slices = [_row(leaf, number) for leaf in leaves]
        values: dict[str, Any] = {}

        def keep(value: Any, name: str) -> Any:
            values[name] = value
            return value

        y = apply(x, slices, keep)
        qkv = jnp.concatenate(values["qkv"], axis=_HEADS)
        kept = _Kept(x, qkv, values["residual"])
        return (number + 1, y, kept), jax.tree.map(_to_host, kept)

    shapes = jax.eval_shape(lambda: body((jnp.int32(0), x, None), None)[0][2])
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    start = (_opaque(0), x, nothing)
    (_, y, last), host = lax.scan(body, start, length=len(leaves[0]))
    return y, last, host


def _backward(apply, last, host, leaves, trained, dy):
    """The gradients of the input and of the trained leaves, given that of the output.

    Args:
        apply: (x, slices, keep) -> x.
        last: what the last layer keeps.
        host: what each layer keeps.
        leaves: of the stack.
        trained: the same, None for those without a gradient.
        dy: the gradient of the output.
    """
    count = len(host.x)

    def back(number, dy, kept, arriving, gradients):
        """Through a layer; also what arrives, when it has, and all gradients."""
        slices = [_row(leaf, number) for leaf in leaves]
        own = [None if t is None else s for t, s in zip(trained, slices, strict=True)]

        def of_trained(x, own, arriving):
            pairs = zip(own, slices, strict=True)
            whole = [s if o is None else o for o, s in pairs]
            return apply(x, whole, _instead_of_computing(kept, arriving))

        pull = jax.vjp(of_trained, kept.x, own, arriving)[1]
        dx, rows, arriving = pull(dy)
        put = functools.partial(_put, index=number)
        return dx, arriving, jax.tree.map(put, gradients, rows)

    # Not `lax.scan`: XLA copies a row of the host's memory only where it can follow how
    # the row's number comes from that of the iteration.
    def body(state):
        i, number, dy, kept, gradients = state
        below = count - 2 - i
        ahead = jax.tree.map(lambda stack: _to_device(_row(stack, below)), host)
        arriving = (ahead.x, ahead.residual)
        dy, (x, residual), gradients = back(number, dy, kept, arriving, gradients)
        return i + 1, number - 1, dy, _Kept(x, ahead.qkv, residual), gradients

    zeros = jax.tree.map(jnp.zeros_like, trained)
    state = (jnp.int32(0), _opaque(count - 1), dy, last, zeros)
    state = lax.while_loop(lambda state: state[0] < count - 1, body, state)
    # The first layer has none below it that would have to arrive.
    _, number, dy, kept, gradients = state
    dx, _, gradients = back(number, dy, kept, (), gradients)
    return dx, gradients


def _instead_of_computing(kept: _Kept, arriving: Any) -> Keep:
    """Gives a layer what is kept, in whose place nothing is computed then."""

    def keep(value: Any, name: str) -> Any:
        if name == "residual":
            return _kept_residual(value, kept.residual, arriving)
        if name == "qkv":
            ends = np.cumsum([y.shape[_HEADS] for y in value])[:-1]
            parts = jnp.split(kept.qkv, ends, axis=_HEADS)
            return tuple(map(_kept, value, parts))
        return value

    return keep


@jax.custom_vjp
def _kept(computed, kept):
    """What is kept, with the gradient of what is computed."""
    del computed
    return kept


_kept.defvjp(lambda computed, kept: (kept, None), lambda _, d: (d, None))


@jax.custom_vjp
def _kept_residual(computed, kept, arriving):
    """As `_kept`; where its gradient is there, `arriving` has arrived.

    A compiler knows little of how long a copy takes, and would begin all of them when
    the layer is almost done. So two thirds have to be there when the MLP's gradients
    are: they begin before, and the last third then. The gradient of `arriving` is
    `arriving` itself, after that.
    """
    del computed, arriving
    return kept


def _kept_residual_bwd(arriving, d):
    d, arriving = lax.optimization_barrier((d, arriving))
    return d, None, arriving


_kept_residual.defvjp(
    lambda computed, kept, arriving: (kept, arriving), _kept_residual_bwd
)


def _opaque(number: int) -> jax.Array:
    """A number that a compiler does not know.

    A loop that counts layers from it slices stacks by its kernels. Where XLA knows what
    row it is, it copies the row on one of four streams, and whoever reads it waits
    behind what travels to or from the host on that one.
    """
    return lax.optimization_barrier(jnp.int32(number))


def _row(stack: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(
        stack, index, keepdims=False, allow_negative_indices=False
    )


def _put(stack: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(
        stack, row, index, 0, allow_negative_indices=False
    )


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Host)


def _to_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)
