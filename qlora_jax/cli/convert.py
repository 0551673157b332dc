"""`qlora-jax convert`: a model in another layout."""

import dataclasses
from collections.abc import Sequence

import tyro

from qlora_jax.cli.parsing import parse

Positional = tyro.conf.Positional


@dataclasses.dataclass(frozen=True)
class Convert:
    """Writes a model as a Hugging Face folder, or, if TARGET ends in .gguf, as that.

    Attributes:
        source: a folder, a .gguf file, or owner/name on the Hugging Face hub; weights
            in 4 or 8 bits are dequantized.
        target: the folder or .gguf file.
        type: of the tensors of a .gguf: F32, F16, BF16, Q8_0, Q4_0, Q4_1 or Q5_0; None
            for Q8_0.
        dtype: of the tensors of a folder; None for that which they have.
        revision: branch, tag or commit of a model on the hub.
    """

    source: Positional[str]
    target: Positional[str]
    type: str | None = None
    dtype: str | None = None
    revision: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Convert, argv, "qlora-jax convert")
    from qlora_jax.interop.convert import convert_model

    convert_model(
        args.source,
        args.target,
        tensor_type=args.type,
        dtype=args.dtype,
        revision=args.revision,
    )
    print(f"Written: {args.target}")
    return 0
