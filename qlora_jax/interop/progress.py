"""How far reading or writing a model is: bytes, speed, and the time that is left."""

import sys
import time
from typing import Any

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows bytes done of bytes in all.

    A bar that moves on a terminal (by `rich`, if it is installed); elsewhere, as in a
    log, a line every five seconds, so that what is quick prints nothing.

        with Progress("Loading", total) as progress:
            progress.advance(nbytes)

    Args:
        what: what is being done, in front of the numbers.
        total: bytes in all.
        show: None as above; True also prints a line at the end, False shows nothing.
    """

    def __init__(self, what: str, total: int, show: bool | None = None):
        self._what, self._total, self._show = what, max(total, 1), show
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        self._start = self._last = time.monotonic()
        if self._show is not False and sys.stderr.isatty():
            self._bar = _bar(self._what, self._total)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._show and kind is None:
            self._line(time.monotonic())

    def advance(self, nbytes: int) -> None:
        """Counts bytes that are done."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
            return
        now = time.monotonic()
        if self._show is not False and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            self._line(now)

    def _line(self, now: float) -> None:
        seconds = max(now - self._start, 1e-9)
        speed = self._done / seconds
        left = (self._total - self._done) / speed if speed else float("inf")
        unit, size = ("GB", 1e9) if self._total >= 1e9 else ("MB", 1e6)
        done, total = self._done / size, self._total / size
        print(
            f"{self._what}: {done:.2f} of {total:.2f} {unit}, "
            f"{speed / size:.2f} {unit}/s, {seconds:.0f} s, {max(left, 0):.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def _short(what: str) -> str:
    """Returns both ends of what is longer than a bar has room for, as a path is."""
    return what if len(what) <= 30 else f"{what[:8]}…{what[-21:]}"


def _bar(what: str, total: int) -> Any:
    try:
        from rich import console, progress
    except ImportError:
        return None
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("left"),
        console=console.Console(stderr=True),
    )
    bar.add_task(_short(what), total=total)
    bar.start()
    return bar
