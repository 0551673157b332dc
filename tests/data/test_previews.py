import io

import pytest

from qlora_jax.data import DataError, preview
from tests.data.examples import ALPACA, TOKENIZER, turns, write_lines


@pytest.fixture
def file(tmp_path):
    rows = [{"messages": turns("Hi", f"answer {i}")} for i in range(9)]
    return write_lines(tmp_path / "rows.jsonl", rows)


def row(number, answer, used=73):
    return (
        f"--- row {number}: {used} of 80 tokens, {len(answer) + 1} learned\n"
        "[<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n]"
        f"{answer}<|im_end|>\n"
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_only_read_is_in_brackets(file, capsys):
    text = preview(file, TOKENIZER, count=2, seq_len=80)
    used = len("user\nHi\nassistant\nanswer 0") + 4
    assert text == row(1, "answer 0", used) + row(2, "answer 1", used)
    assert capsys.readouterr().out == text


def test_on_a_terminal_it_is_dim(file):
    pytest.importorskip("rich", reason="needs rich (the train extra)")
    terminal = Terminal()
    preview(file, TOKENIZER, count=1, seq_len=80, file=terminal)
    shown = terminal.getvalue()
    dim = shown.index("\x1b[2m")
    assert dim < shown.index("user") < shown.index("answer 0")
    assert "\x1b[0m" in shown[shown.index("assistant") : shown.index("answer 0")]
    assert "[<|im" not in shown


def test_packed_rows_and_cut_ones(file):
    out = io.StringIO()
    text = preview(file, TOKENIZER, count=1, seq_len=80, packing=True, file=out)
    assert text == out.getvalue()
    assert "2 documents\n" in text and "--- document 2\n[<|im_start|>user" in text
    cut = preview(file, TOKENIZER, count=1, seq_len=25, file=out)
    assert "--- row 1: 25 of 25 tokens, 4 learned, cut off\n" in cut
    assert cut.endswith("]answ\n")


def test_rows_left_out_are_said(tmp_path):
    rows = [{"messages": turns("u" * n, a)} for n, a in ((1, "a"), (99, "a"), (1, ""))]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    text = preview(path, TOKENIZER, seq_len=64, file=io.StringIO())
    assert text.count("--- row") == 1
    assert text.endswith("--- 2 left out: an empty answer, or none within seq_len\n")


def test_options_of_encoding_are_taken(file):
    out = io.StringIO()
    text = preview(
        file, TOKENIZER, count=1, chat_template="plain", train_on_source=True, file=out
    )
    assert text.endswith("learned\n[H]ianswer 0<|im_end|>\n")  # nothing precedes "H"


def test_bad_rows_are_named(tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", [ALPACA, {"instruction": "x"}])
    with pytest.raises(DataError, match=r"bad.jsonl, line 2 has no field 'output'"):
        preview(path, TOKENIZER)
    text = preview(path, TOKENIZER, skip_bad_rows=1, file=io.StringIO())
    assert "Add." in text
    last = text.splitlines()[-1]
    assert last.startswith("--- 1 bad rows left out, the first: ")
    assert "bad.jsonl, line 2 has no field 'output'" in last
