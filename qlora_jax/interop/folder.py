"""Writing a Hugging Face folder: tensors as they come, shard by shard, then the config.

What is written comes as `Entry`s, from a model in memory or from another checkpoint;
a `Form` says what becomes of the weights. Host memory holds one shard.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.atomic import new_folder
from qlora_jax.interop import safetensors
from qlora_jax.interop.bitsandbytes import (
    STORAGE_TYPES,
    quantize_int8,
    to_int8,
    to_state,
)
from qlora_jax.interop.weights import quantize_rows
from qlora_jax.quant import QuantizedTensor, dequantize

# What goes along with a model: files of these names in the folder it came from.
COPIED = (
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
FORMATS = ("nf4", "fp4", "int8")
_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A weight of a checkpoint, not read yet.

    Attributes:
        name: in the checkpoint.
        shape: there, [out, in] of a matrix.
        is_linear: of a layer: what `Form.quantize` is about.
        read: returns the array of that shape, or the QuantizedTensor that stands for
            its transpose.
    """

    name: str
    shape: tuple[int, ...]
    is_linear: bool
    read: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """How weights are written.

    Attributes:
        quantize: "nf4", "fp4" or "int8" (LLM.int8) for the linear weights of the
            layers; None: as they are. Weights that are quantized already must agree.
        double_quant: with "nf4" and "fp4": quantize the scales too.
        block_size: with "nf4" and "fp4": numbers that share a scale.
        storage: the type under which codes of 4 bits are stored; their bytes are the
            same under each: "uint8", "bfloat16", "float16", "float32".
        dequantized: write quantized weights dense.
        dtype: of what is written dense; None: the type it has.

    Raises:
        ValueError: if there is no such form, or the fields contradict each other.
    """

    quantize: str | None = None
    double_quant: bool = True
    block_size: int = 64
    storage: str = "uint8"
    dequantized: bool = False
    dtype: Any = None

    def __post_init__(self):
        if self.quantize is not None and self.dequantized:
            raise ValueError(
                f"quantize={self.quantize!r} and dequantized=True contradict each "
                "other."
            )
        if self.quantize not in (None, *FORMATS):
            raise ValueError(
                f"quantize={self.quantize!r}: bitsandbytes stores 'nf4' and 'fp4' in 4 "
                "bits and 'int8' in 8; other formats have no form in a Hugging Face "
                "folder."
            )
        if self.storage not in STORAGE_TYPES:
            raise ValueError(
                f"storage={self.storage!r} is none of {', '.join(STORAGE_TYPES)}."
            )

    def check(self, name: str, weight: Any) -> None:
        """Refuses a quantized weight that cannot be written in this form."""
        if not isinstance(weight, QuantizedTensor) or self.dequantized:
            return
        kind = kind_of(weight)
        if kind[0] not in FORMATS:
            raise ValueError(
                f"{name} is quantized to {kind[0]!r}, which has no form in a Hugging "
                "Face folder: save with dequantized=True."
            )
        if kind[0] == "int8" and weight.block_size != weight.in_features:
            raise ValueError(
                f"{name} is quantized to 'int8' in blocks of {weight.block_size}, and "
                f"LLM.int8 has one scale for each row, of {weight.in_features}: save "
                "with dequantized=True."
            )
        if self.quantize is not None and kind != self.kind:
            scales = "with" if kind[1] else "without"
            raise ValueError(
                f"{name} is already {kind[0]} {scales} double quantization; "
                f"quantize={self.quantize!r} with double_quant={self.double_quant} "
                "asks for another. Leave quantize out to write it as it is."
            )

    @property
    def kind(self) -> tuple[str | None, bool]:
        """Format and double quantization of what is quantized on the way."""
        is_4bit = self.quantize in ("nf4", "fp4")
        return self.quantize, self.double_quant and is_4bit

    def tensors(
        self, entry: Entry
    ) -> tuple[dict[str, np.ndarray], tuple[str | None, bool] | None]:
        """Returns the tensors of the file that make up a weight, and its kind.

        Raises:
            ValueError: if the weight cannot be written in this form.
        """
        name, weight = entry.name, entry.read()
        self.check(name, weight)
        if isinstance(weight, QuantizedTensor):
            if not self.dequantized:
                return self._quantized(name, weight), kind_of(weight)
            weight = dequantize(weight, self.dtype).T
        elif self.dtype is not None:
            weight = jnp.asarray(weight).astype(self.dtype)
        if not entry.is_linear or self.quantize is None:
            return {name: np.ascontiguousarray(weight)}, None
        if self.quantize == "int8":
            return quantize_int8(np.asarray(weight), name), self.kind
        weight = jnp.asarray(weight)
        quantized, is_finite = quantize_rows(
            weight, self.quantize, self.double_quant, self.block_size, weight.dtype
        )
        if not is_finite:
            raise ValueError(
                f"{name} holds NaN or infinity, and no code stands for it: take the "
                "model from where it came again."
            )
        return self._quantized(name, quantized), self.kind

    def _quantized(self, name: str, weight: QuantizedTensor) -> dict[str, np.ndarray]:
        if weight.format.name == "int8":
            return to_int8(weight, name)
        return to_state(weight, name, storage=self.storage)


def kind_of(weight: QuantizedTensor) -> tuple[str, bool]:
    """Returns a weight's format and whether its scales are quantized too."""
    return weight.format.name, weight.nested_format is not None


def write_folder(
    folder: str | os.PathLike[str],
    entries: Sequence[Entry],
    form: Form,
    config: Mapping[str, Any],
    *,
    finish: Callable[[pathlib.Path], None] = lambda folder: None,
    shard_bytes: int = 5_000_000_000,
    advance: Callable[[Entry], None] = lambda entry: None,
) -> None:
    """Writes a folder, whole or not at all.

    Args:
        folder: a new folder; its parents are made.
        entries: the weights, in the order of the files.
        form: how they are written.
        config: the model's config.json; what it says of types and of quantization is
            replaced by what is written.
        finish: called with the folder in the making, to put other files into it.
        shard_bytes: a new file begins before one grows larger.
        advance: called after each weight.

    Raises:
        ValueError: if the folder exists and holds files, or a weight cannot be written.
    """
    with new_folder(folder) as partial:
        kinds = _write_shards(partial, entries, form, shard_bytes, advance)
        finish(partial)
        write_json(partial / "config.json", _config(config, entries, kinds, form))


def copy_along(source: str | os.PathLike[str], folder: pathlib.Path) -> None:
    """Copies what goes with a model from the folder it came from."""
    for name in COPIED:
        if (pathlib.Path(source) / name).is_file():
            shutil.copyfile(pathlib.Path(source) / name, folder / name)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object as transformers does."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


@dataclasses.dataclass
class _Written:
    """What became of the weights: the kinds of those quantized, the type of one."""

    kinds: dict[str, tuple[str | None, bool]]
    dtype: str


def _write_shards(
    folder: pathlib.Path,
    entries: Sequence[Entry],
    form: Form,
    shard_bytes: int,
    advance: Callable[[Entry], None],
) -> _Written:
    done = _Written({}, "")
    files: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0

    def write() -> None:
        safetensors.write(folder / f"{len(files)}.safetensors", shard)
        files.append(sorted(shard))

    for entry in entries:
        tensors, kind = form.tensors(entry)
        if kind is not None:
            done.kinds[entry.name] = kind
        elif not done.dtype:  # of the embedding, which comes first
            done.dtype = jnp.dtype(tensors[entry.name].dtype).name
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if shard and size + nbytes > shard_bytes:
            write()
            shard, size = {}, 0
        shard |= tensors
        size, total = size + nbytes, total + nbytes
        advance(entry)
    write()
    if len(files) == 1:
        os.replace(folder / "0.safetensors", folder / "model.safetensors")
        return done
    weight_map = {}
    for i, names in enumerate(files):
        # The number of files, which their names tell, is known at the end.
        file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(folder / f"{i}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    parameters = sum(int(np.prod(entry.shape)) for entry in entries)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": weight_map,
    }
    write_json(folder / "model.safetensors.index.json", index)
    return done


def _config(
    config: Mapping[str, Any], entries: Sequence[Entry], done: _Written, form: Form
) -> dict[str, Any]:
    """The config with what it says of types and quantization as it was written."""
    before = config.get("quantization_config")
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    # transformers 5 says dtype, and understands what 4 says.
    config["dtype" if "dtype" in config else "torch_dtype"] = done.dtype
    kinds = set(done.kinds.values())
    if not kinds:
        return config
    if len(kinds) > 1:
        raise ValueError(
            f"The weights are quantized in several ways, {sorted(map(str, kinds))} "
            "(format, double quantization); a folder of bitsandbytes has one for all."
        )
    ((format, double_quant),) = kinds
    is_4bit = format != "int8"
    # Matrices that stay dense must be named; None stands for the head alone.
    dense = [
        entry.name.removesuffix(".weight")
        for entry in entries
        if (entry.name == _HEAD or entry.is_linear) and entry.name not in done.kinds
    ]
    usual = ["lm_head"] if any(entry.name == _HEAD for entry in entries) else []
    config["quantization_config"] = {
        "_load_in_4bit": is_4bit,
        "_load_in_8bit": not is_4bit,
        "bnb_4bit_compute_dtype": _compute_dtype(before, done)
        if is_4bit
        else "float32",
        "bnb_4bit_quant_storage": form.storage if is_4bit else "uint8",
        "bnb_4bit_quant_type": format if is_4bit else "fp4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if dense == usual else dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": is_4bit,
        "load_in_8bit": not is_4bit,
        "quant_method": "bitsandbytes",
    }
    return config


def _compute_dtype(before: Any, done: _Written) -> Any:
    """What the folder it came from asks for, else the type of the dense weights."""
    asked = before.get("bnb_4bit_compute_dtype") if isinstance(before, dict) else None
    return asked if isinstance(asked, str) else done.dtype


def host_array(array: Any, *, transposed: bool) -> np.ndarray:
    """Returns an array in host memory; transposed on the device, which is faster."""
    array = jnp.asarray(array)
    return np.asarray(array.T if transposed else array)
