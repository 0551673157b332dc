"""The page on data: its code runs, its tables and numbers are the true ones."""

import json
import re

import pytest

import qlora_jax as ql
from tests.conftest import ROOT
from tests.data.examples import TOKENIZER, turns, write_lines

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def test_its_code_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("grain", reason="needs grain (the train extra)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(ql, "load_tokenizer", lambda name: TOKENIZER)
    rows = [{"messages": turns("u", str(i))} for i in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)
    (tmp_path / "chats").mkdir()
    write_lines(tmp_path / "chats" / "a.jsonl", rows)
    (tmp_path / "qa.csv").write_text("asked,replied\nq,a\n")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["batch"]["segment_ids"].shape == (16, 512)
    assert "40 rows: 36 documents to train on, 4 held out" in capsys.readouterr().out


def test_its_formats_are_all():
    assert re.findall(r"^\| `([a-z0-9_]+)` \|", PAGE, re.MULTILINE) == list(
        ql.data.FORMATS
    )
    for name in ql.data.TEMPLATES:
        assert f"`{name}`" in PAGE


def test_its_numbers_are_the_measured_ones():
    path = ROOT / "benchmarks" / "results" / "data.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    for number in (
        f"{found['tokenize_s']:.0f} s",
        f"{found['tokenize_cpu_s']:.0f} s",
        f"{found['rows_per_s']:,} rows",
        f"{found['cached_s']:.1f} s",
        found["date"],
        f"tokenizers {found['versions']['tokenizers']}",
        *(f"{share:.1%}" for share in found["padding"].values()),
    ):
        assert number in PAGE, number
