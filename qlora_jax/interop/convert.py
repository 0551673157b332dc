"""From one checkpoint to another, streamed: what the command line does with files.

One tensor is read, changed and put into the output at a time, so that host memory holds
it and one shard of the output, however large the model is.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.interop.folder import Entry, Form, copy_along, write_folder
from qlora_jax.interop.gguf import GGUFSource
from qlora_jax.interop.hub import find_model, open_source
from qlora_jax.interop.merged import MergedSource
from qlora_jax.interop.progress import Progress
from qlora_jax.interop.safetensors import read_json
from qlora_jax.interop.weights import (
    ModelFileError,
    Source,
    check_tensors,
    expected_shapes,
)
from qlora_jax.lora.merge import MergeReport
from qlora_jax.models.config import LINEAR_WEIGHTS
from qlora_jax.models.config_hf import config_to_hf

if TYPE_CHECKING:
    from jax.typing import DTypeLike

_SHARD_BYTES = 5_000_000_000


def convert_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    tensor_type: str | None = None,
    dtype: "DTypeLike | None" = None,
    revision: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Writes a model in another form: a dense Hugging Face folder, or a GGUF file.

    Weights that are quantized are dequantized. The tokenizer goes along.

    Args:
        source: what `load_model` takes: a folder (dense, or in the 4 or 8 bits of
            bitsandbytes), a hub name, a `.gguf` file.
        target: a new folder, or a name that ends in ".gguf".
        tensor_type: of a GGUF file's matrices: "F32", "F16", "BF16", "Q8_0", "Q5_0",
            "Q4_1", "Q4_0"; None: "Q8_0".
        dtype: of a folder's tensors; None: what they have (of a quantized GGUF file,
            bfloat16).
        revision: of a model on the hub.
        shard_bytes: of a folder: a new file begins before one grows larger.
        progress: as in `load_model`.

    Raises:
        ModelFileError: if the source is damaged, named.
        ValueError: if the target exists or the types do not go with it.
        NotImplementedError: if the target cannot express the model.
    """
    path = find_model(source, revision)
    _write(
        path,
        open_source(path),
        target,
        Form(dequantized=True, dtype=dtype),
        tensor_type,
        shard_bytes,
        progress,
        "Converting",
    )


def quantize_model(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    storage: str = "uint8",
    dtype: "DTypeLike | None" = None,
    revision: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Writes a model as a bitsandbytes folder, which transformers and vLLM load too.

    The linear weights of the layers are quantized; embedding, head and norms stay
    dense. On a GPU, if there is one.

    Args:
        source: what `load_model` takes, not quantized yet.
        folder: a new folder.
        format: "nf4", "fp4", or "int8" for LLM.int8.
        double_quant: with 4 bits: quantize the scales of the blocks too.
        block_size: with 4 bits: numbers that share a scale.
        storage: with 4 bits: the type under which the codes' bytes are stored,
            "uint8", "bfloat16", "float16" or "float32".
        dtype: of what stays dense; None: what it has.
        revision: of a model on the hub.
        shard_bytes: a new file begins before one grows larger.
        progress: as in `load_model`.

    Raises:
        ModelFileError: if the source is damaged, named.
        ValueError: if there is no such form, the source is quantized already and not
            so, or the folder exists.
    """
    path = find_model(source, revision)
    form = Form(format, double_quant, block_size, storage, dtype=dtype)
    opened = open_source(path)
    _write(path, opened, folder, form, None, shard_bytes, progress, "Quantizing")


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    name: str = "default",
    quantize: str | None = None,
    double_quant: bool = True,
    tensor_type: str | None = None,
    dtype: "DTypeLike | None" = None,
    revision: str | None = None,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool | None = None,
    report: Callable[[MergeReport], Any] | None = print,
) -> None:
    """Writes a model with an adapter merged into it.

    Each adapted weight becomes w + scale · b a, computed in float32. A base in 4 bits
    is dequantized for it and, unless `quantize` is given, stays dense: best is the base
    that the 4 bits were made from.

    Args:
        base: what `load_model` takes.
        adapter: a PEFT folder.
        target: as in `convert_model`.
        name: of the adapter in its folder, as in `load_adapter`.
        quantize: "nf4", "fp4" or "int8": quantize again, into a bitsandbytes folder.
        double_quant: with 4 bits: quantize the scales too.
        tensor_type: of a GGUF file's matrices; None: "Q8_0".
        dtype: of what is written dense; None: what it has.
        revision: of a base on the hub.
        shard_bytes: of a folder: a new file begins before one grows larger.
        progress: as in `load_model`.
        report: called with how far the weights in the file are from the sums, as in
            `merge_lora`; the file is read again for it. None: not measured.

    Raises:
        ModelFileError: if files are damaged or do not fit together, named.
        ValueError: if the target exists, or the types do not go with it.
        NotImplementedError: if the adapter is of a kind that cannot be merged so.
    """
    path = find_model(base, revision)
    source = MergedSource(open_source(path), adapter, name)
    form = Form(quantize, double_quant, dequantized=quantize is None, dtype=dtype)
    _write(path, source, target, form, tensor_type, shard_bytes, progress, "Merging")
    if report is not None:
        drift = source.drift(open_source(pathlib.Path(target)))
        if drift:
            report(MergeReport(drift))


def _write(
    path: pathlib.Path,
    source: Source,
    target: str | os.PathLike[str],
    form: Form,
    tensor_type: str | None,
    shard_bytes: int,
    progress: bool | None,
    doing: str,
) -> None:
    check_tensors(source)
    entries = _entries(source)
    total = sum(source.nbytes(entry.name) for entry in entries)
    to_gguf = pathlib.Path(target).suffix == ".gguf"
    if to_gguf and (form.quantize is not None or form.dtype is not None):
        raise ValueError(
            f"{target} is a GGUF file: give tensor_type, not quantize or dtype."
        )
    if tensor_type is not None and not to_gguf:
        raise ValueError(f"{tensor_type=} is of .gguf files, and {target} is a folder.")
    if form.dtype is None and path.is_file():
        form = _with_dtype(form, source, path)
    with Progress(f"{doing} {path.name}", total, progress) as shown:

        def advance(entry: Entry) -> None:
            shown.advance(source.nbytes(entry.name))

        if to_gguf:
            from qlora_jax.interop.gguf_out import write_gguf

            write_gguf(
                target,
                entries,
                source.config,
                tensor_type=tensor_type or "Q8_0",
                tokenizer=_tokenizer(path),
                advance=advance,
            )
            return
        is_folder = path.is_dir()
        config = read_json(path / "config.json") if is_folder else None
        write_folder(
            target,
            entries,
            form,
            config_to_hf(source.config) if config is None else config,
            finish=lambda folder: _along(path, folder),
            shard_bytes=shard_bytes,
            advance=advance,
        )


def _entries(source: Source) -> list[Entry]:
    def entry(name: str, shape: tuple[int, ...]) -> Entry:
        module = name.removesuffix(".weight").rpartition(".")[2]
        is_linear = name.endswith(".weight") and module in LINEAR_WEIGHTS
        return Entry(name, shape, is_linear, lambda: source.read(name))

    return [entry(*item) for item in expected_shapes(source.config).items()]


def _with_dtype(form: Form, source: Source, path: pathlib.Path) -> Form:
    """GGUF tensors are decoded to more than they held: chooses what holds them."""
    base = source.base if isinstance(source, MergedSource) else source
    dtype: Any = jnp.bfloat16
    if isinstance(base, GGUFSource):
        tensors = base.file.tensors.values()
        kinds = {info.type.name for info in tensors if len(info.shape) > 1}
        if kinds == {"F32"}:
            dtype = jnp.float32
        elif kinds == {"F16"}:
            dtype = jnp.float16
    return dataclasses.replace(form, dtype=np.dtype(dtype))


def _tokenizer(path: pathlib.Path) -> Any:
    """Returns the tokenizer, or None and a line that says why there is none."""
    from qlora_jax.interop.tokenizer import load_tokenizer

    try:
        return load_tokenizer(path)
    except (ModelFileError, NotImplementedError) as error:
        print(f"The file will have no tokenizer: {error}", file=sys.stderr)
        return None


def _along(path: pathlib.Path, folder: pathlib.Path) -> None:
    """Puts the tokenizer, and what else goes with a model, into its new folder."""
    if path.is_dir():
        copy_along(path, folder)
        return
    tokenizer = _tokenizer(path)
    if tokenizer is None:
        return
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": tokenizer.bos_token or None,
        "chat_template": tokenizer.chat_template,
        "eos_token": tokenizer.eos_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
