"""The folder of a run: its settings, its numbers, its checkpoints, its report."""

import errno
import fcntl
import json
import os
import pathlib
import weakref
from collections.abc import Collection, Mapping
from typing import Any

from qlora_jax import atomic
from qlora_jax.callbacks import JsonlLog
from qlora_jax.checkpoint import Checkpoints
from qlora_jax.environment import environment
from qlora_jax.memory import peak_rss_gb
from qlora_jax.report import write_report

# What is written before a folder holds a run, the last one being `config.yaml`.
_BEGINNING = {".lock", ".writable", "data.json", "environment.json", "config.yaml"}


class Run:
    """A folder that holds one run.

        config.yaml       the settings
        environment.json  versions, device, when: one entry each time it was taken up
        data.json         what it learns from, with checksums, if `check_data` was told
        metrics.jsonl     a line for each step; the last one sums the run up
        report.md         all of it to read, with loss.png and curves.png
        checkpoints/      the last states, to go on from

    Making a `Run` leaves nothing behind, so that a wrong call does not either; the
    folder begins with the first line of metrics.

    Args:
        folder: where.
        settings: all that determines the run, as YAML can hold it.
        resume: go on with a run that is there. If there is none, one begins: the same
            command serves first and again.
        may_change: names of settings that a run taken up again may have otherwise, see
            `train.may_change`.
        defaults: what settings were before there were such, so that a run begun by an
            earlier version goes on.

    Attributes:
        folder: where.
        log: the lines of metrics.
        checkpoints: the saved states.

    Raises:
        ValueError: if the folder holds a run and `resume` is not given, the run has
            other settings, or the folder holds something else or cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        may_change: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ):
        self.folder = pathlib.Path(folder)
        # As it will be read back: tuples become lists, paths text.
        self._settings = _as_read(settings)
        self._defaults = _as_read(defaults or {})
        self._data: Mapping[str, Any] | None = None
        self._begun = False
        self._lock_file: int | None = None
        self.log = JsonlLog(self.folder / "metrics.jsonl")
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self._check(resume, may_change)
        _check_writable(self.folder)
        if (self.folder / "config.yaml").is_file():
            self._lock()

    def _check(self, resume: bool, may_change: Collection[str]) -> None:
        import yaml

        config = self.folder / "config.yaml"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; choose another folder.")
        if not config.is_file():
            # One that was killed while it began has some of these.
            held = (
                {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else ()
            )
            if any(atomic.name_when_whole(name) not in _BEGINNING for name in held):
                raise ValueError(
                    f"{self.folder} holds files and no run; choose another folder."
                )
            return
        if not resume:
            raise ValueError(
                f"{self.folder} holds a run already: add --resume to go on with it, or "
                "choose another folder."
            )
        saved = yaml.safe_load(config.read_text(encoding="utf-8"))
        saved = self._defaults | saved
        names = (saved.keys() | self._settings.keys()) - set(may_change)
        changed = [
            f"{name}={self._settings.get(name)!r} (there: {saved.get(name)!r})"
            for name in sorted(names)
            if saved.get(name) != self._settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other settings: {', '.join(changed)}. "
                "Give the same ones to go on with it, or choose another folder."
            )

    def _lock(self) -> None:
        """Holds the folder against other processes, as long as this one lives.

        Raises:
            ValueError: if another one holds it.
        """
        if self._lock_file is not None:
            return
        self._lock_file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, self._lock_file)
        try:
            fcntl.lockf(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks: then there is none.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"Another process is training in {self.folder}; wait for it, or "
                    "choose another folder."
                ) from None

    def check_data(self, manifest: Mapping[str, Any]) -> None:
        """Holds the run to its data: the manifest is written down with the settings.

        Args:
            manifest: what the data are, with checksums, as JSON can hold it.

        Raises:
            ValueError: if the run that is there began with other data.
        """
        self._data = _as_read(manifest)
        path = self.folder / "data.json"
        if not path.is_file():
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved != self._data:
            found = _differences(saved, self._data)
            # Hashes of all of it tell less than what they are of.
            telling = [line for line in found if not line.startswith("fingerprint")]
            raise ValueError(
                f"{self.folder} holds a run that began with other data: "
                f"{'; '.join((telling or found)[:3])}. Give the same ones to go on "
                "with it, or choose another folder."
            )

    @property
    def finished(self) -> dict[str, Any] | None:
        """The line that sums the run up, None if it did not come to its end."""
        lines = [line for line in self.log.read() if line.get("finished")]
        return lines[-1] if lines else None

    def begin(self) -> None:
        """Makes the folder and writes down settings, data and environment."""
        if self._begun:
            return
        import yaml

        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self._data is not None:
            atomic.write(
                self.folder / "data.json", json.dumps(self._data, indent=2) + "\n"
            )
        path = self.folder / "environment.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        atomic.write(path, json.dumps([*before, environment()], indent=2) + "\n")
        # Last: a folder with it holds a run.
        text = yaml.safe_dump(self._settings, sort_keys=False, allow_unicode=True)
        atomic.write(self.folder / "config.yaml", text)
        self._begun = True

    def record(self, **fields: Any) -> None:
        """Adds a line to the metrics; the first one makes the folder."""
        self.begin()
        self.log.write(**fields)

    def recorded(self, step: int) -> dict[str, Any] | None:
        """Returns the first line of a step, None if it was not written yet."""
        lines = (line for line in self.log.read() if line["step"] == step)
        return next(lines, None)

    def finish(self, **fields: Any) -> dict[str, Any]:
        """Writes the last line, with the peak of memory, and the report."""
        last = max((line["step"] for line in self.log.read()), default=0)
        summary = {**fields, "peak_rss_gb": round(peak_rss_gb(), 3)}
        self.record(step=last, finished=True, **summary)
        write_report(self.folder)
        return summary


def _as_read(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values), default=str))


def _check_writable(folder: pathlib.Path) -> None:
    """Tries to write into a folder, and leaves nothing behind.

    Raises:
        ValueError: if it cannot be written.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may try the same
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}); choose another folder."
        ) from None
    finally:
        for path in made:
            if path.is_dir():
                path.rmdir()


def _path_of(*entries: Any) -> str | None:
    """Returns the file that both entries are of, None if there is no such one."""
    paths = {e.get("path") for e in entries if isinstance(e, dict)}
    return f"{paths.pop()}:" if len(paths) == 1 and None not in paths else None


def _differences(saved: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [k for k in {**saved, **now} if saved.get(k) != now.get(k)]
        parts = [_differences(saved.get(k), now.get(k), _joined(name, k)) for k in keys]
        return [line for part in parts for line in part]
    if isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        pairs = enumerate(zip(saved, now, strict=True))
        parts = [
            _differences(a, b, _path_of(a, b) or f"{name}[{i}]")
            for i, (a, b) in pairs
            if a != b
        ]
        return [line for part in parts for line in part]
    return [f"{name} is {now!r} (there: {saved!r})"]


def _joined(name: str, key: str) -> str:
    return f"{name} {key}" if name.endswith(":") else f"{name}.{key}".strip(".")
