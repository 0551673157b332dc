"""What happens beside the training: progress shown, numbers written down."""

import dataclasses
import datetime
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from qlora_jax import atomic, memory

_SECONDS_BETWEEN_LINES = 600.0


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
        seconds: from the step's beginning, its data included, to the next one's; of
            the last before a pause (an evaluation, a checkpoint), what it took alone.
        skipped: steps so far that were not taken, for want of a finite gradient.
        mfu: share of the device's peak that the model's operations took, see
            `throughput`; None where the peak is not known.
    """

    step: int
    steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    target_tokens: int
    seconds: float
    skipped: int = 0
    mfu: float | None = None

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

    def evaluated(
        self, step: int, numbers: Mapping[str, Any], model: Any, best: bool
    ) -> None:
        """The model after `step` steps was evaluated; `best`: better than before."""

    def end(self) -> None:
        """The last step is done, or the run ended in another way."""


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
        """Adds a line; what is no finite number is written as null."""
        with open(self.path, "ab+") as file:
            # A process killed while it wrote left half a line.
            end = file.seek(0, os.SEEK_END)
            while end and _byte_before(file, end) != b"\n":
                end -= 1
            file.truncate(end)
            file.write((json.dumps(_finite(fields)) + "\n").encode())

    def start(self, step: int, steps: int) -> None:
        """Drops what an interrupted run wrote after `step`."""
        lines = [line for line in self.read() if line["step"] <= step]
        kept = [json.dumps(line) + "\n" for line in lines if "finished" not in line]
        atomic.write(self.path, "".join(kept))

    def step(self, report: StepReport) -> None:
        """Writes the step."""
        fields = dataclasses.asdict(report)
        del fields["steps"]
        if report.mfu is None:
            del fields["mfu"]
        peak = round(memory.peak_gb(), 3)
        self.write(**fields, tokens_per_s=report.tokens_per_s, peak_gb=peak)

    def evaluated(
        self, step: int, numbers: Mapping[str, Any], model: Any, best: bool
    ) -> None:
        """Writes the numbers of the evaluation."""
        self.write(step=step, **numbers, best=best)


def _byte_before(file: BinaryIO, end: int) -> bytes:
    file.seek(end - 1)
    return file.read(1)


def _finite(value: Any) -> Any:
    """Returns a value as strict JSON can hold it."""
    match value:
        case dict():
            return {key: _finite(v) for key, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case float() if not math.isfinite(value):
            return None
    return value


class ProgressBar(Callback):
    """Shows loss, learning rate, gradient norm, throughput, memory and time left.

    A bar that moves on a terminal; elsewhere, as in a log, a line every tenth of the
    run, and ten minutes after the last line. Needs `rich` on a terminal.
    """

    def __init__(self):
        self._progress: Any = None
        self._seconds: list[float] = []
        self._silent = 0.0

    def start(self, step: int, steps: int) -> None:
        """Draws the bar, and says where a run that is taken up again goes on."""
        if step:
            print(f"Going on after step {step} of {steps}", flush=True)
        if not sys.stdout.isatty():
            return
        self._progress = _bar()
        self._progress.start()
        self._task = self._progress.add_task(
            "", total=steps, completed=step, numbers=""
        )

    def step(self, report: StepReport) -> None:
        """Moves the bar."""
        self._seconds.append(report.seconds)
        self._silent += report.seconds
        if self._progress is not None:
            self._progress.update(
                self._task, completed=report.step, numbers=_numbers(report)
            )
        elif self._is_due(report):
            self._silent = 0.0
            # The first step of a run is mostly compilation.
            usual = sorted(self._seconds)[len(self._seconds) // 2]
            left = round(usual * (report.steps - report.step))
            width = len(str(report.steps))
            print(
                f"step {report.step:{width}}/{report.steps}  {_numbers(report)}  "
                f"{datetime.timedelta(seconds=left)} left",
                flush=True,
            )

    def _is_due(self, report: StepReport) -> bool:
        """Whether a log has a line of this step."""
        tenth = report.step % max(report.steps // 10, 1) == 0
        return tenth or self._silent >= _SECONDS_BETWEEN_LINES

    def evaluated(
        self, step: int, numbers: Mapping[str, Any], model: Any, best: bool
    ) -> None:
        """Prints the numbers of the evaluation, above the bar."""
        shown = [
            f"{name.replace('_', ' ')} {value:.4g}"
            for name, value in numbers.items()
            if isinstance(value, int | float)
        ]
        line = f"step {step}: {', '.join(shown)}{' (best)' if best else ''}"
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            print(line, flush=True)

    def end(self) -> None:
        """Leaves the bar as it is."""
        if self._progress is not None:
            self._progress.stop()


def _bar() -> Any:
    """Returns a bar with the numbers of the step under it: one line is not enough."""
    from rich import progress, text

    class Bar(progress.Progress):
        def get_renderables(self):
            yield from super().get_renderables()
            yield from (text.Text(task.fields["numbers"]) for task in self.tasks)

    return Bar(
        progress.TextColumn("step {task.completed}/{task.total}"),
        progress.BarColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
    )


def _numbers(report: StepReport) -> str:
    parts = [
        f"loss {report.loss:.3f}",
        f"rate {report.learning_rate:.2g}",
        f"gradient {report.grad_norm:.2g}",
        f"{report.tokens_per_s:,.0f} tokens/s",
    ]
    if report.mfu is not None:
        parts.append(f"MFU {report.mfu:.0%}")
    if report.skipped:
        parts.append(f"{report.skipped} skipped")
    return "  ".join([*parts, f"{memory.peak_gb():.2f} GB"])
