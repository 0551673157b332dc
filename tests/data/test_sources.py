import json

import pytest

from qlora_jax.data import DataError, Source, as_sources, read_conversations
from qlora_jax.data.sources import BadRows
from tests.data.examples import ALPACA, write_lines

# U+2028 and U+0085 end lines for str.splitlines, and not for JSON lines.
ROWS = [ALPACA, ALPACA | {"output": "a\u2028b\u0085c"}, ALPACA | {"output": "d\ne"}]


def outputs(source, **options):
    return [c.answer for c in read_conversations(source, **options)]


EXPECTED = ["3", "a\u2028b\u0085c", "d\ne"]


def test_folders_and_globs(tmp_path):
    for i, name in enumerate(["b/2.jsonl", "b/1.json", ".git/x.jsonl", "a.jsonl"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, [ALPACA | {"output": str(i)}])
    (tmp_path / "README.md").write_text("no data")
    assert outputs(tmp_path) == ["3", "1", "0"]
    assert outputs(tmp_path / "b" / "*.json*") == ["1", "0"]
    assert outputs(f"{tmp_path}/**/2.jsonl") == ["0"]


def test_each_file_of_a_folder_has_its_own_format(tmp_path):
    write_lines(tmp_path / "a.jsonl", [ALPACA])
    write_lines(tmp_path / "b.jsonl", [{"question": "q", "answer": "4"}])
    assert outputs(tmp_path) == ["3", "4"]


def test_names_of_the_hub_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Source("owner/name").hub_name == "owner/name"
    assert Source("hf:name").hub_name == "name"
    assert Source("owner/name.jsonl").hub_name is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert Source("owner/name").hub_name is None


def test_fields_may_have_other_names(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"q": "u", "out": "a"}])
    source = Source(path, fields={"instruction": "q", "output": "out"})
    assert outputs(source) == ["a"]
    assert outputs(Source(path, "alpaca", fields=source.fields)) == ["a"]


def test_limit_takes_the_first_rows(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    assert outputs(Source(path, limit=2)) == EXPECTED[:2]


def test_sources_from_paths_and_mappings():
    found = as_sources([{"path": "a.csv", "weight": 2}, Source("b", weight=1.0)])
    assert [(s.path, s.weight) for s in found] == [("a.csv", 2), ("b", 1.0)]
    assert as_sources("a.csv", "alpaca") == [Source("a.csv", "alpaca")]
    assert as_sources(Source("a", "text"), "alpaca")[0].format == "text"


@pytest.mark.parametrize(
    "value, words",
    [
        ([], "There is no source"),
        (
            [{"path": "a", "wait": 1}],
            "A source has path and optionally .*; this one ha",
        ),
        (3, "3 is no path, mapping or Source"),
        (
            ["a", {"path": "b", "weight": 1}],
            "a has no weight, b has one: give one to e",
        ),
        ({"path": "a", "weight": 0}, "a: weight=0 must be positive"),
        ({"path": "a", "weight": float("nan")}, "a: weight=nan must be positive"),
        ({"path": "a", "limit": 0}, "a: limit=0 must be at least 1"),
        ({"path": "a", "format": "parrot"}, "format='parrot' must be one of auto"),
    ],
)
def test_what_is_no_source_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        as_sources(value)


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"instruction": "x"}', r"line 2 has no field 'output' \(it has instruction"),
        ('{"instruction": 3, "output": "y"}', "line 2: field 'instruction' is 3, exp"),
        ('["x"]', "line 2 is a list, expected an object"),
        ('{"instruction": ', "line 2 is not JSON"),
        ('{"instruction": "\udcff"}', "line 2 is not UTF-8"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "\n".join([json.dumps(ALPACA), line, line, json.dumps(ALPACA)])
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=f"rows.jsonl, {words}") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)
    assert outputs(path, skip_bad_rows=2) == ["3", "3"]
    with pytest.raises(DataError, match=r"line 3.* \(after 1 bad rows that were left"):
        read_conversations(path, skip_bad_rows=1)


def test_the_format_is_found_behind_bad_rows(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"a": 1}, ALPACA])
    with pytest.raises(DataError, match=r"a.jsonl, line 1 has fields 'a', which no"):
        read_conversations(path)
    assert outputs(path, skip_bad_rows=1) == ["3"]


def test_a_negative_number_of_bad_rows():
    with pytest.raises(ValueError, match="skip_bad_rows=-1 must not be negative"):
        BadRows(-1)


@pytest.mark.parametrize(
    "file, count",
    [
        ("alpaca_en_demo.json", 999),
        ("dolly_hhrlhf_1000.jsonl", 1000),
        ("dpo_en_demo.json.gz", 300),
        ("fastchat_dummy_conversation.json", 500),
        ("glaive_toolcall_en_demo.json", 300),
        ("gsm8k_train.jsonl.gz", 7473),
        ("gsm8k_test.jsonl", 1319),
        ("oasst1_val_953.jsonl.gz", 953),
        ("self_instruct_seed_tasks.jsonl", 175),
        ("self_instruct_user_oriented.jsonl", 252),
    ],
)
def test_real_files(file, count, data_dir):
    found = read_conversations(data_dir(f"instruct/{file}"))
    assert len(found) == count
