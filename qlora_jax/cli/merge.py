"""`qlora-jax merge`: a model with its adapter inside."""

import dataclasses
import os
from collections.abc import Sequence

import tyro

from qlora_jax.cli.model import dtype_of
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
        text: a UTF-8 file: also print what the merge did to the loss on it.
        window: tokens that the model sees at a time there.
        windows: take only so many of them; 0 for all.
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
    text: str | None = None
    window: int = 512
    windows: int = 16


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Merge, argv, "qlora-jax merge")
    from qlora_jax import evals
    from qlora_jax.interop.convert import merge_adapter

    # What is wrong with a file is said before anything is written.
    text = None if args.text is None else evals.read_text(args.text)
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
    if text is not None:
        before, after = _losses(args, text)
        print(f"Loss on {args.text}: {before:.4f} -> {after:.4f} ", end="")
        print(f"({after - before:+.4f})")
    return 0


def _losses(args: Merge, text: str) -> tuple[float, float]:
    """The loss of the base with the adapter beside it, and of what was written."""
    import qlora_jax as ql
    from qlora_jax import evals

    base = ql.find_model(args.base, args.revision)
    tokens = ql.load_tokenizer(base).encode(text)

    def loss(path: str | os.PathLike[str], adapted: bool) -> float:
        model = ql.load_model(path, dtype=dtype_of("auto"))
        if adapted:
            model = ql.load_adapter(model, args.adapter, args.name)
        limit = args.windows or None
        return evals.perplexity(model, tokens, window=args.window, limit=limit).loss

    return loss(base, True), loss(args.target, False)
