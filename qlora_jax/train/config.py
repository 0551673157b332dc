"""The hyperparameters of a run, and what may change when it is taken up again."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import optax

from qlora_jax.lora import lora_plus
from qlora_jax.optim import adamw8bit, lion8bit, skip_nonfinite

Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of a run; the defaults are those of QLoRA's paper at 7B.

    Attributes:
        rank: inner dimension of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        also: arrays trained whole beside the adapters, a regular expression over their
            paths ("embed|lm_head", "norm"); None for none.
        dropout: rate of it on the adapters' input; the paper has 0.1 up to 13B and
            half of that above.
        neftune_alpha: size of NEFTune's noise on the embeddings while training; its
            paper has 5 to 15; 0 for none.
        learning_rate: the largest there is; the paper has 1e-4 from 33B.
        schedule: how the learning rate goes on after the warm-up: "constant", or to 0
            at the last step along a line or a cosine.
        warmup_steps: the learning rate rises from 0 over so many steps.
        algorithm: the optimizer: "adamw", "adamw8bit" or "lion8bit"; the last two have
            states of 8 bits.
        b1: decay of the mean of gradients that the optimizer keeps.
        b2: decay of the mean of their squares; of Lion's momentum.
        weight_decay: what each step takes of the trained weights themselves, times the
            learning rate.
        lora_plus: learning rate of the factor b over that of a; LoRA+ has 16.
        max_grad_norm: gradients of a larger global norm are scaled down to it.
        steps: optimizer steps.
        batch_size: rows of an optimizer step.
        accumulate: in how many parts, one after another, the rows of a step are
            computed.
        seq_len: tokens of a row.
        remat: what the backward recomputes of a layer, to save memory: "full" is all,
            "attention" all but that, "offload" the MLP and attention itself, with what
            they start from on the host; with "none" it is nothing that takes long.
        unroll: compile layers one by one: longer to compile, and faster with
            remat="none"; the last layer is not recomputed then, which takes memory only
            beside a loss of large chunks.
        chunk_size: tokens whose logits are in memory at a time.
        ema: decay of a running mean of the adapters, as 0.999, which is then what is
            evaluated and returned; 0 for none.
        eval_every: optimizer steps between evaluations; 0 for none.
        patience: stop after so many evaluations in a row without a lower loss; 0 for
            never.
        save_every: optimizer steps between checkpoints.
        keep: how many of the last checkpoints stay; the best one stays beside them.
        max_skipped: stop when so many steps in a row had no finite gradient.
        seed: of the adapters, the order of the rows, dropout and noise.

    Raises:
        ValueError: if a number is out of its range, or the parts do not divide a batch.
    """

    rank: int = 64
    alpha: float = 16.0
    also: str | None = None
    dropout: float = 0.1
    neftune_alpha: float = 0.0
    learning_rate: float = 2e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    algorithm: Literal["adamw", "adamw8bit", "lion8bit"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    lora_plus: float = 1.0
    max_grad_norm: float = 0.3
    steps: int = 1875
    batch_size: int = 16
    accumulate: int = 1
    seq_len: int = 512
    remat: Literal["none", "full", "attention", "offload"] = "full"
    unroll: bool = False
    chunk_size: int = 512
    ema: float = 0.0
    eval_every: int = 0
    patience: int = 0
    save_every: int = 250
    keep: int = 2
    max_skipped: int = 5
    seed: int = 0

    def __post_init__(self):
        for name in _AT_LEAST_1:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("alpha", "learning_rate", "max_grad_norm", "lora_plus"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("dropout", "b1", "b2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        for name in ("weight_decay", "neftune_alpha", "eval_every", "patience", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name, hint in typing.get_type_hints(type(self)).items():
            if typing.get_origin(hint) is not Literal:
                continue
            if getattr(self, name) not in (options := typing.get_args(hint)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be one of "
                    f"{', '.join(map(str, options))}."
                )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of "
                f"accumulate={self.accumulate}."
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be at most steps={self.steps}."
            )
        if self.patience and not self.eval_every:
            raise ValueError(
                f"patience={self.patience} counts evaluations: say how often by "
                "eval_every."
            )

    def learning_rates(self) -> optax.Schedule:
        """Returns the learning rate as a function of the step, counted from 0."""
        rest = max(self.steps - self.warmup_steps, 1)
        peak = self.learning_rate
        match self.schedule:
            case "constant":
                after = optax.constant_schedule(peak)
            case "linear":
                after = optax.linear_schedule(peak, 0.0, rest)
            case "cosine":
                after = optax.cosine_decay_schedule(peak, rest)
        if not self.warmup_steps:
            return after
        # The first step already moves: step i of the warm-up has rate (i + 1) / n.
        n = self.warmup_steps
        rising = optax.linear_schedule(peak / n, peak, max(n - 1, 1))
        return optax.join_schedules([rising, after], [n])

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer behind a clip of the global norm.

        It leaves out gradients that are no numbers, see `optim.skip_nonfinite`.
        """
        rates, decay = self.learning_rates(), self.weight_decay
        match self.algorithm:
            case "adamw":
                inner = optax.adamw(rates, self.b1, self.b2, weight_decay=decay)
            case "adamw8bit":
                inner = adamw8bit(rates, self.b1, self.b2, weight_decay=decay)
            case "lion8bit":
                inner = lion8bit(rates, self.b1, self.b2, weight_decay=decay)
        chain = [optax.clip_by_global_norm(self.max_grad_norm), inner]
        if self.lora_plus != 1:
            chain.append(lora_plus(self.lora_plus))
        return skip_nonfinite(optax.chain(*chain))


_AT_LEAST_1 = (
    "rank", "steps", "batch_size", "accumulate", "seq_len", "chunk_size", "save_every",
    "keep", "max_skipped",
)  # fmt: skip
# What may change when a run is taken up again: it changes no number of a step.
_FREE = {
    "remat", "unroll", "chunk_size", "eval_every", "patience", "save_every", "keep",
    "max_skipped",
}  # fmt: skip


def may_change(schedule: str) -> set[str]:
    """Returns the settings of `TrainConfig` that a resumed run may have otherwise.

    Without a schedule that ends at the last step, a run may be made longer.
    """
    return _FREE | ({"steps"} if schedule == "constant" else set())


def check_same_run(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Compares the hyperparameters of a saved run with those of the one going on.

    Raises:
        ValueError: naming what differs.
    """
    free = may_change(config.schedule)
    changed = []
    for field in dataclasses.fields(TrainConfig):
        # A run saved before there was such a setting was run with its default.
        now, before = getattr(config, field.name), saved.get(field.name, field.default)
        if field.name not in free and now != before:
            changed.append(f"{field.name}={now!r} (saved: {before!r})")
    if changed:
        raise ValueError(
            f"The saved run has other settings: {', '.join(changed)}. Give the same "
            "ones, or start anew in another folder."
        )
