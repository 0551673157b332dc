import json

import numpy as np
import pytest

from qlora_jax.data import DataError, Documents, Example, Source, prepare
from qlora_jax.data.preparation import hold_out, split
from tests.data.examples import ALPACA, TOKENIZER, learned, turns, write_lines

pytest.importorskip("grain", reason="needs grain (the train extra)")


@pytest.fixture
def file(tmp_path):
    rows = [ALPACA | {"input": "", "output": f"{i}"} for i in range(20)]
    rows += [ALPACA | {"output": ""}, ALPACA | {"instruction": "x" * 100}]
    rows += [ALPACA | {"output": "y" * 100}]
    return write_lines(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def prepared(file, tmp_path):
    def call(sources=file, **options):
        given = {"seq_len": 80, "batch_size": 4, "cache_dir": tmp_path / "cache"}
        return prepare(sources, TOKENIZER, **(given | options))

    return call


def texts(batches):
    return sorted(
        TOKENIZER.decode(row[mask == 1])
        for batch in batches
        for row, mask in zip(batch["tokens"], batch["loss_mask"], strict=True)
    )


def test_files_become_batches(prepared):
    data = prepared()
    iterator = iter(data.train)
    found = texts([next(iterator) for _ in range(len(data.train))])
    # 21 documents in batches of 4: three of the next pass too.
    assert len(found) == 24 and len(set(found)) == 21
    assert {*map(str, range(20))} < {*found}
    assert data.evaluation == []


def test_what_became_of_the_rows_is_said(prepared):
    found = prepared().statistics
    assert (found.rows, found.documents, found.held_out) == (23, 21, 0)
    assert (found.empty_answers, found.no_target, found.truncated) == (1, 1, 1)
    assert found.bad_rows == 0
    assert (found.batch_rows, found.batches) == (21, 6)
    np.testing.assert_allclose(found.padding, 1 - found.tokens / (21 * 80))
    assert str(found) == (
        "23 rows: 21 documents to train on\n"
        "of these: 1 with an empty answer left out, 1 left out with nothing to learn "
        "within the limits, 1 cut off at a limit\n"
        f"{found.tokens:,} tokens, {found.target_tokens / found.tokens:.1%} of them "
        "learned\n"
        f"6 batches a pass, {found.padding:.1%} padding"
    )
    assert json.loads(json.dumps(found.as_dict()))["rows"] == 23


def test_bad_rows_are_counted_over_all_sources(prepared, tmp_path):
    paths = [tmp_path / f"{i}.jsonl" for i in range(2)]
    for path in paths:
        write_lines(path, [ALPACA, {"instruction": "x"}])
    found = prepared(paths, skip_bad_rows=2).statistics
    assert (found.rows, found.bad_rows, found.documents) == (4, 2, 2)
    assert "2 bad rows left out" in str(found)
    assert f"first bad row: {paths[0]}, line 2 has no field 'output'" in str(found)
    with pytest.raises(DataError, match=r"1.jsonl, line 2 has no field 'output'"):
        prepared(paths, skip_bad_rows=1)


def test_packing_is_said(prepared):
    found = prepared(packing=True, seq_len=160).statistics
    assert found.batch_rows < 12
    assert f"in {found.batch_rows} packed rows, {found.padding:.1%} pad" in str(found)


def test_rows_are_held_out_by_the_seed(prepared):
    data = prepared(eval_size=5)
    held_out = texts(data.evaluation)[-5:]
    iterator = iter(data.train)
    trained = texts([next(iterator) for _ in range(4)])
    assert len(trained) == 16 and len({*held_out, *trained}) == 21
    assert data.statistics.held_out == 5
    assert texts(prepared(eval_size=5).evaluation)[-5:] == held_out
    assert texts(prepared(eval_size=5, seed=1).evaluation)[-5:] != held_out
    assert prepared(eval_size=0.25).statistics.held_out == 5  # round(21 / 4)
    # Of 22 documents one has nothing to learn, and is never chosen.
    found = prepared(eval_size=20).statistics
    assert (found.held_out, found.documents, found.no_target) == (20, 1, 1)


def test_a_source_without_anything_to_learn_is_named(prepared, file, tmp_path):
    long = [ALPACA | {"instruction": "x" * 99}]
    other = write_lines(tmp_path / "long.jsonl", long)
    words = r"long.jsonl: No answer of 1 examples begins within seq_len"
    with pytest.raises(DataError, match=words):
        prepared([file, other], eval_size=5)
    with pytest.raises(DataError, match=words):
        prepared(eval_sources=[file, other])
    # One of which what is held out happens to be the long ones does not stop a run.
    few = [ALPACA | {"output": "1"}, ALPACA | {"output": "2"}, *long * 5]
    some = write_lines(tmp_path / "some.jsonl", few)
    for seed in range(4):
        assert prepared([file, some], eval_size=5, seed=seed).statistics.held_out == 5


def test_no_source_is_held_out_whole(prepared, file, tmp_path):
    one = write_lines(tmp_path / "one.jsonl", [ALPACA | {"output": "1"}])
    words = "eval_size=21 would hold out all that source 2 has to learn"
    with pytest.raises(ValueError, match=words):
        prepared([file, one], eval_size=21)


def test_or_come_from_elsewhere(prepared, tmp_path):
    path = write_lines(tmp_path / "eval.jsonl", [ALPACA | {"output": "other"}])
    data = prepared(eval_sources=path)
    assert texts(data.evaluation)[-1:] == ["other"]
    assert data.manifest["eval_sources"][0]["rows"] == 1
    with pytest.raises(ValueError, match="Give eval_sources or eval_size=3, not both"):
        prepared(eval_sources=path, eval_size=3)


@pytest.mark.parametrize("size", [21, 0.999, 0.001, -1])
def test_too_many_or_too_few_held_out(prepared, size):
    with pytest.raises(ValueError, match=f"eval_size={size} of 21 documents with"):
        prepared(eval_size=size)


def test_the_choice_is_over_all_sources():
    parts = [
        Documents.of([Example(np.ones(3, np.int32), np.ones(3))] * n) for n in (9, 4)
    ]
    stay, out = hold_out(parts, 3, seed=0, seq_len=8)
    assert [len(s) + len(o) for s, o in zip(stay, out, strict=True)] == [9, 4]
    assert sum(map(len, out)) == 3


def test_samples_are_questions_and_wanted_answers(prepared):
    data = prepared(eval_size=5)
    samples = data.samples(3)
    assert len(samples) == 3
    for question, answer in samples:
        assert TOKENIZER.decode(question, special=True).endswith("assistant\n")
        assert TOKENIZER.decode(answer, special=True).endswith("<|im_end|>")
    assert prepared().samples(3) == []


@pytest.mark.parametrize("answers", ["last", "all"])
def test_where_questions_are_learned_too_samples_are_the_same(prepared, answers):
    options = {"eval_size": 5, "answers": answers, "seq_len": 200}
    plain, whole = prepared(**options), prepared(**options, train_on_source=True)
    assert whole.samples(3) == plain.samples(3)
    counts = [d.statistics.target_tokens for d in (plain, whole)]
    tokens, documents = whole.statistics.tokens, whole.statistics.documents
    assert counts[0] < counts[1] == tokens - documents


def test_of_a_text_the_first_token_is_the_question(prepared, tmp_path):
    path = write_lines(
        tmp_path / "texts.jsonl", [{"text": f"To be {i}."} for i in "ab"]
    )
    ((question, answer),) = prepared(path, eval_size=1).samples(2)
    assert TOKENIZER.decode(question) == "T"
    assert TOKENIZER.decode(answer, special=True)[:5] == "o be "


def test_the_last_of_several_answers_is_the_sample():
    example = Example(np.arange(6, dtype=np.int32), np.array([0, 1, 0, 0, 1, 1]))
    assert split(example) == ([0, 1, 2, 3], [4, 5])


def test_several_sources_with_weights(prepared, tmp_path, file):
    other = write_lines(tmp_path / "b.jsonl", [{"messages": turns("u", "other")}])
    weighted = [Source(file, weight=1), {"path": str(other), "weight": 3}]
    data = prepared(weighted)
    assert texts([data.train.batch(i) for i in range(4)]).count("other") == 12
    assert [s["weight"] for s in data.manifest["sources"]] == [1, 3]
    assert prepared([file, other]).statistics.documents == 22


def test_the_manifest_says_what_the_data_are(prepared, file):
    data = prepared(packing=True, answers="all")
    manifest = json.loads(json.dumps(data.manifest))
    (source,) = manifest["sources"]
    assert source == {
        "path": str(file),
        "sha256": Source(file).sha256(),
        "format": "auto",
        "weight": None,
        "rows": 23,
        "bad_rows": 0,
    }
    assert manifest["options"]["packing"] and manifest["options"]["answers"] == "all"
    assert manifest["fingerprint"] == data.fingerprint
    assert manifest["tokenizer"] == TOKENIZER.fingerprint


def test_the_fingerprint_is_of_content_not_place(prepared, file, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    first = prepared().fingerprint
    assert prepared(copy).fingerprint == first
    others = [
        prepared(eval_size=5).fingerprint,
        prepared(seed=1).fingerprint,
        prepared(packing=True).fingerprint,
        prepared(train_on_source=True).fingerprint,
    ]
    assert len({first, *others}) == 5


def test_a_run_goes_on_in_another_process(prepared):
    first = iter(prepared().train)
    for _ in range(7):
        next(first)
    other = iter(prepared().train)
    other.set_state(json.loads(json.dumps(first.get_state())))
    np.testing.assert_array_equal(next(first)["tokens"], next(other)["tokens"])


def test_processes_see_shares(prepared):
    options = {"eval_size": 5, "process_count": 2}
    parts = [prepared(**options, process_index=i) for i in (0, 1)]
    assert [len(p.train.batch(0)["tokens"]) for p in parts] == [2, 2]
    assert [len(p.evaluation[0]["tokens"]) for p in parts] == [2, 2]


def test_nothing_left(prepared, tmp_path):
    path = write_lines(tmp_path / "long.jsonl", [ALPACA | {"instruction": "x" * 99}])
    with pytest.raises(
        DataError, match=r"No answer of 1 examples begins within seq_len"
    ):
        prepared(path)


@pytest.mark.parametrize(
    "name",
    [
        "alpaca_en_demo.json",
        "gsm8k_train.jsonl.gz",
        "oasst1_val_953.jsonl.gz",
        "self_instruct_seed_tasks.jsonl",
    ],
)
def test_real_files_are_packed(name, data_dir, tmp_path):
    """Into at most 2 % and a row more than their tokens could fill."""
    found = prepare(
        Source(data_dir(f"instruct/{name}"), limit=500),
        TOKENIZER,  # of bytes, so documents are four times as long
        seq_len=2048,
        batch_size=8,
        packing=True,
        cache_dir=tmp_path,
    ).statistics
    assert found.batch_rows <= 1.02 * found.tokens / 2048 + 1
    assert found.padding < 0.03


def test_tool_calls_of_a_real_file(data_dir, tmp_path):
    data = prepare(
        data_dir("instruct/glaive_toolcall_en_demo.json"),
        TOKENIZER,
        seq_len=4096,
        batch_size=8,
        answers="all",
        chat_template="hermes",
        eval_size=10,
        cache_dir=tmp_path,
    )
    documents = [e for part in data.held_out for e in part]
    text = "".join(learned(e) for e in documents)
    assert "<tool_call>" in text and "<tools>" not in text
