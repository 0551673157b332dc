"""The model that a subcommand works with."""

import dataclasses
import hashlib
import pathlib
from typing import Any, Literal

Precision = Literal["auto", "bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is held.

    Attributes:
        model: a folder, a .gguf file, owner/name on the Hugging Face hub, or
            SmolLM2-135M-Instruct, which needs no account.
        adapter: a PEFT folder whose adapter is put on it.
        quantize: hold the linear weights in this format (nf4, fp4, int8, ...); None as
            they are in the file.
        double_quant: quantize the scales of the blocks too.
        dtype: of the rest and of the computation; auto is float32 on a CPU, where it is
            faster, and bfloat16 elsewhere.
        revision: branch, tag or commit of a model on the hub.
        chat_template: guanaco, alpaca, chatml, hermes, plain, or Jinja source; None for
            the model's own.
    """

    model: str = "SmolLM2-135M-Instruct"
    adapter: str | None = None
    quantize: str | None = None
    double_quant: bool = True
    dtype: Precision = "auto"
    revision: str | None = None
    chat_template: str | None = None

    def load(self) -> tuple[Any, Any]:
        """Returns the model, with its adapter, and the tokenizer."""
        import qlora_jax as ql

        tokenizer = load_tokenizer(self.model, self.revision, self.chat_template)
        model = ql.load_model(
            self.model,
            self.quantize,
            double_quant=self.double_quant,
            dtype=dtype_of(self.dtype),
            revision=self.revision,
        )
        if self.adapter is not None:
            model = ql.load_adapter(model, self.adapter)
        return model, tokenizer


def load_tokenizer(model: str, revision: str | None, chat_template: str | None) -> Any:
    """Returns the tokenizer of a model, with another chat template if one is named."""
    import qlora_jax as ql
    from qlora_jax.data.templates import template_source

    tokenizer = ql.load_tokenizer(ql.find_model(model, revision))
    if chat_template is None:
        return tokenizer
    source = template_source(chat_template)
    return dataclasses.replace(tokenizer, chat_template=source)


def fingerprint(path: pathlib.Path) -> dict[str, str]:
    """Returns a hash of each file of a model: of its size, first and last MiB.

    The whole of a large model would take minutes to read.
    """
    files = [path]
    if path.is_dir():
        kinds = (".safetensors", ".json", ".gguf", ".jinja", ".model")
        files = sorted(p for p in path.iterdir() if p.suffix in kinds)
    return {file.name: _hash_of_ends(file) for file in files}


def _hash_of_ends(file: pathlib.Path) -> str:
    size, end = file.stat().st_size, 2**20
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        digest.update(stream.read(end))
        stream.seek(max(size - end, 0))
        digest.update(stream.read())
    return digest.hexdigest()


def dtype_of(precision: Precision) -> Any:
    """Returns the type that a model computes in here."""
    import jax
    import jax.numpy as jnp

    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)
