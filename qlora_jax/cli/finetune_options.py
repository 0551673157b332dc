"""The settings of `qlora-jax finetune`: from a preset, a file, and flags."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

from qlora_jax.cli.model import Precision
from qlora_jax.cli.parsing import (
    by_pattern,
    parse,
    read_yaml,
    source_of,
    split_config,
)
from qlora_jax.cli.presets import PRESETS
from qlora_jax.cli.rows import Rows
from qlora_jax.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Finetune(Rows, TrainConfig):
    """Finetunes a model; the adapter, the numbers and a report go into a folder.

    CONFIG.yaml has a line `name: value` for each setting; flags change them.

    The paper's are presets: --preset guanaco-7b, guanaco-13b, -33b or -65b.

    The same command goes on with a run that was ended, however it was.

    Attributes:
        model: a folder, a .gguf file, owner/name on the Hugging Face hub, or
            SmolLM2-135M-Instruct, which needs no account.
        data: files, folders or hf:owner/name; or mappings with more about a source, as
            '{"path": "a.jsonl", "weight": 2}'.
        eval_data: rows to evaluate on, as data.
        eval_size: without eval_data: rows of the data held out, a number or a share.
        group_by_length: rows of like length share a batch.
        epochs: passes over the data, instead of steps; 0 for steps.
        quantize: format of the frozen weights (nf4, fp4, int8, ...); none leaves them
            as they are in the file.
        double_quant: quantize the scales of the blocks too.
        dtype: type of the rest and of the computation; auto is float32 on a CPU, where
            it is faster, and bfloat16 elsewhere.
        revision: branch, tag or commit of a model on the hub.
        targets: which weights get adapters, a regular expression over their paths; None
            for all linear layers.
        rank_pattern: ranks that differ, as 'down_proj=16': a regular expression over
            paths and a number.
        alpha_pattern: alphas that differ, as 'down_proj=8': a regular expression over
            paths and a number.
        train_rows: tokens whose rows of the embedding are trained too, as those of new
            tokens.
        init: first values of the adapters.
        rslora: scale adapters by alpha / sqrt(rank).
        dora: train the magnitude of each column too.
        paged: keep the optimizer's state in host memory.
        lean: adapters and their gradients in bfloat16, float32 masters in the
            optimizer's state: the least memory, for the largest models.
        samples: held-out rows that are answered before, at evaluations and after.
        sample_tokens: most tokens of such an answer.
        mmlu: a file of MMLU questions; accuracy on them joins each evaluation.
        mmlu_shots: a file of solved questions, five of which come before each.
        mmlu_limit: take only so many questions of each subject; 0 for all.
        out: folder of the run; None for runs/ and the model's name.
        resume: go on with the run in that folder, if one is there.
    """

    model: str = "SmolLM2-135M-Instruct"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    eval_size: int | float = 64
    group_by_length: bool = False
    epochs: float = 0.0
    quantize: str = "nf4"
    double_quant: bool = True
    dtype: Precision = "auto"
    revision: str | None = None
    targets: str | None = None
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()
    train_rows: tuple[int, ...] = ()
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "loftq"] = "kaiming"
    rslora: bool = False
    dora: bool = False
    paged: bool = True
    lean: bool = False
    samples: int = 2
    sample_tokens: int = 64
    mmlu: str | None = None
    mmlu_shots: str | None = None
    mmlu_limit: int = 0
    out: str | None = None
    resume: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ValueError(
                "say what to learn from: --data FILE (see `qlora-jax data formats`)."
            )
        if self.eval_every and not self.eval_data and not self.eval_size:
            raise ValueError(
                f"eval_every={self.eval_every} asks for evaluations: give --eval-size "
                "or --eval-data."
            )
        if self.epochs < 0 or self.samples < 0 or self.sample_tokens < 1:
            raise ValueError(
                f"epochs={self.epochs} and samples={self.samples} must not be "
                f"negative, sample_tokens={self.sample_tokens} at least 1."
            )
        if self.lean and self.ema:
            raise ValueError(
                f"ema={self.ema} keeps a running mean of the adapters, which lean=True "
                "has in bfloat16, where it would stand still: give one of them."
            )
        by_pattern("rank_pattern", self.rank_pattern, int)
        by_pattern("alpha_pattern", self.alpha_pattern, float)

    @property
    def folder(self) -> str:
        """The folder of the run."""
        name = pathlib.Path(self.model).name.removesuffix(".gguf")
        return self.out or f"runs/{name}"

    def settings(self) -> dict[str, Any]:
        """Returns all that determines the run, as its config.yaml has it."""
        settings = dataclasses.asdict(self)
        for name in ("data", "eval_data"):
            settings[name] = [source_of(text) for text in settings[name]]
        return {k: v for k, v in settings.items() if k not in ("out", "resume")}

    def training(self, batches: int) -> TrainConfig:
        """Returns the part that training takes; `batches` are those of a pass."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        config = TrainConfig(**{name: getattr(self, name) for name in names})
        if not self.epochs:
            return config
        return dataclasses.replace(config, steps=math.ceil(self.epochs * batches))


# What belongs together in the help, most needed first.
GROUPS = {
    "model": ("model", "revision", "quantize", "double_quant", "dtype"),
    "data": (
        "data", "eval_data", "eval_size", "format", "chat_template", "answers",
        "train_on_source", "seq_len", "source_max_len", "target_max_len",
        "truncate_source", "packing", "group_by_length", "skip_bad_rows",
    ),
    "adapter": (
        "rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "also",
        "train_rows", "init", "rslora", "dora",
    ),
    "training": (
        "steps", "epochs", "batch_size", "learning_rate", "schedule", "warmup_steps",
        "algorithm", "b1", "b2", "weight_decay", "lora_plus", "max_grad_norm",
        "neftune_alpha", "ema", "seed",
    ),
    "memory": ("accumulate", "paged", "lean", "remat", "unroll", "chunk_size"),
    "evaluation": (
        "eval_every", "patience", "samples", "sample_tokens", "mmlu", "mmlu_shots",
        "mmlu_limit",
    ),
    "run": ("out", "resume", "save_every", "keep", "max_skipped"),
}  # fmt: skip
# Of what only shows how it goes: it may change when a run is taken up again.
SHOWN = {"samples", "sample_tokens", "mmlu", "mmlu_shots", "mmlu_limit"}


def options(argv: Sequence[str]) -> Finetune:
    """Returns the options: a preset, changed by a file, changed by flags."""
    path, argv = split_config(argv)
    name, argv = _preset(argv)
    values = {} if path is None else read_yaml(path, Finetune)
    if name is not None:
        values = {**PRESETS[name], **values}
    prog = "qlora-jax finetune [CONFIG.yaml] [--preset NAME]"
    return parse(Finetune, argv, prog, values=values, groups=GROUPS)


def _preset(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    rest, name = list(argv), None
    for i, word in enumerate(rest):
        if word == "--preset" or word.startswith("--preset="):
            name = word.partition("=")[2] or (rest[i + 1 : i + 2] or [""])[0]
            del rest[i : i + (1 if "=" in word else 2)]
            break
    if name is not None and name not in PRESETS:
        raise ValueError(f"--preset {name!r} must be one of {', '.join(PRESETS)}.")
    return name, rest
