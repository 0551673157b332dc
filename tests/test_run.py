import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
import yaml

from qlora_jax.callbacks import ProgressBar, StepReport
from qlora_jax.run import Run
from tests.conftest import ROOT

SETTINGS = {"model": "x", "sizes": (1, 2)}


def report(step, loss=2.0):
    return StepReport(
        step=step,
        steps=20,
        loss=loss,
        grad_norm=0.5,
        learning_rate=1e-3,
        tokens=100,
        target_tokens=40,
        seconds=0.5,
    )


def test_a_run_writes_its_settings_numbers_and_picture(tmp_path):
    run = Run(tmp_path / "a" / "run", SETTINGS)
    assert not (tmp_path / "a").exists()
    run.record(step=0, eval_loss=3.0)
    run.log.start(0, 2)
    run.log.step(report(1))
    run.log.step(report(2, 1.5))
    summary = run.finish(eval_loss=1.0, seconds=3.0)
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["sizes"] == [1, 2]
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert lines[1]["loss"] == 2.0 and lines[1]["tokens_per_s"] == 200
    assert 0.05 < lines[1]["peak_gb"] < 100
    assert lines[-1]["finished"] and lines[-1]["eval_loss"] == 1.0
    assert 0.05 < summary["peak_rss_gb"] < 100
    for name in ("loss.png", "curves.png"):
        assert (run.folder / name).read_bytes().startswith(b"\x89PNG")
    (entry,) = json.loads((run.folder / "environment.json").read_text())
    assert entry["packages"]["jax"] and entry["device"] and entry["python"]


def test_a_folder_that_holds_something_is_not_written_over(tmp_path):
    run = Run(tmp_path / "run", SETTINGS)
    run.record(step=0)
    with pytest.raises(ValueError, match="holds a run already: add --resume to go on"):
        Run(tmp_path / "run", SETTINGS)
    with pytest.raises(ValueError, match=r"other settings: model='y' \(there: 'x'\)"):
        Run(tmp_path / "run", SETTINGS | {"model": "y"}, resume=True)
    Run(tmp_path / "run", SETTINGS, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds files and no run"):
            Run(tmp_path / "other", SETTINGS, resume=resume)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; choose another folder"):
        Run(tmp_path / "file", SETTINGS)


def test_lines_of_steps_that_were_not_saved_are_dropped(tmp_path):
    run = Run(tmp_path, SETTINGS, resume=True)
    run.record(step=0, answer="\u2028")
    for step in (1, 2, 3):
        run.log.step(report(step))
    run.finish(eval_loss=1.0)
    with open(run.log.path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    again = Run(tmp_path, SETTINGS, resume=True)
    again.log.start(2, 20)
    assert [line["step"] for line in again.log.read()] == [0, 1, 2]
    assert again.recorded(step=0) == {"step": 0, "answer": "\u2028"}
    assert again.recorded(step=3) is None


def test_progress_in_a_log_is_ten_plain_lines(capsys):
    bar = ProgressBar()
    bar.start(0, 20)
    for step in range(1, 21):
        bar.step(report(step, 2.5))
    bar.end()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith(
        "step  2/20  loss 2.500  rate 0.001  gradient 0.5  200 tokens/s"
    )
    assert lines[0].endswith(" GB  0:00:09 left")
    # A long run says something every ten minutes.
    bar = ProgressBar()
    bar.start(0, 2000)
    for step in range(1, 5):
        bar.step(dataclasses.replace(report(step), steps=2000, seconds=300.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step    2", "step    4"]
    assert lines[0].endswith("6 days, 22:30:00 left")


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = ProgressBar()
    bar.start(5, 20)
    bar.step(report(6, 2.5))
    assert bar._progress.tasks[0].completed == 6
    assert "loss 2.500  rate 0.001" in bar._progress.tasks[0].fields["numbers"]
    bar.evaluated(6, {"eval_loss": 2.0, "samples": []}, None, True)
    said = capsys.readouterr().out
    assert said.startswith("Going on after step 5 of 20\n")
    assert "step 6: eval loss 2 (best)" in said
    bar.end()
    assert isinstance(bar._progress.console, rich.console.Console)


def test_the_bar_fits_on_a_terminal_of_80_columns(monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = ProgressBar()
    bar.start(0, 1875)
    numbers = {"steps": 1875, "tokens": 16 * 512, "mfu": 0.55, "learning_rate": 2e-4}
    bar.step(dataclasses.replace(report(120, 2.512), **numbers))
    bar.end()
    capsys.readouterr()
    page = rich.console.Console(width=80)
    page.print(bar._progress.get_renderable())
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 120/1875 ") and first.endswith(" left")
    assert second.startswith("loss 2.512  rate 0.0002  gradient 0.5  16,384 tokens/s  ")
    assert second.endswith(" GB") and "MFU 55%" in second


def test_what_is_no_number_is_null_and_what_is_half_a_line_is_gone(tmp_path):
    run = Run(tmp_path / "run", SETTINGS)
    run.record(step=0, eval_loss=float("nan"), samples=[{"x": float("inf")}])
    with open(run.log.path, "a") as file:
        file.write('{"step": 1, "lo')
    run.record(step=1, loss=1.0)
    assert run.log.read() == [
        {"step": 0, "eval_loss": None, "samples": [{"x": None}]},
        {"step": 1, "loss": 1.0},
    ]


def test_what_may_change_may_change(tmp_path):
    Run(tmp_path, SETTINGS | {"steps": 5}).record(step=0)
    again = Run(tmp_path, SETTINGS | {"steps": 9}, resume=True, may_change={"steps"})
    again.record(step=1)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 9
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


def test_a_setting_that_there_was_not_had_its_default(tmp_path):
    Run(tmp_path, SETTINGS).record(step=0)
    now = SETTINGS | {"noise": 0.0, "names": ()}
    defaults = {"noise": 0.0, "names": (), "model": "default"}
    Run(tmp_path, now, resume=True, defaults=defaults)
    with pytest.raises(ValueError, match=r"settings: noise=5.0 \(there: 0.0\)\. Give"):
        Run(tmp_path, now | {"noise": 5.0}, resume=True, defaults=defaults)
    with pytest.raises(ValueError, match=r"names=\[\] \(there: None\), noise=0.0"):
        Run(tmp_path, now, resume=True)


def test_other_data_are_refused(tmp_path):
    manifest: dict = {"sources": [{"path": "a.jsonl", "sha256": "12"}], "seed": 0}
    manifest["fingerprint"] = "1"
    run = Run(tmp_path, SETTINGS)
    run.check_data(manifest)
    run.record(step=0)
    again = Run(tmp_path, SETTINGS, resume=True)
    again.check_data(manifest)
    words = r"other data: a.jsonl: sha256 is '34' \(there: '12'\)\. Give"
    other = {"path": "a.jsonl", "sha256": "34"}
    with pytest.raises(ValueError, match=words):
        again.check_data({**manifest, "fingerprint": "2", "sources": [other]})
    other = {"path": "b.jsonl", "sha256": "12"}
    words = r"sources\[0\].path is 'b.jsonl' \(there: 'a.jsonl'\)"
    with pytest.raises(ValueError, match=words):
        again.check_data({**manifest, "sources": [other]})
    # Of the whole it is told where there is nothing else to tell.
    with pytest.raises(ValueError, match=r"other data: fingerprint is '2'"):
        again.check_data({**manifest, "fingerprint": "2"})


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"/proc/none/run cannot be written"):
        Run("/proc/none/run", SETTINGS)

    def read_only(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "touch", read_only)
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\)"):
        Run(tmp_path / "a" / "b", SETTINGS)
    assert not (tmp_path / "a").exists()
    # One that holds a run already too.
    monkeypatch.undo()
    Run(tmp_path / "run", SETTINGS).record(step=0)
    monkeypatch.setattr(pathlib.Path, "touch", read_only)
    with pytest.raises(ValueError, match=r"run cannot be written \(Permission denied"):
        Run(tmp_path / "run", SETTINGS, resume=True)


def test_the_report_shows_answers_before_and_after(tmp_path):
    run = Run(tmp_path / "mine", SETTINGS)
    sample = {"prompt": "Why?", "wanted": "Because."}
    run.record(step=0, eval_loss=3.0, samples=[{**sample, "answer": "# no\n\nno"}])
    run.log.step(report(1))
    run.log.evaluated(1, {"eval_loss": 2.0, "perplexity": 7.4}, None, True)
    run.log.step(report(2))
    run.finish(eval_loss=1.5, samples=[{**sample, "answer": "Because"}])
    text = (run.folder / "report.md").read_text()
    assert text.startswith("# mine\n")
    assert "| Held-out loss after | 1.5000 |" in text
    assert "**Before**\n\n    # no\n    \n    no\n" in text
    assert "**After**\n\n    Because\n" in text and "model: x" in text
    assert "| 1 | 2.0000 |" in text


def test_two_processes_do_not_share_a_folder(tmp_path):
    run = Run(tmp_path, SETTINGS)
    run.begin()
    again = (
        "import sys; from qlora_jax.run import Run\n"
        "try: Run(sys.argv[1], {'model': 'x', 'sizes': (1, 2)}, resume=True)\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", again, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"Another process is training in {tmp_path}")
    Run(tmp_path, SETTINGS, resume=True)  # this one may


def test_one_that_was_killed_while_it_began_begins_again(tmp_path):
    for name in (".lock", "data.json", "environment.json", ".config.yaml.7.partial"):
        (tmp_path / name).write_text("[]")
    run = Run(tmp_path, SETTINGS)
    run.record(step=0)
    assert (tmp_path / "config.yaml").is_file()
