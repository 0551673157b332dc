"""Files and folders that appear whole or not at all.

What is written goes beside its place, to the disk, and is renamed when it is whole: a
reader, or a process that was killed, sees what was there before or what is there now.
"""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a path to write to, which becomes `path` if nothing fails.

    Args:
        path: the file, which is replaced if it is there.
    """
    path = pathlib.Path(path)
    partial = _beside(path)
    try:
        yield partial
        with open(partial, "rb") as file:  # renamed first, it could be found empty
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file at once, text in UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with new_file(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a folder to write into, which becomes `folder` if nothing fails.

    Args:
        folder: a new one, or one that is empty.

    Raises:
        ValueError: if it is there and not empty.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; give a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(folder)
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def name_when_whole(name: str) -> str:
    """Returns the name that what a killed process left in the making was to have.

    Any other name is returned as it is.
    """
    found = _IN_THE_MAKING.fullmatch(name)
    return found["name"] if found else name


_IN_THE_MAKING = re.compile(r"\.(?P<name>.+)\.\d+\.partial")


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
