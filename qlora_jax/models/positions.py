"""Places of tokens in their documents, and the rotation that tells them to attention.

Letters in shapes: b batch, t tokens of a row, h heads, c head dimension.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    Rotation = tuple[Float[Array, "b t c/2"], Float[Array, "b t c/2"]]


def rotate(
    x: "Float[Array, 'b t h c']", rotation: "Rotation"
) -> "Float[Array, 'b t h c']":
    """Turns the pairs (x[i], x[i + c/2]) of each head by the angles of its position."""
    cos, sin = (r[:, :, None] for r in rotation)  # [b, t, 1, c/2]
    x1, x2 = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return turned.astype(x.dtype)


def segment_positions(segment_ids: "Int[Array, 'b t']") -> "Int[Array, 'b t']":
    """Returns the place of each token in its document, counted from 0."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - lax.cummax(jnp.where(first, index, 0), axis=1)


def document_lengths(positions: "Int[Array, 'b t']") -> "Int[Array, 'b t']":
    """Returns how many tokens the document of each token has, up to its last here.

    A document ends where the next position is not the next number. Its length does not
    depend on what else the row or the batch holds.
    """
    count = positions.shape[1]
    goes_on = positions[:, 1:] == positions[:, :-1] + 1
    index = jnp.arange(count, dtype=jnp.int32)
    ends = jnp.where(jnp.pad(goes_on, ((0, 0), (0, 1))), count - 1, index)
    last = lax.cummin(ends, axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1
