"""Models out: Hugging Face folders, dense or in the 4 or 8 bits of bitsandbytes."""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx

from qlora_jax.interop.bitsandbytes import STORAGE_TYPES
from qlora_jax.interop.folder import (
    Entry,
    Form,
    copy_along,
    host_array,
    write_folder,
)
from qlora_jax.interop.safetensors import read_json
from qlora_jax.interop.weights import expected_shapes, hf_name
from qlora_jax.lora import LoraTensor
from qlora_jax.models.config import LINEAR_WEIGHTS, LlamaConfig
from qlora_jax.models.config_hf import config_from_hf, config_to_hf
from qlora_jax.models.llama import Llama
from qlora_jax.quant import QuantizedTensor

if TYPE_CHECKING:
    from jax.typing import DTypeLike

# Of the config: what the bytes of a model depend on. The other fields may differ.
_STRUCTURE = [
    field.name
    for field in dataclasses.fields(LlamaConfig)
    if field.name
    not in ("rope_scaling", "max_position", "bos_token_id", "eos_token_id")
]


def save_model(
    model: Llama,
    folder: str | os.PathLike[str],
    *,
    quantize: str | None = None,
    double_quant: bool = True,
    storage: str | None = None,
    dequantized: bool = False,
    dtype: "DTypeLike | None" = None,
    source: str | os.PathLike[str] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Saves a model as a folder that transformers, vLLM and `load_model` read.

    The folder holds `config.json` and `model.safetensors`, or shards of it with their
    index. Dense weights are written as they are. Weights in nf4, fp4 and, if a block is
    a row, int8 are written as bitsandbytes stores them, in the bytes they have here, so
    that what was loaded from such a folder goes back without loss. The folder appears
    whole or not at all.

    Args:
        model: without adapters: merge them first, or `save_adapter` them.
        folder: a new folder; its parents are made.
        quantize: "nf4" or "fp4": write the linear weights of the layers in 4 bits, in
            blocks of 64; "int8": in 8 bits, as LLM.int8 does. Weights that are
            quantized already must be of that format.
        double_quant: with "nf4" and "fp4": quantize the scales of the blocks too.
        storage: the type under which the bytes of 4-bit codes are stored: "uint8",
            "bfloat16", "float16", "float32". None: that of `source`, else "uint8".
        dequantized: write quantized weights dense, in `dtype` or the type they had.
        dtype: of what is written dense; None: the type it has.
        source: the folder the model was loaded from. Its config is kept, changed only
            where it must, and tokenizer and generation config are copied.
        shard_bytes: a new file begins before one grows larger; also about what host
            memory this takes.

    Raises:
        ValueError: if a weight has an adapter or cannot be written as asked, named; if
            the folder exists and holds files; or if `source` is of another model.
        NotImplementedError: if the model has no config in Hugging Face's form; then
            `source` can give one.
    """
    config = _config(model, source)
    if storage is None:
        storage = _storage(config)
    form = Form(quantize, double_quant, 64, storage, dequantized, dtype)
    write_folder(
        folder,
        model_entries(model, form),
        form,
        config,
        finish=lambda made: None if source is None else copy_along(source, made),
        shard_bytes=shard_bytes,
    )


def model_entries(model: Llama, form: Form = Form(dequantized=True)) -> list[Entry]:  # noqa: B008, a frozen value
    """Returns the weights of a model under their names in a checkpoint.

    Args:
        model: without adapters.
        form: in which they are to be written; what cannot be is refused here.

    Raises:
        ValueError: if a weight has an adapter or cannot be written so, named.
    """
    entries = []
    for name, where, weight in _weights(model):
        if isinstance(weight, LoraTensor):
            raise ValueError(
                f"{name} has an adapter: call merge_lora(model) first, or save_adapter "
                "to write the adapter alone."
            )
        form.check(name, weight)
        entries.append(_entry(name, where, weight, model.config))
    return entries


@dataclasses.dataclass(frozen=True)
class _Place:
    """Which part of an attribute of the model a tensor of the checkpoint is.

    Attributes:
        layer: the slice of a stack, None if there is none.
        transposed: stored as [out, in], and [in, out] here.
        is_linear: a linear weight of a layer.
    """

    layer: int | None = None
    transposed: bool = False
    is_linear: bool = False


def _weights(model: Llama) -> list[tuple[str, _Place, Any]]:
    """The weights under their names in a checkpoint, in the order of its layers."""

    def value(module: Any, attribute: str) -> Any:
        found = getattr(module, attribute)
        return found.get_value() if isinstance(found, nnx.Variable) else found

    weights = {
        "model.embed_tokens.weight": (_Place(), value(model, "embed")),
        "model.norm.weight": (_Place(), value(model, "norm")),
    }
    if not model.config.tie_embeddings:
        head = value(model, "lm_head")
        weights["lm_head.weight"] = (_Place(transposed=True), head)
    expected = expected_shapes(model.config)
    for attribute in vars(model.layers):
        name = hf_name(attribute)
        if name.format(0) in expected:
            linear = attribute in LINEAR_WEIGHTS
            weight = value(model.layers, attribute)
            for i in range(model.config.num_layers):
                weights[name.format(i)] = (_Place(i, linear, linear), weight)
    return [(name, *weights[name]) for name in expected]


def _entry(name: str, place: _Place, weight: Any, config: LlamaConfig) -> Entry:
    def read() -> Any:
        one = weight if place.layer is None else weight[place.layer]
        if isinstance(one, QuantizedTensor):
            return one
        return host_array(one, transposed=place.transposed)

    return Entry(name, expected_shapes(config)[name], place.is_linear, read)


def _storage(config: dict[str, Any]) -> str:
    """The type codes are stored under in the folder a model came from."""
    quantization = config.get("quantization_config")
    found = isinstance(quantization, dict) and quantization.get(
        "bnb_4bit_quant_storage"
    )
    return found if isinstance(found, str) and found in STORAGE_TYPES else "uint8"


def _config(model: Llama, source: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Returns the config.json of the model, its types as they were."""
    if source is None:
        return config_to_hf(model.config)
    config = read_json(pathlib.Path(source) / "config.json")
    theirs, ours = config_from_hf(config), model.config
    for field in _STRUCTURE:
        if getattr(theirs, field) != getattr(ours, field):
            raise ValueError(
                f"{source} is of another model: {field}={getattr(theirs, field)!r}, "
                f"and of this one {getattr(ours, field)!r}."
            )
    if not np.allclose(theirs.rope_frequencies(), ours.rope_frequencies(), rtol=1e-4):
        raise ValueError(f"{source} is of another model: its rotary scaling differs.")
    return config
