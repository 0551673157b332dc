"""The folder of a run: its settings, its numbers, its checkpoints, its picture."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from qlora_jax.callbacks import JsonlLog, plot_loss
from qlora_jax.checkpoint import Checkpoints
from qlora_jax.memory import peak_rss_gb


class Run:
    """A folder that holds one run.

        config.json     the settings
        metrics.jsonl   a line for each step; the last one sums the run up
        loss.png        the loss over the steps
        checkpoints/    the last states, to go on from

    Making a `Run` writes nothing, so that a wrong call leaves nothing behind; the
    folder begins with the first line of metrics.

    Args:
        folder: where.
        settings: all that determines the run, as JSON can hold it.
        resume: go on with a run that is there. If there is none, one begins: the same
            command, with this flag, serves first and again.

    Attributes:
        folder: where.
        log: the lines of metrics.
        checkpoints: the saved states.

    Raises:
        ValueError: if the folder holds a run and `resume` is not given, the run has
            other settings, or the folder holds something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
    ):
        self.folder = pathlib.Path(folder)
        # As it will be read back: tuples become lists, paths text.
        self._settings = json.loads(json.dumps(dict(settings), default=str))
        self.log = JsonlLog(self.folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self._check(resume)

    def _check(self, resume: bool) -> None:
        config = self.folder / "config.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; choose another folder.")
        if not config.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder} holds files and no run; choose another folder."
                )
            return
        if not resume:
            raise ValueError(
                f"{self.folder} holds a run already: add --resume to go on with it, or "
                "choose another folder."
            )
        saved = json.loads(config.read_text(encoding="utf-8"))
        names = sorted(saved.keys() | self._settings.keys())
        changed = [
            f"{name}={self._settings.get(name)!r} (there: {saved.get(name)!r})"
            for name in names
            if saved.get(name) != self._settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other settings: {', '.join(changed)}. "
                "Give the same ones to go on with it, or choose another folder."
            )

    def record(self, **fields: Any) -> None:
        """Adds a line to the metrics; the first one makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "config.json"
        if not config.is_file():
            partial = config.with_suffix(".partial")
            text = json.dumps(self._settings, indent=2) + "\n"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, config)
        self.log.write(**fields)

    def recorded(self, step: int) -> dict[str, Any] | None:
        """Returns the first line of a step, None if it was not written yet."""
        lines = (line for line in self.log.read() if line["step"] == step)
        return next(lines, None)

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Writes the last line, with the peak of memory, and draws the loss."""
        last = max((line["step"] for line in self.log.read()), default=0)
        summary = {**fields, "peak_rss_gb": round(peak_rss_gb(), 3)}
        self.record(step=last, finished=True, **summary)
        plot_loss(self.log, self.folder / "loss.png")
        return summary
