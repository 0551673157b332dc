"""Quantized weights of one input as one matrix, for as long as a product takes."""

import math
from collections.abc import Sequence

import jax

import pallas_kernels
from qlora_jax.quant.tensor import QuantizedTensor


def are_decoded_first(weights: Sequence[QuantizedTensor], x: jax.Array) -> bool:
    """Whether `x @ w` decodes each of these weights to memory, as for many rows.

    Then `stacked` costs no more, and takes one product instead of several.

    Args:
        weights: without stack axes.
        x: what multiplies them, or what has its rows and type.
    """
    return pallas_kernels.are_decoded_first(
        [w.packed for w in weights],
        [w.spec for w in weights],
        math.prod(x.shape[:-1]),
        x.dtype,
    )


def stacked(
    weights: Sequence[QuantizedTensor],
    dtype,
    *,
    beside: jax.Array | None = None,
    below: jax.Array | None = None,
) -> jax.Array:
    """Returns the weights decoded, one row an output feature, under each other.

    Args:
        weights: without stack axes, of as many input features.
        dtype: bfloat16, float16 or float32.
        beside: [rows, r], further columns; or None.
        below: [r, in], further rows; or None.

    Returns:
        [sum of out, in], and r more columns or rows.
    """
    packed, specs = [w.packed for w in weights], [w.spec for w in weights]
    return pallas_kernels.stacked(packed, specs, dtype, beside=beside, below=below)


def transposed_product(dy: jax.Array, w: QuantizedTensor) -> jax.Array:
    """Returns dy @ wᵀ for dy [*batch, out]: the gradient of the x of `x @ w`."""
    return pallas_kernels.quantized_matmul_dx(dy, w.packed, w.spec)
