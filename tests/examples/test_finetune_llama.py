"""The main job as a user runs it: a process of its own, on a small model."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
import safetensors.numpy

from tests.conftest import ROOT
from tests.interop.folders import write_folder

pytestmark = pytest.mark.slow
EXAMPLE = ROOT / "examples" / "finetune_llama.py"
# Installed or not, the working tree is what is tested; one device, as users have.
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
}
SMALL = ["--steps", "4", "--batch-size", "2", "--seq-len", "80", "--rank", "2"]
SMALL += ["--eval-rows", "4", "--save-every", "2", "--warmup-steps", "0"]


def command(model, data, out, *options):
    arguments = ["--model", model, "--data", data, "--out", out, *SMALL, *options]
    return [sys.executable, str(EXAMPLE), *map(str, arguments)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Starts the example; what one process has compiled the next ones find."""
    environment = ENVIRONMENT | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def started(*arguments, start=subprocess.run, **how):
        return start(command(*arguments), cwd=ROOT, env=environment, **how)

    return started


TOLD = {"capture_output": True, "text": True}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assets")
    write_folder(folder / "model")
    rows = [{"instruction": f"Say {i}", "output": f"{i}."} for i in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def finished(assets, run):
    out = assets / "finished"
    return run(assets / "model", assets / "rows.jsonl", out, **TOLD), out


def lines_of(out):
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_what_it_prints_and_writes(finished):
    done, out = finished
    assert done.returncode == 0, done.stderr
    for words in [
        "Data: 12 rows, and 4 held out",
        "Frozen: 21 matrices in nf4",
        "bits a parameter",
        "Trained: ",
        "Held-out loss before: ",
        "step 4/4  loss ",
        "Held-out loss after: ",
        "Question: Say 0",
    ]:
        assert words in done.stdout
    *_, last = lines = lines_of(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    for name in ("eval_loss_before", "eval_loss_after", "peak_rss_gb", "seconds"):
        assert last[name] > 0
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and adapter["peft_type"] == "LORA"
    assert (out / "loss.png").is_file() and (out / "config.yaml").is_file()


def test_killed_and_taken_up_again_it_ends_the_same(assets, finished, run):
    _, unbroken = finished
    out = assets / "killed"
    arguments = assets / "model", assets / "rows.jsonl", out, "--resume"
    process = run(*arguments, start=subprocess.Popen, stdout=subprocess.DEVNULL)
    while not (out / "checkpoints" / "2").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(*arguments, **TOLD)
    assert resumed.returncode == 0, resumed.stderr

    def adapter(folder):
        path = folder / "adapter" / "adapter_model.safetensors"
        return safetensors.numpy.load_file(path)

    expected, found = adapter(unbroken), adapter(out)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (value == found[name]).all(), name

    def losses(folder):
        return [line.get("loss", line.get("eval_loss")) for line in lines_of(folder)]

    assert losses(out) == losses(unbroken)


def test_what_is_wrong_is_said_in_one_line(assets, finished, run, monkeypatch):
    _, taken = finished
    model, rows = assets / "model", assets / "rows.jsonl"
    bad = assets / "bad.jsonl"
    bad.write_text('{"instruction": "x", "output": "y"}\n{"question": "z"}\n')
    truncated = assets / "truncated.gguf"
    truncated.write_bytes(b"GGUF\3\0\0\0")
    done = run(assets / "absent", rows, assets / "new", **TOLD)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("finetune_llama.py: There is no model at ")
    for arguments, words in [
        ((truncated, rows, assets / "new"), "truncated.gguf: the header wants 8 bytes"),
        ((model, bad, assets / "new"), "bad.jsonl, line 2 has no field 'instruction'"),
        ((model, assets / "no", assets / "new"), "There is no data file"),
        ((model, rows, taken), "holds a run already: add --resume to go on with it"),
        ((model, rows, taken, "--resume", "--seed", "5"), "seed=5 (there: 0)"),
        ((model, rows, assets / "new", "--rank", "0"), "rank=0 must be at least 1"),
        ((model, rows, assets / "new", "--rank", "99"), "rank=99 of 'layers/"),
        ((model, rows, taken, "--unroll", "--remat", "x"), "remat='x' must be one of"),
    ]:
        monkeypatch.setattr(sys, "argv", command(*arguments)[1:])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        line = end.value.code  # Python writes it to stderr and exits with 1
        assert isinstance(line, str) and "\n" not in line
        assert line.startswith("finetune_llama.py: ") and words in line
    assert not (assets / "new").exists()
