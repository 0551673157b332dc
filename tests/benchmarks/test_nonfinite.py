import json

import pytest

from benchmarks import nonfinite
from tests.conftest import ROOT


class Takes:
    """Stands for a compiled step that takes so many milliseconds, in turn."""

    def __init__(self, *milliseconds):
        self.left = list(milliseconds)

    def milliseconds(self, steps):
        return self.left.pop(0)


def test_compare_pairs_neighbours_in_time():
    # The first of each warms up; both get slower, and the guard costs a tenth at most.
    without, guarded = Takes(99.0, 10.0, 20.0, 40.0), Takes(99.0, 10.5, 20.0, 44.0)
    found = nonfinite.compare((without, guarded), turns=3)
    assert found["without_ms"] == 20.0 and found["guarded_ms"] == 20.0
    assert found["ratio"] == pytest.approx(1.05)
    assert found["ratio_least"] == 1.0 and found["ratio_most"] == pytest.approx(1.1)
    line = nonfinite.line({"method": "QLoRA", **found})
    assert line.split() == ("QLoRA 20.00 ms 20.00 ms x 1.050 (1.000 to 1.100)".split())


def test_the_docs_have_what_was_measured():
    path = nonfinite.RESULTS / "nonfinite.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        for number in (row["without_ms"], row["guarded_ms"]):
            assert f"{number:.1f}" in page
    for number in (found["machine"], found["jax"], found["date"]):
        assert number in page
