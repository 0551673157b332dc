"""What a training step will take, counted before anything is loaded."""

import dataclasses
import math

import numpy as np

from qlora_jax.models import LlamaConfig
from qlora_jax.models.inputs import LARGE
from qlora_jax.optim.pages import PAGE_SIZE, plan_pages
from qlora_jax.quant import FORMATS
from qlora_jax.train import TrainConfig

_BLOCK, _NESTED_BLOCK = 64, 256
# As `models.llama` cuts a recomputed MLP.
_MLP_ROWS = 4096
# Bytes of optimizer state a trained number, by `TrainConfig.algorithm`.
_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.03, "lion8bit": 1.02}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What a step takes, item by item, in bytes.

    Attributes:
        device: what is on the device at the moment when most is.
        host: what is in the host's memory for the whole run.
    """

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_gb(self) -> float:
        """Bytes on the device, in 1e9."""
        return sum(self.device.values()) / 1e9

    @property
    def host_gb(self) -> float:
        """Bytes on the host, in 1e9."""
        return sum(self.host.values()) / 1e9

    def __str__(self) -> str:
        lines = []
        for place, items in (("device", self.device), ("host", self.host)):
            lines += [
                f"{name:<34} {size / 1e9:8.2f} GB" for name, size in items.items()
            ]
            lines.append(f"{'on the ' + place:<34} {sum(items.values()) / 1e9:8.2f} GB")
        return "\n".join(lines)


def plan_memory(
    config: LlamaConfig,
    train: TrainConfig | None = None,
    *,
    quantize: str | None = "nf4",
    double_quant: bool = True,
    dtype: str = "bfloat16",
    paged: bool = True,
    lean: bool = False,
) -> MemoryPlan:
    """Returns what finetuning a model will take of the device and of the host.

    Counted, not tried: weights and optimizer state exactly, activations by what the
    policy of rematerialisation keeps of a layer, and what the backward of one layer, or
    a chunk of the loss, has in memory at a time. What XLA's own buffer assignment
    reports for an H200 is within 0.05 GB of it for one row of 512 tokens, within 3 %
    for long ones (tests/test_plan.py); docs/performance.md has the allocator's peaks.

    Args:
        config: the model's shape.
        train: rank, rows of a batch, tokens of a row, what is recomputed.
        quantize: the format of the frozen linear weights; None for `dtype`.
        double_quant: whether their scales are quantized too.
        dtype: of embeddings, norms and activations.
        paged: optimizer state on the host, as by `paged`; else on the device.
        lean: adapters and gradients in `dtype` and float32 masters in the state, as by
            `with_master`, and the state of AdamW paged in slices (`slice_leaves`); else
            float32 adapters and gradients, and their state in pages of whole leaves.

    Raises:
        ValueError: if there is no such format, or an adapter of that rank has no place
            beside one of the weights.
    """
    train = TrainConfig() if train is None else train
    width = _itemsize(dtype)
    linear = config.linear_shapes()
    _check_rank(linear, train.rank)
    numbers = config.num_layers * sum(k * n for k, n in linear.values())
    trained = _adapter_numbers(config, train.rank)
    tied = 1 if config.tie_embeddings else 2
    norms = (2 * config.num_layers + 1) * config.hidden_size
    embeddings = tied * config.vocab_size * config.hidden_size

    adapter_bytes = width if lean else 4
    state = trained * (_STATE_BYTES[train.algorithm] + (4 if lean else 0))
    kept, on_host = _kept_activations(config, train, width)
    loss = _loss_bytes(config, train, width) + _last_layer_bytes(config, train, width)
    working = max(_layer_bytes(config, train, width), loss)
    during_layers = kept + working
    if _one_by_one(train):
        # Gradients come as activations go, and the most is there before the first.
        during_layers -= trained * adapter_bytes
    device = {
        f"frozen weights, {quantize or dtype}": _frozen(numbers, quantize, double_quant)
        if quantize
        else numbers * width,
        f"embeddings and norms, {dtype}": (embeddings + norms) * width,
        "adapters": trained * adapter_bytes,
        "gradients": trained * adapter_bytes,
    }
    host = {}
    if train.accumulate > 1:
        device["gradients of a part"] = trained * adapter_bytes
    if paged:
        host["optimizer state"] = int(state)
        # Pages come when the activations are gone.
        page = _page_bytes(config, train, adapter_bytes, lean)
        device["activations, or pages of state"] = max(during_layers, page)
    else:
        device["optimizer state"] = int(state)
        device["activations"] = during_layers
    if on_host:
        host["activations"] = on_host
    return MemoryPlan({k: int(v) for k, v in device.items()}, host)


def _check_rank(linear: dict[str, tuple[int, int]], rank: int) -> None:
    """As `add_lora` asks it of the weights themselves."""
    name, (n_in, n_out) = min(linear.items(), key=lambda item: min(item[1]))
    if rank > min(n_in, n_out):
        raise ValueError(
            f"{rank=} of {name!r} must be from 1 to {min(n_in, n_out)}, the smaller "
            f"side of its shape {[n_in, n_out]}."
        )


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _frozen(numbers: int, quantize: str, double_quant: bool) -> int:
    if quantize not in FORMATS:
        raise ValueError(
            f"{quantize=} is no format; there are {', '.join(sorted(FORMATS))}."
        )
    blocks = numbers / _BLOCK
    scales = blocks * (1 + 4 / _NESTED_BLOCK) if double_quant else blocks * 4
    return int(numbers * FORMATS[quantize].bits / 8 + scales)


def _adapter_numbers(config: LlamaConfig, rank: int) -> int:
    sizes = sum(k + n for k, n in config.linear_shapes().values())
    return config.num_layers * rank * sizes


def _tokens(train: TrainConfig) -> int:
    return train.batch_size // train.accumulate * train.seq_len


def _kept_activations(
    config: LlamaConfig, train: TrainConfig, width: int
) -> tuple[int, int]:
    """Bytes that all layers together keep for the backward: on the device, on the host.

    The names are those of `models.remat`.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    attention = heads * width + config.num_heads * 4  # and a sum for each query
    low_rank = len(config.linear_shapes()) * train.rank
    tokens, layers = _tokens(train), config.num_layers
    match train.remat:
        case "none":
            numbers = 2 * hidden + qkv + 2 * inner + low_rank
            return layers * tokens * (numbers * width + attention), 0
        case "attention":
            return layers * tokens * (hidden * width + attention), 0
        case "full":
            return layers * tokens * hidden * width, 0
        case "offload":
            return 0, layers * tokens * (2 * hidden + qkv) * width
    raise ValueError(f"{train.remat=} is unknown.")


def _one_by_one(train: TrainConfig) -> bool:
    """Whether layers that are computed again are compiled one by one."""
    return train.unroll and train.remat in ("full", "attention")


def _last_layer_bytes(config: LlamaConfig, train: TrainConfig, width: int) -> int:
    """Bytes that the last layer keeps while the loss is computed, beside others'.

    Where layers are compiled one by one it keeps what those of `none` do; not of an MLP
    that is cut.
    """
    if not _one_by_one(train):
        return 0
    one = dataclasses.replace(config, num_layers=1)
    every = dataclasses.replace(train, remat="none")
    kept = _kept_activations(one, every, width)[0]
    kept -= _kept_activations(one, train, width)[0]
    if _mlp_rows(train) < _tokens(train):
        kept -= _tokens(train) * 2 * config.intermediate_size * width
    # And the hidden states that the loss reads, and their gradient.
    return kept + 2 * _tokens(train) * config.hidden_size * width


def _mlp_rows(train: TrainConfig) -> int:
    """Tokens that go through the MLP at a time."""
    tokens = _tokens(train)
    has_room = train.unroll or train.remat == "offload"
    most = 2 * _MLP_ROWS if has_room else _MLP_ROWS
    chunked = train.remat != "none" and tokens % most == 0 and not train.dropout
    return min(tokens, most) if chunked else tokens


def _layer_bytes(config: LlamaConfig, train: TrainConfig, width: int) -> int:
    """Bytes of the backward of one layer."""
    tokens, rows = _tokens(train), _mlp_rows(train)
    # gate, up, the gradient of their product, and those of both, which where arrays are
    # large take the places of others; of the hidden size: the input, q, k, v, what
    # attention gives, two normed, and a gradient.
    in_place = rows * config.intermediate_size >= LARGE and width == 2
    wide = 2 if train.remat == "none" else 3 if in_place else 5
    thin = 4 if train.remat == "none" else 8
    adapters = _adapter_numbers(config, train.rank) // config.num_layers
    return (
        rows * wide * config.intermediate_size * width
        + tokens * thin * config.hidden_size * width
        + adapters * 6  # rounded copies, and gradients on their way
    )


def _loss_bytes(config: LlamaConfig, train: TrainConfig, width: int) -> int:
    """Bytes of a chunk of the loss: float32 logits and the gradient of them."""
    rows = min(train.chunk_size, _tokens(train))
    return rows * config.vocab_size * (4 + width)


def _page_bytes(
    config: LlamaConfig, train: TrainConfig, adapter_bytes: int, lean: bool
) -> int:
    """Bytes of state on the device at a time, less gradients that are gone by then.

    While a page is computed it is there twice, as it was and as it will be. Whole
    leaves come small ones first, and each has its gradient until then. Of slices each
    is a page at most, and new parameters take the room of their gradients.
    """
    if lean and train.algorithm == "adamw":
        return 2 * PAGE_SIZE
    each = _STATE_BYTES[train.algorithm] + (4 if lean else 0)
    sides = [side for shape in config.linear_shapes().values() for side in shape]
    leaves = [config.num_layers * train.rank * side for side in sides]
    states = [math.ceil(leaf * each) for leaf in leaves]
    most, freed = 0, 0
    for page in plan_pages(states, [], PAGE_SIZE):
        most = max(most, 2 * sum(states[i] for i in page.inputs) - freed)
        freed += sum(leaves[i] for i in page.inputs) * adapter_bytes
    return most
