"""GGUF files: header, tensors, and the model and tokenizer they describe.

The container is read here rather than by the `gguf` package because every length,
offset and type in it is checked against the file before anything is allocated, and
because reading a model must work on the core dependencies. That package is the oracle
of the tests. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import os
import pathlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_jax.interop.ggml import TENSOR_TYPES, TensorType
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.rope import RopeScaling

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"} | {
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9

# architecture: its name in Hugging Face, and whether rows of q and k are permuted: the
# "llama" converter stores the pairs of a rotation side by side, others keep halves.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", True),
    "qwen2": ("Qwen2ForCausalLM", False),
    "qwen3": ("Qwen3ForCausalLM", False),
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file: row-major `shape`, `offset` in bytes."""

    shape: tuple[int, ...]
    type: TensorType
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) // self.type.block_size * self.type.block_bytes


class _Header:
    """Reads numbers from the front of a file, refusing to leave it."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str, repair: str = "download it again") -> ModelFileError:
        return ModelFileError(f"{self.path}: {what}; {repair}.")

    def take(self, count: int) -> int:
        """Returns the place of the next `count` bytes and steps over them."""
        if count > len(self.data) - self.at:
            raise self.fail(
                f"the header wants {count} bytes at {self.at} of {len(self.data)}: the "
                "file is truncated or damaged"
            )
        self.at += count
        return self.at - count

    def scalar(self, kind: str) -> Any:
        layout = f"<{kind}"
        return struct.unpack_from(
            layout, self.data, self.take(struct.calcsize(layout))
        )[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the text at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise self.fail(f"value type {kind} at byte {self.at} is not known")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            layout = f"<{_SCALARS[kind]}"
            start = self.take(count * struct.calcsize(layout))
            return np.frombuffer(self.data, layout, count, start).tolist()
        if kind != _STRING:
            raise self.fail(f"array of value type {kind} at byte {self.at}")
        if count > (len(self.data) - self.at) // 8:
            raise self.fail(f"an array of {count} texts at {self.at} leaves the file")
        return [self.string() for _ in range(count)]


class GGUFFile:
    """A GGUF file, mapped into memory; its header is read and checked.

    Attributes:
        path: the file.
        metadata: keys and values of the header.
        tensors: name -> `TensorInfo`.

    Raises:
        ModelFileError: if the file is missing, truncated or inconsistent.
        NotImplementedError: if a tensor is of a type that is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise ModelFileError(f"{self.path} is not a file.")
        with open(self.path, "rb") as file:
            if (first := file.read(4)) != b"GGUF":
                raise ModelFileError(
                    f"{self.path} is not a GGUF file, it begins with {first!r}: give a "
                    ".gguf file, or a folder with config.json."
                )
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _Header(self.path, self._data)
        header.take(4)
        version = header.scalar("I")
        if version not in (2, 3):
            raise header.fail(
                f"GGUF version {version}, and versions 2 and 3 are read",
                "convert the model again with a newer llama.cpp",
            )
        tensor_count, pair_count = header.scalar("Q"), header.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = header.string()
            self.metadata[key] = header.value(header.scalar("I"))
        infos = [self._tensor_info(header) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise header.fail(f"general.alignment is {alignment!r}")
        start = -(-header.at // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in infos:
            info = dataclasses.replace(info, offset=start + info.offset)
            if name in self.tensors:
                raise header.fail(f"tensor {name} occurs twice")
            if info.offset + info.nbytes > len(self._data):
                raise header.fail(
                    f"tensor {name} ends at byte {info.offset + info.nbytes}, the file "
                    f"at {len(self._data)}: it is truncated"
                )
            self.tensors[name] = info

    def _tensor_info(self, header: _Header) -> tuple[str, TensorInfo]:
        name, rank = header.string(), header.scalar("I")
        if rank > 4:
            raise header.fail(f"tensor {name} has {rank} axes")
        # The header counts the fastest axis first.
        shape = tuple(header.scalar("Q") for _ in range(rank))[::-1]
        code, offset = header.scalar("I"), header.scalar("Q")
        if code not in TENSOR_TYPES:
            raise NotImplementedError(
                f"{self.path}: tensor {name} is of ggml type {code}; supported are "
                f"{', '.join(t.name for t in TENSOR_TYPES.values())}. Take the model "
                "in one of these."
            )
        tensor_type = TENSOR_TYPES[code]
        if not shape or shape[-1] % tensor_type.block_size or 0 in shape:
            raise header.fail(
                f"tensor {name} {list(shape)} does not consist of {tensor_type.name} "
                f"blocks of {tensor_type.block_size}"
            )
        return name, TensorInfo(shape, tensor_type, offset)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor, dequantized: float32, float16 stays float16."""
        info = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, info.nbytes, info.offset)
        blocks = raw.reshape(-1, info.type.block_bytes)
        with np.errstate(all="ignore"):  # scales may be any numbers, infinity too
            return info.type.decode(blocks).reshape(info.shape)


def load(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the metadata and all tensors of a file, dequantized, under its names.

    Raises:
        ModelFileError: if the file is damaged.
        NotImplementedError: if a tensor is of a type that is not supported.
    """
    file = GGUFFile(path)
    return file.metadata, {name: file.read(name) for name in file.tensors}


def save(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tensor_types: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, which appears whole or not at all. Needs the `gguf` package.

    Args:
        path: the file.
        metadata: "general.architecture" and what else the header holds: numbers,
            texts, and lists of one of them.
        tensors: by the names they are to have; rows of q and k as they are to lie.
        tensor_types: by name, types other than float32: "F16", "Q8_0", "Q4_0", ...

    Raises:
        ValueError: if the architecture is missing.
    """
    from qlora_jax.interop.gguf_out import save_tensors

    save_tensors(path, metadata, tensors, tensor_types or {})


class GGUFSource:
    """A GGUF model under Hugging Face's names, shapes and order of rows.

    Attributes:
        config: read from the metadata.
        file: the `GGUFFile`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.file = GGUFFile(path)
        self.config, self._permuted = _config(self.file)
        self._names = {}
        for name in self.file.tensors:
            if name != "rope_freqs.weight":  # part of the config
                self._names[_hf_name(name)] = name

    def __str__(self) -> str:
        return str(self.file.path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of every tensor by its Hugging Face name."""
        return {hf: self.file.tensors[own].shape for hf, own in self._names.items()}

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the file one tensor takes."""
        return self.file.tensors[self._names[name]].nbytes

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor; rows of q and k in Hugging Face's order."""
        tensor = self.file.read(self._names[name])
        if self._permuted and "self_attn.q_proj" in name:
            return unpermute(tensor, self.config.num_heads)
        if self._permuted and "self_attn.k_proj" in name:
            return unpermute(tensor, self.config.num_kv_heads)
        return tensor


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the output features of q or k back into halves of a head.

    The converter stores dimension i and i + c/2 of a head, which one rotation turns,
    side by side; the model wants the first halves first.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [heads, c/2, 2, ...]
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def _hf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in IN_LAYER:
        return f"model.layers.{match[1]}.{IN_LAYER[match[2]]}.{match[3]}"
    return name  # shown as unexpected by the check of tensors


def _config(file: GGUFFile) -> tuple[LlamaConfig, bool]:
    metadata = file.metadata
    kind = metadata.get("general.architecture", "unknown")
    if kind not in ARCHITECTURES:
        raise NotImplementedError(
            f"{file.path}: architecture {kind!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}."
        )
    architecture, permuted = ARCHITECTURES[kind]

    def field(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{name}", default)
        if value is None:
            raise ModelFileError(f"{file.path} has no metadata {kind}.{name}.")
        return value

    heads = field("attention.head_count")
    rope_scaling = None
    if "rope_freqs.weight" in file.tensors:
        factors = tuple(file.read("rope_freqs.weight").astype(float).tolist())
        rope_scaling = RopeScaling("factors", factors=factors)
    elif field("rope.scaling.type", "none") not in ("none", ""):
        factor = field("rope.scaling.factor")
        # llama.cpp sharpens as YaRN's paper says; the file does not.
        is_yarn = field("rope.scaling.type") == "yarn" and factor > 1
        context = field("rope.scaling.original_context_length", field("context_length"))
        rope_scaling = RopeScaling(
            field("rope.scaling.type"),
            factor=factor,
            original_max_position=context,
            attention_factor=0.1 * math.log(factor) + 1 if is_yarn else 1.0,
        )
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    if "token_embd.weight" not in file.tensors:
        raise ModelFileError(f"{file.path} lacks token_embd.weight.")
    config = LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_layers=field("block_count"),
        num_heads=heads,
        num_kv_heads=field("attention.head_count_kv", heads),
        head_dim=field("attention.key_length", 0),
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base", 10000.0),
        rope_scaling=rope_scaling,
        max_position=field("context_length"),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=metadata.get(f"{kind}.attention.sliding_window"),
        architecture=architecture,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=() if eos is None else (eos,),
    )
    if rope_scaling is not None and rope_scaling.factors:
        known = llama3_of(rope_scaling.factors, config)
        if known is not None:
            config = dataclasses.replace(config, rope_scaling=known)
    return config, permuted


def rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """Returns what each frequency is divided by, if a file must say it: Llama 3.1."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "factors"):
        return None
    plain = dataclasses.replace(config, rope_scaling=None).rope_frequencies()
    return (plain / config.rope_frequencies()).astype(np.float32)


def llama3_of(factors: Sequence[float], config: LlamaConfig) -> RopeScaling | None:
    """Returns the llama3 scaling that has these factors, if it is a published one.

    Files hold the factors; a Hugging Face config asks for what they were made from.
    """
    with np.errstate(all="ignore"):  # a file may hold any numbers
        scaling = RopeScaling("llama3", factor=float(max(factors)))
        candidate = dataclasses.replace(config, rope_scaling=scaling)
        found = rope_factors(candidate)
    same = found is not None and np.allclose(found, np.asarray(factors), rtol=1e-4)
    return scaling if same else None
