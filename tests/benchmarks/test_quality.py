import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as ql
from benchmarks import quality
from tests.benchmarks.test_quality_tasks import ROW
from tests.interop.folders import write_folder

pytestmark = pytest.mark.unoptimized


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    write_folder(folder / "model")
    solutions = [
        json.dumps({"question": f"{i}?", "answer": f"It is {i}.\n#### {i}"})
        for i in range(8)
    ]
    texts = {
        "gsm8k_train.jsonl.gz": solutions,
        "gsm8k_test.jsonl": solutions[:3],
        "arc_easy_train.jsonl.gz": [json.dumps(ROW)] * 8,
        "arc_easy_test.jsonl.gz": [json.dumps(ROW)] * 2,
    }
    for name, lines in texts.items():
        text = ("\n".join(lines) + "\n").encode()
        path = folder / name
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    return folder


def line(assets, *more):
    given = ["--data", str(assets), "--model", str(assets / "model")]
    small = ["--rank", "2", "--batch", "2", "--seq", "128", "--new-tokens", "4"]
    return [*given, *small, "--batch-tokens", "256", *more]


def test_the_rate_rises_and_falls_to_zero():
    rates = quality.learning_rate(np.arange(101), 0.5, 100)
    assert rates[:3] == pytest.approx([0.5 / 3, 1 / 3, 0.5])
    assert rates.max() == 0.5
    assert np.all(np.diff(rates[3:]) < 0)
    assert rates[-2:] == pytest.approx([0.5 / 97, 0])


def test_the_optimizer_takes_that_rate():
    zero, gradient = jnp.zeros([]), jnp.float32(0.1)
    tx, plain = quality.adamw(peak=0.5, steps=100.0), optax.adamw(0.5 / 3, b2=0.999)
    update, _ = tx.update(gradient, tx.init(zero), zero)
    expected, _ = plain.update(gradient, plain.init(zero), zero)
    assert float(update) == pytest.approx(float(expected))


def test_one_program_serves_all_rates():
    states = [
        quality.adamw(peak=p, steps=n).init(jnp.zeros(3)) for p, n in [(1, 2), (3, 4)]
    ]
    first, second = (jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in states)
    assert first == second


@pytest.fixture(scope="module")
def study(assets, compiled_once, tmp_path_factory):
    """A study of one task, after its run."""
    out = tmp_path_factory.mktemp("out")
    options = ["--tasks", "gsm8k", "--methods", "QLoRA", "full bf16", "--out", str(out)]
    more = ["--seeds", "4", "--sweep-steps", "2", "--limit", "39"]
    study = quality.Study(quality.parse(line(assets, *options, *more)))
    # A clock by which every row takes ten seconds: there is no time for the last seeds.
    study.elapsed = lambda: 10.0 * len(study.rows)
    study.run()
    return study


@pytest.mark.slow
def test_rows_of_a_study(study):
    written = json.loads((study.arguments.out / "quality.json").read_text())
    assert written["rows"] == study.rows and written["sweep"] == study.swept
    assert [(row["method"], row["seed"]) for row in study.rows] == [
        ("QLoRA", 0),
        ("full bf16", 0),
        # That took 20 s, and 19 are left.
    ]
    for row in study.rows:
        assert row["loss_after"] < row["loss_before"]
        assert row["questions"] == 3 and row["step_gb"] > 0
    quantized, full = study.rows
    assert quantized["loss_before"] != full["loss_before"]


@pytest.mark.slow
def test_rates_are_chosen_on_rows_to_train_on(study):
    for adapters, name in ((True, "QLoRA"), (False, "full bf16")):
        tried = {
            row["learning_rate"]: row["loss"]
            for row in study.swept
            if row["method"] == name
        }
        assert tuple(tried) == quality.RATES[adapters]
        assert len(set(tried.values())) == len(tried)
        chosen = {row["learning_rate"] for row in study.rows if row["method"] == name}
        assert chosen == {min(tried, key=tried.__getitem__)}


@pytest.mark.slow
def test_a_choice_of_rates_looks_at_no_test_row(study, monkeypatch):
    (task,), seen = study.tasks, []
    in_order, batches = ql.data.in_order, ql.data.Batches

    def spy(make):
        return lambda rows, **how: seen.append(rows) or make(rows, **how)

    monkeypatch.setattr(ql.data, "in_order", spy(in_order))
    monkeypatch.setattr(ql.data, "Batches", spy(batches))
    study.chosen_rate(task, study.trainers[0])
    trained_on, compared_on = seen
    assert [len(trained_on), len(compared_on)] == [7, 1]
    assert all(
        a is b for a, b in zip([*trained_on, *compared_on], task.train, strict=True)
    )


@pytest.mark.slow
def test_another_seed_is_another_run_and_the_same_one_the_same(study):
    (task,), trainer = study.tasks, study.trainers[1]
    losses = [study.row(task, trainer, seed, 1e-3)["loss_after"] for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
