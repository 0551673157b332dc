import json

import pytest

from qlora_jax.callbacks import ProgressBar, StepReport
from qlora_jax.run import Run

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
    assert json.loads((run.folder / "config.json").read_text())["sizes"] == [1, 2]
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2]
    assert lines[1]["loss"] == 2.0 and lines[1]["tokens_per_s"] == 200
    assert lines[-1]["finished"] and lines[-1]["eval_loss"] == 1.0
    assert 0.05 < summary["peak_rss_gb"] < 100
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")


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
    assert lines[0].startswith("step  2/20  loss 2.500  200 tokens/s")
    assert lines[0].endswith("9 s left")


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = ProgressBar()
    bar.start(5, 20)
    bar.step(report(6, 2.5))
    assert bar._progress.tasks[0].completed == 6
    assert "loss 2.500  200 tokens/s" in bar._progress.tasks[0].fields["numbers"]
    bar.end()
    assert isinstance(bar._progress.console, rich.console.Console)
