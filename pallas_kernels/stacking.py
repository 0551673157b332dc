"""Several weights decoded into one array, which a single product then multiplies by.

Products of the same activations are one product with the weights under each other:
fewer and larger, and no sum of results that are as wide as the activations. Room beside
or under the weights takes what else is to be added up in the same product.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import reference, tuning
from pallas_kernels.packed import PackedSpec, PackedWeight


def are_decoded_first(
    weights: Sequence[PackedWeight], specs: Sequence[PackedSpec], m: int, dtype
) -> bool:
    """Whether products of `m` rows with these weights decode them to memory first.

    Only then does stacking them cost nothing. Where there are several devices each has
    its shard, which is multiplied by itself.
    """
    if jax.device_count() > 1 or len({spec.k for spec in specs}) > 1:
        return False
    return all(
        tuning.preference(op, m, dtype, packed, spec)[0] == "two_pass"
        for packed, spec in zip(weights, specs, strict=True)
        for op in ("matmul", "matmul_dx")
    )


def stacked(
    weights: Sequence[PackedWeight],
    specs: Sequence[PackedSpec],
    dtype,
    *,
    beside: jax.Array | None = None,
    below: jax.Array | None = None,
) -> jax.Array:
    """Returns [W_0; W_1; ...], decoded.

    Args:
        weights: of one width k.
        specs: what the arrays of each mean.
        dtype: bfloat16, float16 or float32.
        beside: [sum of n, r], further columns.
        below: [r, k], further rows.

    Returns:
        [sum of n, k], and r more columns or rows.

    Raises:
        ValueError: if both are given.
    """
    if beside is not None and below is not None:
        raise ValueError("Give what stands beside the weights or below them, not both.")
    n, k = sum(spec.n for spec in specs), specs[0].k
    rows = n + (0 if below is None else below.shape[0])
    columns = k + (0 if beside is None else beside.shape[1])
    whole = _decoded(weights, specs, (rows, columns), dtype)
    # In place: nothing else looks at the decoded weights.
    if beside is not None:
        whole = lax.dynamic_update_slice(whole, beside.astype(dtype), (0, k))
    if below is not None:
        whole = lax.dynamic_update_slice(whole, below.astype(dtype), (n, 0))
    return whole


def _decoded(weights, specs, shape, dtype) -> jax.Array:
    """The weights in the corner of an array; what else is in it is not defined."""
    if tuning.has_hopper():
        from pallas_kernels import quantize_kernel  # the GPU part of Pallas

        try:
            return quantize_kernel.dequantize_rows(weights, specs, shape, dtype)
        except NotImplementedError:
            pass
    decoded = [
        reference.dequantize(packed, spec, dtype)
        for packed, spec in zip(weights, specs, strict=True)
    ]
    return lax.dynamic_update_slice(
        jnp.zeros(shape, dtype), jnp.concatenate(decoded), (0, 0)
    )
