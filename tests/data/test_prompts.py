import json

import numpy as np
import pytest

from qlora_jax.data import (
    DataError,
    encode_conversation,
    read_conversations,
    to_conversation,
)
from qlora_jax.interop.tokenizer import Tokenizer
from tests.interop.folders import CHATML, byte_tokenizer

ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}


def test_alpaca_rows():
    question, answer = to_conversation(ROW)
    assert question == {"role": "user", "content": "Add.\n1 2"}
    assert answer == {"role": "assistant", "content": "3"}
    for empty in ("", None):
        question, _ = to_conversation(ROW | {"input": empty})
        assert question["content"] == "Add."


def test_both_kinds_of_file(tmp_path):
    # U+2028 and U+0085 end lines for str.splitlines, and not for JSON lines.
    rows = [ROW, ROW | {"output": "a\u2028b\u0085c"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    expected = [to_conversation(row) for row in rows]
    assert read_conversations(tmp_path / "a.json") == expected
    assert read_conversations(tmp_path / "a.jsonl") == expected


def test_real_rows(data_dir):
    conversations = read_conversations(data_dir("instruct/alpaca_en_demo.json"))
    assert len(conversations) == 999


@pytest.mark.parametrize(
    "line, words",
    [
        (
            '{"instruction": "x"}',
            r"line 2 has no field 'output' \(it has instruction\)",
        ),
        ('{"instruction": 3, "output": "y"}', "line 2: field 'instruction' is 3, exp"),
        ('{"instruction": "x", "output": " "}', "line 2 has an empty answer"),
        ('["x"]', "line 2 is a list, expected an object"),
        ('{"instruction": ', "line 2 is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl, {words}") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"no data file .*absent\.json"):
        read_conversations(tmp_path / "absent.json")
    path = tmp_path / "rows.json"
    for content, words in [
        (b"", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"[1]", "row 1 is a int"),
        (b"\xff\xfe", "is not UTF-8"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"rows.json.* {words}"):
            read_conversations(path)
    with pytest.raises(ValueError, match="format='parrot' must be one of alpaca"):
        to_conversation(ROW, "parrot")


def test_the_loss_is_on_the_answer_and_its_end():
    tokenizer = Tokenizer(byte_tokenizer(), "", "<|im_end|>", CHATML)
    example = encode_conversation(to_conversation(ROW), tokenizer)
    assert example.tokens.dtype == np.int32
    assert tokenizer.decode(example.tokens, special=True) == (
        "<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    )
    learned = example.tokens[example.loss_mask == 1]
    assert tokenizer.decode(learned, special=True) == "3<|im_end|>"
    with pytest.raises(ValueError, match="The last turn is of the user: there is no"):
        encode_conversation(to_conversation(ROW)[:1], tokenizer)
