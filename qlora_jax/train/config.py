"""The hyperparameters of a run, and what may change when it is taken up again."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import optax

Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of a run; the defaults are those of QLoRA's paper at 7B.

    Attributes:
        rank: of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: on the adapters' input; the paper has 0.1 up to 13B and 0.05 above.
        learning_rate: its largest value; the paper has 1e-4 from 33B.
        schedule: how it goes on after the warm-up: "constant", or to 0 at the last step
            along a line or a cosine.
        warmup_steps: it rises from 0 over so many steps.
        b1: AdamW's decay of the mean.
        b2: AdamW's decay of the square.
        weight_decay: AdamW's.
        max_grad_norm: gradients of a larger global norm are scaled down to it.
        steps: optimizer steps.
        batch_size: rows of an optimizer step.
        accumulate: in how many parts, one after another, those rows are computed.
        seq_len: tokens of a row.
        remat: what the backward recomputes, see `Llama.hidden`.
        chunk_size: tokens whose logits are in memory at a time.
        save_every: optimizer steps between checkpoints.
        seed: of the adapters, the order of the rows, and dropout.

    Raises:
        ValueError: if a number is out of its range, or the parts do not divide a batch.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    learning_rate: float = 2e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    steps: int = 1875
    batch_size: int = 16
    accumulate: int = 1
    seq_len: int = 512
    remat: Literal["none", "full", "attention", "offload"] = "full"
    chunk_size: int = 512
    save_every: int = 250
    seed: int = 0

    def __post_init__(self):
        for name in ("rank", "steps", "batch_size", "accumulate", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("chunk_size", "save_every", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"{self.batch_size=} must be a multiple of {self.accumulate=}."
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"{self.warmup_steps=} must be at most {self.steps=}.")

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
            case _:
                raise ValueError(
                    f"{self.schedule=} must be one of constant, linear, cosine."
                )
        if not self.warmup_steps:
            return after
        # The first step already moves: step i of the warm-up has rate (i + 1) / n.
        n = self.warmup_steps
        rising = optax.linear_schedule(peak / n, peak, max(n - 1, 1))
        return optax.join_schedules([rising, after], [n])

    def optimizer(self) -> optax.GradientTransformation:
        """Returns AdamW behind a clip of the global norm."""
        adamw = optax.adamw(
            self.learning_rates(), self.b1, self.b2, weight_decay=self.weight_decay
        )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adamw)


# What may change when a run is taken up again: it changes no number of it.
_FREE = {"save_every", "remat", "chunk_size"}


def check_same_run(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Compares the hyperparameters of a saved run with those of the one going on.

    Raises:
        ValueError: naming what differs.
    """
    now = dataclasses.asdict(config)
    # Without a schedule that ends at the last step, a run may be made longer.
    free = _FREE | ({"steps"} if config.schedule == "constant" else set())
    changed = [
        f"{name}={now[name]!r} (saved: {saved.get(name)!r})"
        for name in now
        if name not in free and now[name] != saved.get(name)
    ]
    if changed:
        raise ValueError(
            f"The saved run has other settings: {', '.join(changed)}. Give the same "
            "ones, or start anew in another folder."
        )
