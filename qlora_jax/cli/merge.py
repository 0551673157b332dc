"""`qlora-jax merge`: a model with its adapter inside."""

import dataclasses
from collections.abc import Sequence

import tyro

from qlora_jax.cli.parsing import parse

Positional = tyro.conf.Positional


@dataclasses.dataclass(frozen=True)
class Merge:
    """Writes a model with an adapter merged into its weights.

    Attributes:
        base: a folder, a .gguf file, or owner/name on the Hugging Face hub.
        adapter: a PEFT folder, as `qlora-jax finetune` writes it.
        target: a folder, or a file that ends in .gguf.
        name: of the adapter, where the folder holds several.
        quantize: nf4 or fp4: write 4-bit weights as bitsandbytes does; None for dense
            ones, which are exact.
        double_quant: quantize the scales of the blocks too.
        type: of the tensors of a .gguf; None for Q8_0.
        dtype: of the tensors of a folder; None for that which they have.
        revision: branch, tag or commit of a model on the hub.
    """

    base: Positional[str]
    adapter: Positional[str]
    target: Positional[str]
    name: str = "default"
    quantize: str | None = None
    double_quant: bool = True
    type: str | None = None
    dtype: str | None = None
    revision: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Merge, argv, "qlora-jax merge")
    from qlora_jax.interop.convert import merge_adapter

    merge_adapter(
        args.base,
        args.adapter,
        args.target,
        name=args.name,
        quantize=args.quantize,
        double_quant=args.double_quant,
        tensor_type=args.type,
        dtype=args.dtype,
        revision=args.revision,
    )
    print(f"Written: {args.target}")
    return 0
