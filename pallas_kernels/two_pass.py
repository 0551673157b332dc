"""Products in two passes: a kernel decodes the weight, the library multiplies.

What many rows are measured against: the decoded weight goes through device memory once,
which costs 2.5 bytes a weight, and the product runs at the speed of a dense one. It is
freed right after, and nothing of it is kept for the gradient.
"""

import jax

from pallas_kernels import quantize_kernel, reference
from pallas_kernels.packed import PackedSpec, PackedWeight


def matmul(x: jax.Array, packed: PackedWeight, spec: PackedSpec) -> jax.Array:
    """Returns `x @ W` for x `[m, k]`.

    Raises:
        NotImplementedError: if the kernel cannot decode this weight.
    """
    weight = quantize_kernel.dequantize(packed, spec, x.dtype)
    return reference.dot(x, weight, contract=1)


def matmul_dx(dy: jax.Array, packed: PackedWeight, spec: PackedSpec) -> jax.Array:
    """Returns `dy @ Wᵀ` for dy `[m, n]`.

    Raises:
        NotImplementedError: if the kernel cannot decode this weight.
    """
    weight = quantize_kernel.dequantize(packed, spec, dy.dtype)
    return reference.dot(dy, weight, contract=0)
