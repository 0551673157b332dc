"""A small hub on this machine, spoken to by huggingface_hub itself."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from tests.conftest import ROOT
from tests.interop.folders import write_folder
from tests.interop.test_gguf import write_gguf

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
TOKEN = "hf_abc"


@pytest.fixture
def hub(tmp_path):
    """The address of a hub with owner/tiny, and the requests that it has had."""
    root = tmp_path / "repository"
    write_folder(root)
    write_gguf(root / "m.gguf")
    (root / "pytorch_model.bin").write_bytes(b"\x80\x04.")  # not to be asked for
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):  # quiet
            pass

        def answer(self, status, data, **headers):
            self.send_response(status)
            headers |= {"Content-Length": str(len(data))}
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def do_GET(self):
            words = self.path.partition("?")[0].split("/")
            asked.append((self.command, words[-1]))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer(401, b"", X_Error_Code="GatedRepo")
            elif words[1] == "api" and "tree" in words:
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size}
                    for p in root.iterdir()
                ]
                files = [file | {"oid": "0" * 40} for file in files]
                self.answer(200, json.dumps(files).encode())
            elif words[1] == "api":
                names = [{"rfilename": p.name} for p in root.iterdir()]
                about = {"id": "owner/tiny", "sha": COMMITS[words[-1]]}
                about |= {"_id": "0", "siblings": names}
                self.answer(200, json.dumps(about).encode())
            else:
                data = (root / words[-1]).read_bytes()
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                commit = COMMITS.get(words[4], words[4])
                self.answer(200, data, ETag=etag, X_Repo_Commit=commit)

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def run(tmp_path, *arguments, **settings):
    """What the command line prints; it reads its settings when it is imported."""
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"HF_HOME": str(tmp_path / "home"), **settings}
    return subprocess.run(
        [sys.executable, "-m", "qlora_jax.cli", "inspect", *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_token_revision_and_cache(hub, tmp_path):
    address, asked = hub
    refused = run(tmp_path, "owner/tiny", HF_ENDPOINT=address)
    assert refused.returncode == 2
    assert "401" in refused.stderr and "$HF_TOKEN" in refused.stderr
    command = ("owner/tiny", "--revision", "v1")
    asked.clear()
    done = run(tmp_path, *command, HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.self_attn.q_proj.weight" in done.stdout
    files = {name for method, name in asked if method == "GET"}
    assert {"v1", "model.safetensors", "config.json"} <= files
    assert not files & {"pytorch_model.bin", "m.gguf"}
    snapshots = tmp_path / "home" / "hub" / "models--owner--tiny" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == [COMMITS["v1"]]
    # What came is there without a network, and what did not is not asked for.
    asked.clear()
    again = run(tmp_path, *command, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout == done.stdout
    other = run(tmp_path, "owner/tiny", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert other.returncode == 2 and "outgoing traffic" in other.stderr
    assert not asked


def test_one_file_of_a_repository(hub, tmp_path):
    address, asked = hub
    settings = {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN}
    done = run(tmp_path, "owner/tiny/m.gguf", "--revision", "main", **settings)
    assert done.returncode == 0, done.stderr
    assert "blk.0.attn_q.weight" in done.stdout
    files = {name for _, name in asked}
    assert "m.gguf" in files and not files & {"model.safetensors", "config.json"}
