"""Models out: Hugging Face folders, dense or in the 4 bits of bitsandbytes."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.interop.bitsandbytes import to_state
from qlora_jax.interop.safetensors import read_json
from qlora_jax.interop.weights import expected_shapes, hf_name
from qlora_jax.lora import LoraTensor
from qlora_jax.models.config import (
    LINEAR_WEIGHTS,
    LlamaConfig,
    config_from_hf,
    config_to_hf,
)
from qlora_jax.models.llama import Llama
from qlora_jax.quant import QuantizedTensor, dequantize
from qlora_jax.quant import quantize as quantize_weight

if TYPE_CHECKING:
    from jax.typing import DTypeLike

# What goes along with a model: files of these names in the folder it came from.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
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
    dequantized: bool = False,
    dtype: "DTypeLike | None" = None,
    source: str | os.PathLike[str] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Saves a model as a folder that transformers, vLLM and `load_model` read.

    The folder holds `config.json` and `model.safetensors`, or shards of it with their
    index. Dense weights are written as they are. Weights in nf4 and fp4 are written as
    bitsandbytes stores them, in the bytes they have here, so that what was loaded from
    such a folder goes back without loss. The folder appears whole or not at all.

    Args:
        model: without adapters: merge them first, or `save_adapter` them.
        folder: a new folder; its parents are made.
        quantize: "nf4" or "fp4": write the linear weights of the layers in 4 bits, in
            blocks of 64. Weights that are quantized already must be of that format.
        double_quant: with `quantize`: quantize the scales of the blocks too.
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
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give a new folder.")
    if quantize is not None and dequantized:
        raise ValueError(f"{quantize=} and {dequantized=} contradict each other.")
    if quantize not in (None, "nf4", "fp4"):
        raise ValueError(
            f"{quantize=}: bitsandbytes stores 'nf4' and 'fp4' in 4 bits; other "
            "formats have no form in a Hugging Face folder."
        )
    writer = _Writer(quantize, double_quant, dequantized, dtype)
    weights = _weights(model)
    for name, weight in weights.items():
        writer.check(name, weight)
    config = _merged(_config(model, source), writer.config(weights))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir()
    try:
        _write_json(partial / "config.json", config)
        for name in _COPIED:
            if source is not None and (pathlib.Path(source) / name).is_file():
                shutil.copyfile(pathlib.Path(source) / name, partial / name)
        _write_shards(partial, weights, writer, shard_bytes)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A weight of the model and which layer of it a tensor of the checkpoint is.

    Attributes:
        value: an array or QuantizedTensor, stacked if `layer` is a number.
        layer: the slice, None if there is no stack.
        transposed: stored as [out, in], and [in, out] here.
        linear: of a layer: what `quantize` is about.
    """

    value: Any
    layer: int | None = None
    transposed: bool = False
    linear: bool = False

    def slice(self) -> Any:
        """Returns the one matrix or vector."""
        return self.value if self.layer is None else self.value[self.layer]

    @property
    def size(self) -> int:
        """How many numbers it stands for."""
        size = int(np.prod(self.value.shape))
        return size if self.layer is None else size // self.value.shape[0]


def _weights(model: Llama) -> dict[str, _Weight]:
    """The weights under their names in a checkpoint, in the order of its layers."""

    def value(module: Any, attribute: str) -> Any:
        found = getattr(module, attribute)
        return found.get_value() if isinstance(found, nnx.Variable) else found

    weights = {
        "model.embed_tokens.weight": _Weight(value(model, "embed")),
        "model.norm.weight": _Weight(value(model, "norm")),
    }
    if not model.config.tie_embeddings:
        head = value(model, "lm_head")
        weights["lm_head.weight"] = _Weight(head, transposed=True)
    expected = expected_shapes(model.config)
    for attribute in vars(model.layers):
        name = hf_name(attribute)
        if name.format(0) in expected:
            linear = attribute in LINEAR_WEIGHTS
            for i in range(model.config.num_layers):
                weights[name.format(i)] = _Weight(
                    value(model.layers, attribute), i, linear, linear
                )
    return {name: weights[name] for name in expected}


@dataclasses.dataclass(frozen=True)
class _Writer:
    """How weights become the tensors of a file; the fields are `save_model`'s."""

    quantize: str | None
    double_quant: bool
    dequantized: bool
    dtype: Any

    def check(self, name: str, weight: _Weight) -> None:
        """Refuses what cannot be written, before anything is."""
        value = weight.value
        if isinstance(value, LoraTensor):
            raise ValueError(
                f"{name} has an adapter: call merge_lora(model) first, or save_adapter "
                "to write the adapter alone."
            )
        if not isinstance(value, QuantizedTensor) or self.dequantized:
            return
        form = (value.format.name, value.nested_format is not None)
        if form[0] not in ("nf4", "fp4"):
            raise ValueError(
                f"{name} is quantized to {form[0]!r}, which has no form in a Hugging "
                "Face folder: save with dequantized=True."
            )
        if self.quantize is not None and form != (self.quantize, self.double_quant):
            scales = "with" if form[1] else "without"
            raise ValueError(
                f"{name} is already {form[0]} {scales} double quantization; "
                f"quantize={self.quantize!r} with double_quant={self.double_quant} "
                "asks for another. Leave quantize out to write it as it is."
            )

    def tensors(self, name: str, weight: _Weight) -> dict[str, np.ndarray]:
        """Returns the tensors of the file that make up one weight."""
        value = weight.slice()
        if isinstance(value, QuantizedTensor):
            if not self.dequantized:
                return to_state(value, name)
            value = dequantize(value, self.dtype)
        elif self.dtype is not None:
            value = value.astype(self.dtype)
        if weight.linear and self.quantize is not None:
            quantized = quantize_weight(
                value, self.quantize, double_quant=self.double_quant
            )
            return to_state(quantized, name)
        array = np.asarray(value)
        return {name: np.ascontiguousarray(array.T if weight.transposed else array)}

    def config(self, weights: Mapping[str, _Weight]) -> dict[str, Any]:
        """Returns what the weights as written change in config.json."""
        embed = weights["model.embed_tokens.weight"].value
        dtype = jnp.dtype(embed.dtype if self.dtype is None else self.dtype).name
        if self.quantize is None and not any(
            self._stays_quantized(weight) for weight in weights.values()
        ):
            return {"dtype": dtype, "quantization_config": None}
        forms = {
            (w.value.format.name, w.value.nested_format is not None)
            for w in weights.values()
            if self._stays_quantized(w)
        } or {(self.quantize, self.double_quant)}
        if len(forms) > 1:
            raise ValueError(
                f"The weights are quantized in several ways, {sorted(forms)} (format, "
                "double quantization); a folder of bitsandbytes has one for all."
            )
        ((format, double_quant),) = forms
        # Matrices that stay dense must be named; None stands for the head alone.
        dense = [
            name.removesuffix(".weight")
            for name, w in weights.items()
            if (name == "lm_head.weight" or (w.linear and self.quantize is None))
            and not self._stays_quantized(w)
        ]
        usual = ["lm_head"] if "lm_head.weight" in weights else []
        return {
            "dtype": dtype,
            "quantization_config": {
                "_load_in_4bit": True,
                "_load_in_8bit": False,
                "bnb_4bit_compute_dtype": dtype,
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": format,
                "bnb_4bit_use_double_quant": double_quant,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": None if dense == usual else dense,
                "llm_int8_threshold": 6.0,
                "load_in_4bit": True,
                "load_in_8bit": False,
                "quant_method": "bitsandbytes",
            },
        }

    def _stays_quantized(self, weight: _Weight) -> bool:
        return isinstance(weight.value, QuantizedTensor) and not self.dequantized


def _config(model: Llama, source: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Returns the config.json of the model, without what `_Writer.config` says."""
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


def _merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    # transformers 5 says dtype, and understands what 4 says.
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = changes["dtype"]
    if changes["quantization_config"] is not None:
        config["quantization_config"] = changes["quantization_config"]
    return config


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def _shards(
    writer: _Writer, weights: Mapping[str, _Weight], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the tensors file by file; a weight's tensors stay together."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, weight in weights.items():
        tensors = writer.tensors(name, weight)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard |= tensors
        size += nbytes
    yield shard


def _write_shards(
    folder: pathlib.Path,
    weights: Mapping[str, _Weight],
    writer: _Writer,
    shard_bytes: int,
) -> None:
    import safetensors.numpy

    written: list[list[str]] = []
    total = 0
    for i, shard in enumerate(_shards(writer, weights, shard_bytes)):
        # The metadata without which transformers refuses a file.
        safetensors.numpy.save_file(
            shard, folder / f"{i}.safetensors", metadata={"format": "pt"}
        )
        written.append(sorted(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(written) == 1:
        os.replace(folder / "0.safetensors", folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(written):
        # The number of files, which their names tell, is known at the end.
        file = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        os.replace(folder / f"{i}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    parameters = sum(weight.size for weight in weights.values())
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": weight_map,
    }
    _write_json(folder / "model.safetensors.index.json", index)
