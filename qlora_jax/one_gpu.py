"""One GPU of a host that has several, and nothing on the others."""

import os
import warnings
from typing import Any

import jax


def use_one_gpu() -> None:
    """Lets JAX see the first visible GPU only.

    JAX takes memory on every GPU that it sees, whatever a program uses, and where it
    sees several, a kernel may be asked to run on a part of its arrays: what cannot is
    left to the compiler then (what products are added to, the gate in place), scales
    are decoded and layers copied in front of each product.

    Call it before anything looks at devices; later it changes nothing. Another GPU is
    chosen as everywhere, by `CUDA_VISIBLE_DEVICES`, of which this takes the first. Who
    has set `JAX_CUDA_VISIBLE_DEVICES` has chosen, and is left alone. Without a GPU it
    does nothing.
    """
    if "JAX_CUDA_VISIBLE_DEVICES" not in os.environ:
        jax.config.update("jax_cuda_visible_devices", "0")


def warn_of_others(arrays: Any) -> None:
    """Warns where these arrays are on one GPU and JAX sees others too."""
    leaves = [x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
    devices = {device for leaf in leaves for device in leaf.devices()}
    count = jax.device_count()
    if jax.default_backend() == "gpu" and len(devices) == 1 and count > 1:
        warnings.warn(
            f"The model is on one GPU and JAX sees {count}, on all of which it takes "
            "memory, and some kernels are left out: call qlora_jax.use_one_gpu() "
            "before anything looks at devices, or set CUDA_VISIBLE_DEVICES.",
            stacklevel=3,
        )
