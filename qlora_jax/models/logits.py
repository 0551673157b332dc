"""The product of hidden states and the head, in float32."""

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def float32_logits(
    x: "Float[Array, '*b d']",
    weight: "Float[Array, 'd v'] | Float[Array, 'v d']",
    axis: int,
) -> "Float[Array, '*b v']":
    """Returns x @ weight in float32, without a float32 copy of either.

    The backward rounds the gradient of the logits to the type of x, so that it
    multiplies in that type too.

    Args:
        x: hidden states.
        weight: of the head.
        axis: of `weight`, that is multiplied along: 0 for [d, v], 1 for [v, d].
    """
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _logits_fwd(x, weight, axis):
    return float32_logits(x, weight, axis), (x, weight)


def _logits_bwd(axis, residuals, gradient):
    x, weight = residuals
    gradient = gradient.astype(x.dtype)
    contract = (((x.ndim - 1,), (1 - axis,)), ((), ()))
    dx = lax.dot_general(gradient, weight, contract)
    # Not computed where nobody asks for it: the head of a finetuned model is frozen.
    rows = tuple(range(x.ndim - 1))
    pair = (gradient, x) if axis else (x, gradient)
    dw = lax.dot_general(*pair, ((rows, rows), ((), ())))
    return dx, dw.astype(weight.dtype)


float32_logits.defvjp(_logits_fwd, _logits_bwd)
