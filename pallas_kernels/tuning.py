"""Which implementation serves a call: device predicates and measured preferences."""

import jax
import jax.numpy as jnp

from pallas_kernels.implementations import Implementation, Op
from pallas_kernels.packed import PackedSpec, PackedWeight


def compute_capability() -> float | None:
    """Compute capability of the default device, or None where it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, ValueError):  # an AMD GPU names an architecture instead
        return None


def has_hopper() -> bool:
    """Whether the default device is of compute capability 9.x."""
    capability = compute_capability()
    return capability is not None and 9 <= capability < 10


# Rows of x up to which the kernel for few rows is the fastest, and from which the
# product of a decoded weight is. docs/kernels.md has the measurements.
_FEW_ROWS = 16
_MANY_ROWS = 4096


def preference(
    op: Op, m: int, dtype, packed: PackedWeight, spec: PackedSpec
) -> tuple[Implementation, ...]:
    """Returns implementations of `op` in the order to try; the last can always.

    Args:
        op: "matmul" or "matmul_dx".
        m: rows of the activation.
        dtype: of the activation.
        packed: the weight.
        spec: what its arrays mean.
    """
    del packed
    if not has_hopper() or spec.bits != 4 or dtype == jnp.float32:
        return ("xla",)
    if op == "matmul" and m <= _FEW_ROWS:
        return ("matvec", "sm90", "xla")
    if m < _MANY_ROWS:
        return ("sm90", "xla")
    return ("xla",)
