import json
import math

import pytest

from benchmarks import quality_table
from tests.conftest import ROOT


def row(method, seed, loss, accuracy, **more):
    return {
        "task": "t",
        "method": method,
        "seed": seed,
        "loss_before": 2.0,
        "loss_after": loss,
        "accuracy_before": 0.25,
        "accuracy_after": accuracy,
        "step_gb": 1.5,
    } | more


def test_spread_is_that_of_a_sample():
    assert quality_table.spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    mean, deviation = quality_table.spread([1.0])
    assert mean == 1.0 and math.isnan(deviation)


def test_standard_error():
    # 10,000 throws of a fair coin: half a percent.
    assert quality_table.standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-12)
    assert quality_table.standard_error(0.0, 100) == 0


def test_a_line_for_each_task_and_method():
    rows = [
        row("a", 0, 1.0, 0.30),
        row("b", 0, 1.5, 0.50),
        row("a", 0, 7.0, 0.90, task="u"),
        row("a", 1, 1.2, 0.40),
    ]
    _, _, *lines = quality_table.table(rows).split("\n")
    assert lines == [
        "| t | a | 2 | 2.0000 | 1.1000 ± 0.1414 | 25.0 % | 35.0 ± 7.1 % | 1.50 |",
        "| t | b | 1 | 2.0000 | 1.5000 | 25.0 % | 50.0 % | 1.50 |",
        "| u | a | 1 | 2.0000 | 7.0000 | 25.0 % | 90.0 % | 1.50 |",
    ]


def test_runs_are_put_together():
    first = {"machine": "m", "sweep": [1], "rows": [2]}
    second = {"machine": "m", "sweep": [], "rows": [3, 4]}
    together = quality_table.merged([first, second])
    assert together == {"machine": "m", "sweep": [1], "rows": [2, 3, 4]}
    with pytest.raises(ValueError, match=r"The runs differ: .*'m'.*'n'"):
        quality_table.merged([first, second | {"machine": "n"}])


def test_the_docs_have_the_table_that_was_measured():
    found = json.loads(quality_table.PATH.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    for line in quality_table.table(found["rows"]).split("\n"):
        assert line in page, line
    for number in (found["machine"], found["jax"], found["date"]):
        assert number in page, number
