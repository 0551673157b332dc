"""Files and folders appear whole or not at all."""

import os
import subprocess
import sys

import pytest

from qlora_jax import atomic
from tests.conftest import ROOT


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with atomic.new_file(path) as partial:
        partial.write_text("after, ä")
        assert path.read_text() == "before"
        assert atomic.name_when_whole(partial.name) == "file.txt"
    assert path.read_text() == "after, ä" and names(tmp_path) == ["file.txt"]
    atomic.write(path, b"\x00bytes")
    assert path.read_bytes() == b"\x00bytes"
    atomic.write(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode() and names(tmp_path) == ["file.txt"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(OSError, match="disk"), atomic.new_file(path) as partial:
        partial.write_text("half")
        raise OSError("no room on the disk")
    assert path.read_text() == "before" and names(tmp_path) == ["file.txt"]


def test_a_folder(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with atomic.new_folder(folder) as partial:
        (partial / "a").write_text("1")
        assert not folder.exists()
    assert names(folder) == ["a"] and names(tmp_path / "deep") == ["folder"]
    with pytest.raises(ValueError, match="exists and is not empty; give a new folder"):
        with atomic.new_folder(folder):
            pass
    other = tmp_path / "other"
    other.mkdir()  # empty: it becomes the new one
    with pytest.raises(KeyError), atomic.new_folder(other) as partial:
        (partial / "a").write_text("1")
        raise KeyError
    assert names(other) == [] and names(tmp_path) == ["deep", "other"]


def test_a_killed_process_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    code = (
        "import os, signal, sys; from qlora_jax import atomic\n"
        "with atomic.new_file(sys.argv[1]) as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert done.returncode == -9 and path.read_text() == "before"
    (left,) = {*names(tmp_path)} - {"file.txt"}
    assert atomic.name_when_whole(left) == "file.txt"


@pytest.mark.parametrize("name", ["file.txt", ".lock", "a.partial", ".a.partial"])
def test_other_names_are_themselves(name):
    assert atomic.name_when_whole(name) == name
    made = f".{name}.{os.getpid()}.partial"
    assert atomic.name_when_whole(made) == name
