"""The adapter's part of a product: dropout(x) @ a @ b * scale."""

import functools
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.lora.transposed import transposed
from qlora_jax.quant import quantized_matmul

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32, Key

# Any: an array, a tracer or a ShapeDtypeStruct.
Leaf = Any

# Columns of a product that cost about as much as one on a CPU.
_TILE = 128
# On a GPU: ranks up to which adapters are gathered.
_SMALL_RANK = 16

# From x and a weight [in, out] to their product.
Product = Callable[[Any, Any], Any]


def low_rank(
    x: Leaf,
    a: Leaf,
    b: Leaf,
    key: Leaf,
    ids: Leaf,
    *,
    scale: float,
    rate: float,
    project: Product,
    expand: Product,
) -> Leaf:
    """dropout(x) @ a @ b * scale in the dtype of x, a and b by row if there are ids."""
    x, a, b = gradients_together(x, a, b)
    dropped, a, b = _prepared(x, a, b, key, scale, rate)
    if ids is None:
        # Thin, and what a policy of rematerialisation had better keep.
        return expand(checkpoint_name(project(dropped, a), "low_rank"), b)
    if ids.ndim == 0:
        a, b = one_of(a, b, ids)
        return expand(project(dropped, a), b)
    return _by_row(dropped, a, b, ids, project, expand)


def low_rank_onto(
    x: Leaf, w: Leaf, a: Leaf, b: Leaf, key: Leaf, *, scale: float, rate: float
) -> Leaf:
    """Returns x @ w + dropout(x) @ a @ b * scale, w quantized, as one product."""
    for_adapter, a, b = gradients_together(x, a, b)
    dropped, a, b = _prepared(for_adapter, a, b, key, scale, rate)
    h = checkpoint_name(dropped @ a, "low_rank")
    return quantized_matmul(x, w, addend=(h, transposed(b)))


def _prepared(x, a, b, key, scale, rate):
    """Dropout(x), and a and b in its dtype, b with the scale."""
    if key is not None:
        x, probability = dropout(x, key, rate=rate)
        scale = scale / probability
    # The scale goes onto b in float32: one rounding, and no pass over the rows.
    return x, a.astype(x.dtype), (b * scale).astype(x.dtype)


def low_rank_together(
    x: Leaf, a: list[Leaf], b: list[Leaf], *, scales: list[float]
) -> list[Leaf]:
    """Returns x @ a_i @ b_i * scale_i, the first products as one."""
    x, a, b = gradients_together(x, a, b)
    h = x @ jnp.concatenate([one.astype(x.dtype) for one in a], axis=-1)
    h = checkpoint_name(h, "low_rank")
    ends = np.cumsum([one.shape[-1] for one in a])[:-1]
    parts = jnp.split(h, ends, axis=-1)
    return [
        part @ (one * scale).astype(x.dtype)
        for part, one, scale in zip(parts, b, scales, strict=True)
    ]


@jax.custom_vjp
def gradients_together(x: Leaf, a: Leaf, b: Leaf) -> tuple[Leaf, Leaf, Leaf]:
    """Returns its arguments, whose gradients are computed at one time.

    Nothing waits for the gradients of a and b, so a compiler may leave them to the end,
    and keep in memory until then what they are computed from: the activations of every
    layer on both sides. Here the gradient of x waits for them.
    """
    return x, a, b


gradients_together.defvjp(
    lambda x, a, b: ((x, a, b), None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)


def one_of(a: Leaf, b: Leaf, ids: Leaf) -> tuple[Leaf, Leaf]:
    """Returns the `a` and `b` of each id: -1 has a zero `b`, an unknown one NaN."""
    # A negative id would count from the end; it means the base alone.
    take = functools.partial(
        jnp.take, indices=jnp.maximum(ids, 0), axis=0, mode="fill", fill_value=jnp.nan
    )
    b = take(b)
    return take(a), jnp.where(ids[..., None, None] < 0, jnp.zeros_like(b), b)


def _by_row(
    x: Leaf, a: Leaf, b: Leaf, ids: Leaf, project: Product, expand: Product
) -> Leaf:
    """Each row of x with its own adapter."""
    several, _, rank = a.shape
    tokens = math.prod(x.shape[1:-1])
    if project is not operator.matmul or prefers_masked(len(x), tokens, several, rank):
        return masked(x, a, b, ids, project, expand)
    return gathered(x, a, b, ids)


def prefers_masked(
    rows: int, tokens: int, several: int, rank: int, *, platform: str | None = None
) -> bool:
    """Whether `masked` is expected to be faster than `gathered`; docs/lora.md.

    On a GPU `masked` lays all adapters out as columns once, slowly for small ranks, and
    multiplies every token by all of them; `gathered` moves the adapters of all rows
    three times. In microseconds by rank * (in + out), measured on an H200:

        masked:    several * (1.2e-6 + rows * tokens * 3.3e-9)
        gathered:  rows * 2.4e-6

    Args:
        rows: of the batch.
        tokens: of a row.
        several: adapters.
        rank: of each.
        platform: None: that of the default device.
    """
    if (platform or jax.default_backend()) != "gpu":
        return several * rank <= _TILE
    return rank > _SMALL_RANK and several * (1 + rows * tokens / 360) < 2 * rows


def gathered(
    x: "Float[Array, 'rows *batch in']",
    a: "Float[Array, ' adapters in rank']",
    b: "Float[Array, 'adapters rank out']",
    ids: "Int32[Array, ' rows']",
) -> "Float[Array, 'rows *batch out']":
    """Returns `x[i] @ a[ids[i]] @ b[ids[i]]`: each row takes a copy of its adapter.

    Args:
        x: activations.
        a: of all adapters, in the type of x.
        b: likewise, scaled.
        ids: -1 gives zero, an id that does not exist NaN.
    """
    a, b = one_of(a, b, ids)
    h = jnp.einsum("n...i,nir->n...r", x, a)
    return jnp.einsum("n...r,nro->n...o", h, b)


def masked(
    x: "Float[Array, 'rows *batch in']",
    a: "Float[Array, ' adapters in rank']",
    b: "Float[Array, 'adapters rank out']",
    ids: "Int32[Array, ' rows']",
    project: Product = operator.matmul,
    expand: Product = operator.matmul,
) -> "Float[Array, 'rows *batch out']":
    """Returns what `gathered` does, every row multiplied by all adapters at once.

        x @ [a_0 a_1 ...], the parts of others than the row's set to zero, @ [b_0; ...]

    No copy of a and b is made for each row, and the columns fill tiles that would be
    mostly empty for one adapter.

    Args:
        x: activations.
        a: of all adapters, in the type of x.
        b: likewise, scaled.
        ids: -1 gives zero, an id that does not exist NaN.
        project: instead of the product with a; may give other axes behind the rows.
        expand: instead of the product with b.
    """
    several, n_in, rank = a.shape
    columns = jnp.moveaxis(a, 0, 1).reshape(n_in, several * rank)
    h = project(x, columns)
    h = h.reshape(*h.shape[:-1], several, rank)
    own = ids[:, None] == jnp.arange(several, dtype=ids.dtype)  # [rows, several]
    own = own.reshape(own.shape[0], *(1,) * (h.ndim - 3), several, 1)
    h = jnp.where(own, h, jnp.zeros_like(h))
    h = h.reshape(*h.shape[:-2], several * rank)
    y = expand(h, b.reshape(several * rank, -1))
    unknown = (ids >= several).reshape(-1, *(1,) * (y.ndim - 1))
    return jnp.where(unknown, jnp.full_like(y, jnp.nan), y)


def dropout(
    x: "Float[Array, '*batch in']", key: "Key[Array, '']", *, rate: float
) -> "tuple[Float[Array, '*batch in'], float]":
    """Zeroes each number with probability `rate`.

    The mask takes one random byte a number, a quarter of the random words that one
    draw for each would: the rate is rounded to a multiple of 1/256 (0.05 to 0.0508).

    Args:
        x: activations.
        key: a typed key; the mask is a function of it and of the shape.
        rate: the probability of zero, in [0, 1).

    Returns:
        An array like `x`, not yet scaled, and the probability of being kept, as
        rounded: what to divide by for the mean to be that of `x`.
    """
    threshold = round(rate * 256)
    *batch, n = x.shape
    # Words by row, so that a sharded batch draws its own.
    words = jax.random.bits(key, (*batch, -(-n // 4)), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8)  # [*batch, words, 4]
    kept = draws.reshape(*batch, -1)[..., :n] >= threshold
    return jnp.where(kept, x, jnp.zeros_like(x)), 1 - threshold / 256
