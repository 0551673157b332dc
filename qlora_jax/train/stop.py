"""A run that is asked to stop, by a signal, ends in order."""

import contextlib
import pathlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal asked the run to stop. Its state is saved; the same call goes on.

    Attributes:
        step: optimizer steps done.
        folder: of the run.
        signal: name of the signal.
    """

    def __init__(self, step: int, folder: pathlib.Path, signal: str):
        super().__init__(f"{signal} at step {step}; the state is saved in {folder}.")
        self.step, self.folder, self.signal = step, folder, signal


class Interruption(Exception):
    """Ends what may be ended at any point; see `StopRequest.at_once`."""


class StopRequest:
    """Notes SIGTERM and SIGINT, which schedulers and Ctrl-C send, until it is left.

    A second signal does what it did before. Outside of the main thread, where Python
    has no signals, nothing is noted.

    Attributes:
        signal: name of the signal that came, None before.
    """

    def __init__(self):
        self.signal: str | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.signal = signal.Signals(number).name
        if self._at_once:
            raise Interruption

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What runs in here, and leaves no trace, a signal ends by `Interruption`."""
        if self.signal is not None:
            raise Interruption
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
