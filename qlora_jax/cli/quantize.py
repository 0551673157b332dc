"""`qlora-jax quantize`: a model in 4 or 8 bits, as bitsandbytes writes it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import tyro

from qlora_jax.cli.parsing import parse

Positional = tyro.conf.Positional


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Writes a model in 4 or 8 bits, in a folder that transformers loads.

    Attributes:
        source: a folder, a .gguf file, or owner/name on the Hugging Face hub.
        folder: where it goes.
        format: of the linear weights.
        double_quant: quantize the scales of the blocks too.
        block_size: numbers that share a scale.
        storage: the type that the packed bytes are stored as; 16 and 32 bits are for
            PyTorch's FSDP.
        dtype: of what is not quantized; None for that which it has.
        revision: branch, tag or commit of a model on the hub.
    """

    source: Positional[str]
    folder: Positional[str]
    format: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True
    block_size: int = 64
    storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    dtype: str | None = None
    revision: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Quantize, argv, "qlora-jax quantize")
    from qlora_jax.interop.convert import quantize_model

    quantize_model(
        args.source,
        args.folder,
        format=args.format,
        double_quant=args.double_quant,
        block_size=args.block_size,
        storage=args.storage,
        dtype=args.dtype,
        revision=args.revision,
    )
    print(f"Written: {args.folder}")
    return 0
