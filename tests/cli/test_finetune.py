import json
import re
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from qlora_jax.callbacks import ProgressBar
from qlora_jax.cli.finetune import _optimizer
from qlora_jax.cli.finetune_options import Finetune
from qlora_jax.cli.main import main
from qlora_jax.optim import pages
from qlora_jax.train import TrainConfig
from tests.interop.folders import write_folder
from tests.tolerances import LEAN_LOSS

# Runs are held to runs of the same programs, bit for bit.
pytestmark = [pytest.mark.unoptimized, pytest.mark.usefixtures("compiled_once")]
SMALL = {
    "steps": 6,
    "rank": 2,
    "batch_size": 2,
    "seq_len": 64,
    "learning_rate": 1e-2,
    "eval_size": 4,
    "eval_every": 3,
    "save_every": 2,
    "sample_tokens": 4,
    "samples": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, data and settings, where commands are given."""
    folder = tmp_path_factory.mktemp("finetune")
    patch = pytest.MonkeyPatch()
    patch.setenv("QLORA_JAX_CACHE", str(folder / "cache"))
    write_folder(folder / "model")
    rows = [{"instruction": f"Say {i}", "output": f"{i}."} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = SMALL | {"model": str(folder / "model")}
    settings |= {"data": str(folder / "rows.jsonl")}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def finished(place):
    out = place / "finished"
    assert main(["finetune", str(place / "config.yaml"), "--out", str(out)]) == 0
    return out


def adapter(folder, name="adapter"):
    return (folder / name / "adapter_model.safetensors").read_bytes()


def stop_after(number, patch):
    """Has the run stopped by a signal after that step."""
    step = ProgressBar.step

    def stop(self, report):
        step(self, report)
        if report.step == number:
            signal.raise_signal(signal.SIGTERM)

    patch.setattr(ProgressBar, "step", stop)


def lines_of(folder):
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_what_a_run_leaves_behind(finished):
    *_, last = lines = lines_of(finished)
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, 7))
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, 3, 6, 6]
    assert last["eval_loss_after"] < last["eval_loss_before"]
    assert last["best_step"] == 6 and last["skipped"] == 0
    assert adapter(finished) == adapter(finished, "best")
    report = (finished / "report.md").read_text()
    assert "**Before**" in report and "Say " in report and "eval_every: 3" in report
    data = json.loads((finished / "data.json").read_text())
    assert len(re.findall(r'"sha256": "[0-9a-f]{64}"', json.dumps(data))) == 1
    for name in ("loss.png", "curves.png", "environment.json"):
        assert (finished / name).is_file()


def test_its_settings_repeat_it_bit_for_bit(place, finished, capsys):
    again = place / "again"
    assert main(["finetune", str(finished / "config.yaml"), "--out", str(again)]) == 0
    assert adapter(again) == adapter(finished)
    assert (again / "config.yaml").read_text() == (finished / "config.yaml").read_text()
    said = capsys.readouterr().out
    assert "step 3: eval loss" in said and "Held-out loss after: " in said


def test_stopped_by_a_signal_the_same_command_goes_on(
    place, finished, capsys, monkeypatch
):
    out = place / "stopped"
    command = ["finetune", str(place / "config.yaml"), "--out", str(out)]
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert main(command) == 0
    said = capsys.readouterr().out
    assert "Stopped by SIGTERM after 4 steps; all is saved." in said
    assert f"To go on: qlora-jax finetune {place}/config.yaml --out {out}" in said
    assert not (out / "adapter").exists()
    assert main(command) == 0
    assert adapter(out) == adapter(finished)
    # Once more: there is nothing to do, and nothing is done.
    assert main(command) == 0
    assert "is finished: 6 steps" in capsys.readouterr().out


def test_lean_adapters_learn_alike_and_go_on_alike(place, finished, monkeypatch):
    config, whole, parts = str(place / "config.yaml"), place / "lean", place / "parts"
    assert main(["finetune", config, "--out", str(whole), "--lean"]) == 0
    written = load_file(whole / "adapter" / "adapter_model.safetensors")
    for x in written.values():  # in float32, numbers of bfloat16
        np.testing.assert_array_equal(x, x.astype(ml_dtypes.bfloat16).astype(x.dtype))
    loss, plain = (lines_of(f)[-1]["eval_loss_after"] for f in (whole, finished))
    assert loss == pytest.approx(plain, rel=LEAN_LOSS)

    command = ["finetune", config, "--out", str(parts), "--lean"]
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert main(command) == 0
    assert main(command) == 0
    assert adapter(parts) == adapter(whole)


def test_a_lean_page_has_a_layer_at_least(monkeypatch):
    monkeypatch.setattr(pages, "PAGE_SIZE", 2**10)
    layers = {"a": jnp.zeros((2, 512, 128), jnp.bfloat16)}
    args = Finetune(data=("rows.jsonl",), lean=True)
    state = _optimizer(args, TrainConfig(), layers).init(layers)
    assert {x.size for x in jax.tree.leaves(state)} == {1, 512 * 128}


def test_a_finished_run_may_be_made_longer(place, finished, capsys):
    longer, out = place / "longer", place / "in_parts"
    config = str(place / "config.yaml")
    assert main(["finetune", config, "--out", str(longer), "--steps", "8"]) == 0
    assert main(["finetune", config, "--out", str(out)]) == 0
    again = ["--steps", "8", "--save-every", "3", "--eval-every", "4"]
    assert main(["finetune", config, "--out", str(out), *again]) == 0
    assert adapter(out) == adapter(longer) != adapter(finished)


def test_what_is_wrong_is_said_in_one_line(place, finished, capsys, tmp_path):
    config, rows = str(place / "config.yaml"), place / "rows.jsonl"
    bad = tmp_path / "bad.yaml"
    bad.write_text("learning_rat: 1")
    foreign = tmp_path / "foreign.yaml"
    foreign.write_text("lr: 1e-4")
    typed = tmp_path / "typed.yaml"
    typed.write_text("steps: 1.5")
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text() + '\n{"instruction": "x", "output": "y"}')
    out = ["--out", str(finished)]
    for arguments, words in [
        ([], "say what to learn from: --data FILE"),
        (["--rnk", "3"], "Unrecognized options: --rnk, 3. Perhaps you meant --rank."),
        (["--lora-r=3"], "Unrecognized options: --lora-r=3. Perhaps you meant --rank."),
        (["--zzz"], "Unrecognized options: --zzz. See qlora-jax finetune --help."),
        (["--rank", "x"], "Error parsing --rank: invalid literal for int()"),
        (["--schedule", "cos"], "Expected one of ('constant', 'linear', 'cosine')"),
        (["--data", "x", "--rank", "0"], "rank=0 must be at least 1"),
        (["--preset", "guanaco"], "must be one of guanaco-7b, guanaco-13b"),
        (["absent.yaml"], "absent.yaml cannot be read: No such file"),
        ([str(bad)], "no setting 'learning_rat'; did you mean 'learning_rate'?"),
        ([str(foreign)], "no setting 'lr'; did you mean 'learning_rate'?"),
        ([str(typed)], "steps is 1.5, expected a whole number."),
        ([config, *out, "--seed", "1"], "with other settings: seed=1 (there: 0)"),
        ([config, *out, "--no-resume"], "holds a run already"),
        ([config, *out, "--data", str(other)], "with other settings: data="),
        ([config, "--out", "/proc/x/run"], "/proc/x/run cannot be written"),
        ([config, "--eval-size", "0"], "asks for evaluations: give --eval-size"),
        ([config, "--data", "absent.jsonl"], "There is no data file absent.jsonl"),
        ([config, "--model", "absent"], "There is no model at absent"),
        ([config, "--lean", "--ema", "0.9"], "ema=0.9 keeps a running mean of the"),
        ([config, "--lora-plus", "-1"], "lora_plus=-1.0 must be positive"),
    ]:
        if "--out" not in arguments and arguments[:1] == [config]:
            arguments = [*arguments, "--out", str(tmp_path / "new")]
        assert main(["finetune", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("qlora-jax: ") and words in line
    assert not (tmp_path / "new").exists()


def test_other_rows_in_the_same_file_are_refused(place, capsys, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows.write_text((place / "rows.jsonl").read_text())
    command = ["finetune", str(place / "config.yaml"), "--data", str(rows)]
    command += ["--out", str(out), "--eval-every", "0", "--samples", "0"]
    assert main([*command, "--steps", "1"]) == 0
    rows.write_text(rows.read_text().replace("Say 3", "Tell 3"))
    capsys.readouterr()
    assert main([*command, "--steps", "2"]) == 2
    said = capsys.readouterr().err
    assert "holds a run that began with other data: " in said and "sha256" in said


def test_another_model_in_the_same_place_is_refused(place, finished, capsys):
    weights = place / "model" / "model.safetensors"
    before = weights.read_bytes()
    command = ["finetune", str(place / "config.yaml"), "--out", str(finished)]
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert main([*command, "--steps", "9"]) == 2
    finally:
        weights.write_bytes(before)
    said = capsys.readouterr().err
    assert "other data: model.model.safetensors is " in said
