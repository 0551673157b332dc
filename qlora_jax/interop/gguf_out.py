"""Models out as GGUF files, for llama.cpp and what is built on it.

The file is written by the `gguf` package of llama.cpp, tensor by tensor: names, order
of rows and metadata are those of llama.cpp's own converter.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.atomic import new_file
from qlora_jax.interop import sentencepiece
from qlora_jax.interop.folder import Entry
from qlora_jax.interop.gguf import ARCHITECTURES, IN_LAYER, TOP, rope_factors
from qlora_jax.interop.save import model_entries
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.quant import QuantizedTensor, dequantize

if TYPE_CHECKING:
    from qlora_jax.interop.tokenizer import Tokenizer

# The types that matrices are written in.
TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q4_0")
_COARSE = ("Q5_0", "Q4_1", "Q4_0")
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5


def package() -> Any:
    """Returns the `gguf` package."""
    try:
        import gguf
    except ImportError:
        raise ModelFileError(
            "Writing GGUF needs the gguf package: pip install 'qlora-jax[train]'."
        ) from None
    return gguf


def write_gguf(
    path: str | os.PathLike[str],
    entries: Sequence[Entry],
    config: LlamaConfig,
    *,
    tensor_type: str = "Q8_0",
    tokenizer: "Tokenizer | None" = None,
    advance: Callable[[Entry], None] = lambda entry: None,
) -> None:
    """Writes a model as one GGUF file, which appears whole or not at all.

    Vectors stay float32. With the types of 4 and 5 bits embedding and head are Q8_0. A
    matrix whose rows are no multiple of 32 numbers is F16.

    Args:
        path: the file.
        entries: the weights; quantized ones are dequantized.
        config: the model's.
        tensor_type: of the matrices, one of `TENSOR_TYPES`.
        tokenizer: goes into the file; None leaves it out.
        advance: called after each weight.

    Raises:
        ValueError: if the type is unknown.
        NotImplementedError: if a GGUF file cannot say what the config or the tokenizer
            does, named.
    """
    if tensor_type not in TENSOR_TYPES:
        raise ValueError(f"{tensor_type=} is none of {', '.join(TENSOR_TYPES)}.")
    gguf = package()
    path = pathlib.Path(path)
    plans = [_planned(entry, config, tensor_type) for entry in entries]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _new_writer(gguf, path, _architecture(config)) as writer:
        _write_config(writer, gguf, config, tensor_type)
        if tokenizer is not None:
            _write_tokenizer(writer, tokenizer, config)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(
                "rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes
            )
        for plan in plans:
            kind = gguf.GGMLQuantizationType[plan.type]
            shape, nbytes = _stored(gguf, plan.entry.shape, kind)
            writer.add_tensor_info(
                plan.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for plan in plans:
            kind = gguf.GGMLQuantizationType[plan.type]
            rows = plan.rows(config)
            packed = np.ascontiguousarray(gguf.quants.quantize(rows, kind))
            writer.write_tensor_data(packed.view(np.uint8).reshape(-1))
            advance(plan.entry)


def save_gguf(
    model: Llama,
    path: str | os.PathLike[str],
    *,
    tensor_type: str = "Q8_0",
    tokenizer: "Tokenizer | None" = None,
) -> None:
    """Writes a model in memory as a GGUF file; see `write_gguf`.

    Args:
        model: without adapters: merge them first.
        path: the file.
        tensor_type: of the matrices, one of `TENSOR_TYPES`.
        tokenizer: goes into the file.
    """
    entries = model_entries(model)
    write_gguf(
        path, entries, model.config, tensor_type=tensor_type, tokenizer=tokenizer
    )


@contextlib.contextmanager
def _new_writer(
    gguf: Any, path: str | os.PathLike[str], architecture: str
) -> Iterator[Any]:
    """Gives a writer of a file that is there if nothing fails."""
    with new_file(path) as partial:
        with contextlib.closing(gguf.GGUFWriter(str(partial), architecture)) as writer:
            yield writer


def save_tensors(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tensor_types: Mapping[str, str],
) -> None:
    """Writes a file of any content; see `gguf.save`."""
    gguf = package()
    if "general.architecture" not in metadata:
        raise ValueError('metadata must say "general.architecture".')
    with _new_writer(gguf, path, metadata["general.architecture"]) as writer:
        for key, value in metadata.items():
            if key != "general.architecture":
                _add(writer, gguf, key, value)
        for name, array in tensors.items():
            array = np.ascontiguousarray(array, np.float32)
            kind = gguf.GGMLQuantizationType[tensor_types.get(name, "F32")]
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _add(writer: Any, gguf: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    if isinstance(value, list | tuple):
        writer.add_array(key, list(value))
    elif isinstance(value, bool | str):
        writer.add_key_value(key, value, kinds.get_type(value))
    elif isinstance(value, float):
        writer.add_key_value(key, value, kinds.FLOAT32)
    else:
        writer.add_key_value(key, value, kinds.INT64 if value < 0 else kinds.UINT32)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One tensor: what it is called, its type, whether its rows are permuted."""

    entry: Entry
    name: str
    type: str
    heads: int

    def rows(self, config: LlamaConfig) -> np.ndarray:
        weight = self.entry.read()
        if isinstance(weight, QuantizedTensor):
            weight = dequantize(weight, np.float32).T
        array = np.asarray(weight).astype(np.float32)
        return permute(array, self.heads) if self.heads else array


def _planned(entry: Entry, config: LlamaConfig, tensor_type: str) -> _Plan:
    kind = tensor_type if len(entry.shape) == 2 else "F32"
    if kind in _COARSE and not entry.is_linear:
        kind = "Q8_0"
    if kind[0] == "Q" and entry.shape and entry.shape[-1] % 32:
        kind = "F16"
    heads = 0
    if ARCHITECTURES[_architecture(config)][1]:
        of = {"self_attn.q_proj": config.num_heads}
        of |= {"self_attn.k_proj": config.num_kv_heads}
        heads = next((n for part, n in of.items() if part in entry.name), 0)
    return _Plan(entry, _own_name(entry.name), kind, heads)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts dimension i and i + c/2 of each head side by side; undoes `unpermute`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # [heads, 2, c/2, ...]
    return np.ascontiguousarray(np.swapaxes(halves, 1, 2)).reshape(rows.shape)


def _own_name(name: str) -> str:
    for own, theirs in TOP.items():
        if name == theirs:
            return own
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    own = {theirs: own for own, theirs in IN_LAYER.items()}
    if match is None or match[2] not in own:
        raise NotImplementedError(f"GGUF has no name for {name}.")
    return f"blk.{match[1]}.{own[match[2]]}.{match[3]}"


def _architecture(config: LlamaConfig) -> str:
    # llama.cpp's converter has Mistral as llama too.
    name = config.architecture.replace("Mistral", "Llama")
    for own, (architecture, _) in ARCHITECTURES.items():
        if architecture == name:
            return own
    raise NotImplementedError(f"GGUF of {config.architecture} is not written.")


def _stored(gguf: Any, shape: tuple[int, ...], kind: Any) -> tuple[Any, int]:
    """Shape in bytes and bytes, as the writer wants them of packed data."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] // block * size
    return (*shape[:-1], row), int(np.prod(shape[:-1])) * row


def _write_config(writer: Any, gguf: Any, config: LlamaConfig, kind: str) -> None:
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        raise NotImplementedError(
            "A GGUF file cannot say dynamic rotary scaling; linear, llama3 and yarn it "
            "can."
        )
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(getattr(gguf.LlamaFileType, _FILE_TYPES[kind]))
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position)


_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q5_0": "MOSTLY_Q5_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q4_0": "MOSTLY_Q4_0",
}


def _write_tokenizer(writer: Any, tokenizer: "Tokenizer", config: LlamaConfig) -> None:
    from qlora_jax.interop.tokenizer_files import PRE_TOKENIZERS

    described = json.loads(tokenizer.backend.to_str())
    model, pre = described["model"], _pre_tokenizer(described)
    is_pieces = _is_sentencepiece(model)
    if model["type"] != "BPE" or (pre is None and not is_pieces):
        raise NotImplementedError(
            "A GGUF file cannot hold this tokenizer: it is neither a SentencePiece BPE "
            "nor a byte-level BPE whose pre-tokenizer is one of "
            f"{', '.join(PRE_TOKENIZERS)}."
        )
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    for token, index in vocabulary.items():
        if index >= config.vocab_size:
            raise NotImplementedError(
                f"The tokenizer has token {index} and the model {config.vocab_size}: "
                "enlarge the model's vocabulary."
            )
        tokens[index], types[index] = token, _NORMAL
    for index, token in tokenizer.backend.get_added_tokens_decoder().items():
        types[index] = _CONTROL if token.special else _USER
    writer.add_tokenizer_model("llama" if is_pieces else "gpt2")
    writer.add_token_list(tokens)
    if is_pieces:
        for index, token in enumerate(tokens):
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                types[index] = sentencepiece.BYTE
        types[vocabulary[model["unk_token"]]] = sentencepiece.UNKNOWN
        # The order of the scores is what counts, and that of the ids is the same.
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        writer.add_add_space_prefix(_has_prefix(described))
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _is_sentencepiece(model: dict[str, Any]) -> bool:
    """Whether a model is what `sentencepiece.build` makes of scores that fall by id."""
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        return False
    vocabulary = model["vocab"]
    made = ("".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"])
    ids = [vocabulary.get(token, -1) for token in made]
    falls = all(a <= b for a, b in itertools.pairwise(ids))
    return falls and model.get("unk_token") in vocabulary


def _has_prefix(described: dict[str, Any]) -> bool:
    """Whether a space is put in front of a text."""
    normalizer = described.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    scheme = (described.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    return scheme != "never" or any(s.get("type") == "Prepend" for s in steps)


def _pre_tokenizer(described: dict[str, Any]) -> str | None:
    """Returns llama.cpp's name for how a tokenizer splits a text, if it has one."""
    from qlora_jax.interop.tokenizer_files import PRE_TOKENIZERS

    step = described.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    digits = any(s.get("type") == "Digits" for s in steps)
    regex = "".join(
        s["pattern"].get("Regex", "?") for s in steps if s.get("type") == "Split"
    )
    if not any(s.get("type") == "ByteLevel" for s in steps):
        return None
    for name, form in PRE_TOKENIZERS.items():
        if form == (regex, digits):
            return name
    return None
