"""Which implementation serves a call: device predicates and measured preferences."""

import jax
import jax.numpy as jnp

from pallas_kernels.implementations import Implementation
from pallas_kernels.packed import PackedSpec, PackedWeight


def compute_capability() -> float | None:
    """Compute capability of the default device, or None where it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, ValueError):  # an AMD GPU names an architecture instead
        return None


def preference(
    op: str, m: int, dtype, packed: PackedWeight, spec: PackedSpec
) -> tuple[Implementation, ...]:
    """Returns implementations of `op` in the order to try; the last can always.

    Args:
        op: "matmul" or "matmul_dx".
        m: rows of the activation.
        dtype: of the activation.
        packed: the weight.
        spec: what its arrays mean.
    """
    capability = compute_capability()
    if capability is None or spec.bits != 4 or dtype == jnp.float32:
        return ("xla",)
    return ("xla",)
