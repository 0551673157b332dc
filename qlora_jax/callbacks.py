"""What happens beside the training: progress shown, numbers written down."""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

from qlora_jax import memory


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The numbers of one optimizer step.

    Attributes:
        step: counted from 1.
        steps: of the whole run.
        loss: mean over the tokens to be predicted, nats.
        grad_norm: global norm of the gradient, before it is clipped.
        learning_rate: of this step.
        tokens: tokens computed, padding included.
        target_tokens: tokens predicted.
        seconds: since the report before, or the start of the loop.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    target_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed in a second."""
        return self.tokens / max(self.seconds, 1e-9)


class Callback:
    """Is told about a run; every method may be overridden."""

    def start(self, step: int, steps: int) -> None:
        """The loop begins after `step` of `steps` steps (0, or where it was saved)."""

    def step(self, report: StepReport) -> None:
        """A step is done."""

    def end(self) -> None:
        """The last step is done."""


class JsonlLog(Callback):
    """Writes a line of JSON for each step.

    Args:
        path: the file. A run that is taken up again first drops the lines of steps that
            were not saved.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)

    def read(self) -> list[dict[str, Any]]:
        """Returns the lines written so far; a half-written last one is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def write(self, **fields: Any) -> None:
        """Adds a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def start(self, step: int, steps: int) -> None:
        """Drops what an interrupted run wrote after `step`."""
        lines = [line for line in self.read() if line["step"] <= step]
        kept = [json.dumps(line) + "\n" for line in lines if "finished" not in line]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def step(self, report: StepReport) -> None:
        """Writes the step."""
        fields = dataclasses.asdict(report)
        del fields["steps"]
        self.write(**fields, tokens_per_s=report.tokens_per_s)


class ProgressBar(Callback):
    """Shows loss, tokens a second, time left and memory.

    A bar that moves on a terminal; elsewhere, as in a log, a line every tenth of the
    run. Needs `rich` on a terminal.
    """

    def __init__(self):
        self._progress: Any = None
        self._seconds: list[float] = []

    def start(self, step: int, steps: int) -> None:
        """Draws the bar."""
        if not sys.stdout.isatty():
            return
        from rich import progress

        self._progress = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        self._progress.start()
        self._task = self._progress.add_task(
            "", total=steps, completed=step, numbers=""
        )

    def step(self, report: StepReport) -> None:
        """Moves the bar."""
        self._seconds.append(report.seconds)
        numbers = (
            f"loss {report.loss:.3f}  {report.tokens_per_s:,.0f} tokens/s  "
            f"{memory.peak_gb():.2f} GB"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=report.step, numbers=numbers)
        elif report.step % max(report.steps // 10, 1) == 0:
            # The first step of a run is mostly compilation.
            usual = sorted(self._seconds)[len(self._seconds) // 2]
            left = usual * (report.steps - report.step)
            width = len(str(report.steps))
            print(
                f"step {report.step:{width}}/{report.steps}  {numbers}  "
                f"{left:,.0f} s left",
                flush=True,
            )

    def end(self) -> None:
        """Leaves the bar as it is."""
        if self._progress is not None:
            self._progress.stop()


def plot_loss(log: JsonlLog, path: str | os.PathLike[str]) -> None:
    """Draws the loss over the steps of a log into a PNG file; needs `matplotlib`."""
    from matplotlib.figure import Figure

    lines = log.read()
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [
        (line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    axes.plot(*zip(*points, strict=True), label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
