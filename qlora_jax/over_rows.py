"""The product that gradients of weights are made of."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Float32


def over_rows(
    x: "Float[Array, '*b m']", y: "Float[Array, '*b n']"
) -> "Float32[Array, 'm n']":
    """Returns xᵀ @ y, summed over all leading axes, in float32."""
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(
        x, y, ((rows, rows), ((), ())), preferred_element_type=jnp.float32
    )
