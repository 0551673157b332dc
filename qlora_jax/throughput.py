"""How much of the device a step uses."""

import math
import re
from typing import Any

import jax

from qlora_jax.lora import split_trainable
from qlora_jax.quant import QuantizedTensor

# Dense bfloat16 multiply-adds a second, two operations each, by the makers' datasheets;
# names as in `jax.Device.device_kind`, the more special one first.
_PEAK_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "B100": 1750,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 4080": 97,
    "RTX 3090": 71,
    "TPU v6 lite": 918,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v4": 275,
}


def peak_flops() -> float | None:
    """Returns the peak of the default device in operations a second, None if unknown.

    Of dense bfloat16 matrix products, by the maker's datasheet.
    """
    kind = jax.local_devices()[0].device_kind
    found = [t for name, t in _PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", kind)]
    return found[0] * 1e12 if found else None


def flops_per_token(model: Any) -> int:
    """Returns the operations that training on a token takes, without recomputation.

        4 · frozen + 6 · trained    numbers of the matrices

    Two for each number forward, two for the gradient of its input, and for a trained
    one two more for its own. Attention's products of activations are left out, and so
    is the embedding, which is looked up (if it is the head too, it is multiplied by).

    Args:
        model: with adapters, see `add_lora`.
    """
    trainable, frozen = split_trainable(model)
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(trainable))

    def is_weight(node: Any) -> bool:
        return isinstance(node, QuantizedTensor)

    matrices = 0
    for path, leaf in jax.tree.leaves_with_path(frozen, is_leaf=is_weight):
        looked_up = "embed" in jax.tree_util.keystr(path) and not _is_tied(model)
        if getattr(leaf, "ndim", 0) >= 2 and not looked_up:
            matrices += math.prod(leaf.shape)
    return 4 * matrices + 6 * trained


def _is_tied(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_embeddings", False))
