"""`qlora-jax plan`: what finetuning a model will take."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from qlora_jax.cli.parsing import parse


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tells what finetuning will take of the device and of the host, and loads nothing.

    Attributes:
        model: a folder with config.json, a .gguf file, or owner/name on the Hugging
            Face hub, of which the config alone is fetched.
        quantize: the format of the frozen weights (nf4, fp4, int8, ...); None for the
            type of the rest.
        double_quant: quantize the scales of the blocks too.
        rank: of the adapters.
        dropout: on their input.
        batch_size: rows of an optimizer step.
        accumulate: in how many parts they are computed.
        seq_len: tokens of a row.
        remat: what the backward recomputes.
        unroll: layers compiled one by one.
        chunk_size: tokens whose logits are in memory at a time.
        algorithm: the optimizer.
        paged: keep its state on the host.
        lean: adapters and gradients in bfloat16, float32 masters in the state.
        revision: branch, tag or commit of a model on the hub.
    """

    model: str = "SmolLM2-135M-Instruct"
    quantize: str | None = "nf4"
    double_quant: bool = True
    rank: int = 64
    dropout: float = 0.0
    batch_size: int = 1
    accumulate: int = 1
    seq_len: int = 512
    remat: Literal["none", "full", "attention", "offload"] = "full"
    unroll: bool = False
    chunk_size: int = 512
    algorithm: Literal["adamw", "adamw8bit", "lion8bit"] = "adamw"
    paged: bool = True
    lean: bool = False
    revision: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Plan, argv, "qlora-jax plan")
    from qlora_jax.interop.hub import load_config
    from qlora_jax.plan import plan_memory
    from qlora_jax.train import TrainConfig

    own = {field.name for field in dataclasses.fields(TrainConfig)}
    train = {k: v for k, v in dataclasses.asdict(args).items() if k in own}
    plan = plan_memory(
        load_config(args.model, args.revision),
        TrainConfig(**train),
        quantize=args.quantize,
        double_quant=args.double_quant,
        paged=args.paged,
        lean=args.lean,
    )
    print(plan)
    return 0
