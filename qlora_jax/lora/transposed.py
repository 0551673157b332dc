"""The second matrix of an adapter, as the kernel that adds the adapter's part reads it.

It wants bᵀ by rows. b is mostly a slice of a stack of all layers' and of float32. XLA
chooses how arrays lie in memory, and a slice lies as its stack does; so it would lay
the stack out transposed before a loop over layers begins, 0.33 GB of Llama-3-8B's at
rank 64, and hold it to the end.
"""

from typing import Any

from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels import tuning


def transposed(b: Any) -> Any:
    """Returns bᵀ for b `[r, n]`; on one Hopper GPU of a b that lies by rows itself."""
    if tuning.has_one_hopper():
        b = with_layout_constraint(b, Layout((0, 1)))
    return b.T
