import csv
import gzip
import json
import sys

import pytest

from qlora_jax.data import DataError, Source, read_conversations
from tests.data.examples import ALPACA, write_lines

# U+2028 and U+0085 end lines for str.splitlines, and not for JSON lines.
ROWS = [ALPACA, ALPACA | {"output": "a\u2028b\u0085c"}, ALPACA | {"output": "d\ne"}]


def outputs(source, **options):
    return [c.answer for c in read_conversations(source, **options)]


EXPECTED = ["3", "a\u2028b\u0085c", "d\ne"]


def write_csv(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pytest.importorskip("pyarrow", reason="needs pyarrow (the data extra)")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "rows.jsonl": write_lines,
    "rows.csv": write_csv,
    "rows.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(name, tmp_path):
    WRITERS[name](tmp_path / name, ROWS)
    assert outputs(tmp_path / name) == EXPECTED
    if name != "rows.parquet":
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert outputs(packed) == EXPECTED


def test_windows_files(tmp_path):
    line = json.dumps(ALPACA).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert outputs(tmp_path / "a.jsonl") == ["3", "3"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    (found,) = read_conversations(tmp_path / "a.txt")
    assert (found.answer, found.raw) == ("one\ntwo", True)


def test_hugging_face_data_sets(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs datasets (the data extra)")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", ROWS)
    write_lines(tmp_path / "set" / "test.jsonl", ROWS[:1])
    name = f"hf:{tmp_path / 'set'}"
    assert outputs(Source(name)) == EXPECTED
    test = Source(name, split="test")
    assert outputs(test) == EXPECTED[:1]
    assert test.sha256() == Source(name, split="test").sha256()
    assert test.sha256() != Source(name).sha256()
    with pytest.raises(DataError, match=r"set \(config None, split parrot\) cannot be"):
        read_conversations(Source(name, split="parrot"))


def test_what_reads_a_file_is_named_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"no file o/n; .* pip install 'qlora-jax\[d"):
        read_conversations("o/n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"a.parquet needs pyarrow: pip install 'qlo"):
        read_conversations(tmp_path / "a.parquet")


def test_bad_tables(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nq,a\nq\nq,a,b\n")
    with pytest.raises(
        DataError, match=r"a.csv, line 3 has not the columns of the head"
    ):
        read_conversations(path)
    assert outputs(path, skip_bad_rows=2) == ["a"]
    path.write_text('question,answer\nq,"a"b\n')
    with pytest.raises(DataError, match=r"a.csv, line 2 is no table"):
        read_conversations(path)
    long = "x" * 200_000
    path.write_text(f"question,answer\nq,{long}\n")
    assert outputs(path) == [long]


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"no data file .*absent\.json"):
        read_conversations(tmp_path / "absent.json")
    with pytest.raises(DataError, match=r"The folder .* holds no data file \(\.json, "):
        read_conversations(tmp_path)
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(DataError, match=r"a.doc is not one of \.json, \.jsonl"):
        read_conversations(tmp_path / "a.doc")
    path = tmp_path / "rows.json"
    for content, words in [
        (b"", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"[1]", "row 1 has a int, which no format"),
        (b"[{", "is not JSON"),
        (b"[\xff]", "is not UTF-8"),
        (b'[{"question": "q", "answer": " "}]', "holds no rows with an answer"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"rows.json.* {words}"):
            read_conversations(path)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:-9])
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read"):
        read_conversations(tmp_path / "a.jsonl.gz")
    pytest.importorskip("pyarrow", reason="needs pyarrow (the data extra)")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a.parquet is no Parquet file"):
        read_conversations(tmp_path / "a.parquet")
