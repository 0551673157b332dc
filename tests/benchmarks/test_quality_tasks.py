import decimal
import functools
import gzip
import json

import jax
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from benchmarks.quality_tasks import (
    Accuracy,
    chosen,
    final_number,
    numbered,
    parse_question,
    read_rows,
    read_tasks,
    solved,
    spelled_out,
)
from qlora_jax.data import Encoder, exchange
from tests.data.examples import TOKENIZER

ROW = {
    "instruction": "Please choose the correct answer to the question: How many: two?"
    "\n\nAnswer1: one Answer2: two words Answer3: Answer, none"
    "\n\nAnswer format: answer1/answer2/answer3",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


@pytest.mark.parametrize(
    "text, number",
    [
        ("He has 3+4=7.\n#### 7", "7"),
        ("#### 70,000", "70000"),
        ("#### $1,234.50 in all, of 9", "1234.50"),
        ("#### -5", "-5"),
        ("The answer is 12. I am sure of 13", "13"),
        ("no number at all", None),
        ("3 apples\n#### none", None),
        ("", None),
        ("9 - 4 = 5.", "5"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else decimal.Decimal(number))


def test_numbers_are_compared_by_value():
    assert final_number("#### 18") == final_number("It is 18.00")


def test_every_answer_of_gsm8k_has_a_number(data_dir):
    lines = data_dir("instruct/gsm8k_test.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["answer"] for line in lines.split("\n") if line]
    assert len(answers) == 1319
    for answer in answers:
        written = answer.rsplit("#### ", 1)[1].replace(",", "")
        assert final_number(answer) == decimal.Decimal(written)


def test_parse_question():
    question = parse_question(ROW)
    assert question.text == "How many: two?"
    assert question.answers == ("one", "two words", "Answer, none")
    assert question.right == 1


def test_both_forms_have_the_same_right_answer():
    prompt, answers, right = numbered(ROW)
    assert prompt == ROW["instruction"] and answers[right] == ROW["output"]
    prompt, answers, right = spelled_out(ROW)
    assert prompt == "How many: two?" and answers[right] == "two words"


@pytest.mark.parametrize(
    "change",
    [{"answer": "answer4"}, {"answer": "two"}, {"instruction": "Which of the two?"}],
)
def test_another_form_is_refused(change):
    with pytest.raises(ValueError, match="expected a question, a line of 'Answer1: "):
        parse_question(ROW | change)


def test_every_row_of_arc_is_read(data_dir):
    for part, count in (("train", 2251), ("test", 2376)):
        rows = read_rows(data_dir(f"finetune_pairs/arc_easy_{part}.jsonl.gz"))
        assert len(rows) == count
        for row in rows:
            _, answers, right = numbered(row)
            assert answers[right] == row["output"]
            assert len(spelled_out(row)[1]) == len(answers)


def test_the_answer_of_the_lowest_loss_is_chosen(monkeypatch):
    def by_repeats(model, tokens, *, chunk_size):
        same = tokens[:, 1:] == tokens[:, :-1]
        return np.where(same, -1.0, -2.0)

    monkeypatch.setattr("benchmarks.quality_tasks.log_probs", by_repeats)
    encode = Encoder(TOKENIZER).encode
    # A mean over the answer's tokens: that "aaaa" is longer makes it no worse.
    answers = [["ab", "aaaa", "abab"], ["bbbbbb", "b"], ["x" * 600, "xy"]]
    questions = [encode([exchange("?", a) for a in some]) for some in answers]
    for batch_tokens in (64, 4096):
        assert chosen(None, questions, batch_tokens) == [1, 0, 0]


def test_chosen_agrees_with_the_loss_of_each_document():
    config = ql.LlamaConfig(
        TOKENIZER.backend.get_vocab_size(), 32, 64, 2, 4, 2, tie_embeddings=True
    )
    model = ql.Llama(config, rngs=nnx.Rngs(0))
    texts = [["a long answer", "b", "cd"], ["one", "two"]]
    questions = [
        Encoder(TOKENIZER).encode([exchange("Which?", a) for a in some])
        for some in texts
    ]
    loss = jax.jit(functools.partial(ql.next_token_loss, model))

    def padded(row):
        return np.pad(row, (0, 128 - len(row)))[None]

    losses = [
        [
            float(loss({"tokens": padded(d.tokens), "loss_mask": padded(d.loss_mask)}))
            for d in documents
        ]
        for documents in questions
    ]
    found = chosen(model, questions, batch_tokens=256)
    assert found == [int(np.argmin(of_one)) for of_one in losses]


def test_solved_counts_right_numbers(monkeypatch):
    said = ["It is 3.\n#### 3", "#### 5", "nothing"]

    def generate(model, prompts, *, max_new_tokens):
        assert len(prompts) == 3 and max_new_tokens == 9
        return [TOKENIZER.encode(text) for text in said]

    monkeypatch.setattr(ql, "generate", generate)
    conversations = [exchange("q", f"so\n#### {n}") for n in ("3", "4", "0")]
    found = solved(
        None, tokenizer=TOKENIZER, conversations=conversations, max_new_tokens=9
    )
    assert found == Accuracy(1, 3) and found.share == 1 / 3


def test_tasks_are_read_from_a_flat_folder(tmp_path):
    solution = json.dumps({"question": "2+2?", "answer": "4\n#### 4"})
    pairs = json.dumps(ROW)
    for name, line, count in (
        ("gsm8k_train.jsonl.gz", solution, 3),
        ("gsm8k_test.jsonl", solution, 2),
        ("arc_easy_train.jsonl.gz", pairs, 4),
        ("arc_easy_test.jsonl.gz", pairs, 2),
    ):
        text = (line + "\n") * count
        packed = gzip.compress(text.encode()) if name.endswith("gz") else text.encode()
        (tmp_path / name).write_bytes(packed)
    gsm8k, numbers, texts = read_tasks(tmp_path, TOKENIZER)
    assert [len(task.train) for task in (gsm8k, numbers, texts)] == [3, 4, 4]
    assert [len(task.test) for task in (gsm8k, numbers, texts)] == [2, 2, 2]

    def learned(document):
        return TOKENIZER.decode(document.tokens[document.loss_mask == 1], special=True)

    assert learned(gsm8k.test[0]) == "4\n#### 4<|im_end|>"
    for part in ("train", "test"):
        assert learned(getattr(numbers, part)[0]) == f"{ROW['output']}<|im_end|>"
        assert learned(getattr(texts, part)[0]) == "two words<|im_end|>"
    (few, *_) = read_tasks(tmp_path, TOKENIZER, rows=1)
    assert (len(few.train), len(few.test)) == (1, 1)
