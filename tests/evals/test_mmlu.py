import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.evals import Question, mmlu, read_questions
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.tokenizer import load_tokenizer
from tests.interop.folders import write_folder

pytestmark = pytest.mark.unoptimized

ROW = {
    "subject": "high_school_physics",
    "question": "What falls?",
    "choices": ["a stone", "smoke", "light", "time"],
    "answer": "A",
}


def test_prompts_are_those_of_the_papers_code(data_dir):
    path = data_dir("mmlu/zero_shot_mmlu_val.json")
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    questions = read_questions(path)
    assert len(questions) == 1531 and len({q.subject for q in questions}) == 57
    assert [q.prompt() for q in questions] == [row["input"] for row in rows]
    assert [q.answer for q in questions] == [row["output"] for row in rows]


def test_five_solved_questions_come_first(data_dir):
    test, dev = data_dir("mmlu/mmlu_test.jsonl.gz"), data_dir("mmlu/mmlu_dev.jsonl")
    question = read_questions(test, shots=dev, limit=1)[0]
    headline, *parts = question.prompt().split("\n\n")
    assert headline.endswith("(with answers) about  abstract algebra.")
    assert len(parts) == 6 and all(part.count("\nAnswer: ") == 1 for part in parts[:5])
    assert parts[0].endswith("\nD. 3\nAnswer: B") and parts[-1].endswith("\nAnswer:")
    assert question.prompt(2).count("Answer:") == 3
    assert len(read_questions(test, limit=2)) == 2 * 57


def test_the_likeliest_letter_counts(tmp_path):
    """Batched and padded: the answers of the model asked one by one."""
    write_folder(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=jnp.float32)
    tokenizer = load_tokenizer(tmp_path / "model")
    letters = [tokenizer.encode(letter)[0] for letter in "ABCD"]
    questions = []
    for i in range(7):
        text = f"{'Why? ' * i}\nA. a\nB. b\nC. c\nD. d\nAnswer:"
        question = Question(f"s_{i % 2}", text, "A")
        ids = tokenizer.encode(question.prompt())
        # One width, one compilation; nothing looks ahead.
        logits = model(jnp.array([ids + [0] * (220 - len(ids))]))[0, len(ids) - 1]
        best = "ABCD"[int(np.argmax(np.asarray(logits)[letters]))]
        wrong = "ABCD"[("ABCD".index(best) + 1) % 4]
        questions.append(Question(question.subject, text, wrong if i == 3 else best))
    result = mmlu(model, tokenizer, questions, batch_tokens=512)
    assert result.accuracy == 6 / 7 and result.count == 7
    assert result.subjects == {"s_0": 1.0, "s_1": 2 / 3}
    assert result.mean == pytest.approx((1 + 2 / 3) / 2)


def test_a_prompt_that_is_too_long_loses_shots_and_never_its_question():
    from qlora_jax.evals.mmlu import _fitting

    class Letters:
        bos_id = 9999

        def encode(self, text):
            return [ord(letter) for letter in text]

    question = Question("s", "Why?\nAnswer:", "A", ("x" * 50, "y" * 50))
    whole = len(question.prompt()) + 1
    assert len(_fitting(question, Letters(), whole)) == whole
    ids = _fitting(question, Letters(), whole - 1)
    text = "".join(map(chr, ids[1:]))
    assert text == question.prompt(1) and "yy" not in text
    assert "".join(map(chr, _fitting(question, Letters(), 7))) == "Answer:"


def test_lines_of_other_forms_are_named(tmp_path):
    path = tmp_path / "q.jsonl.gz"
    for change, words in [
        ({"choices": ["a", "b"]}, r"line 2 is no question of MMLU"),
        ({"answer": "E"}, r"line 2 is no question of MMLU \(the answer is 'E'\)"),
    ]:
        with gzip.open(path, "wt") as file:
            file.write(f"{json.dumps(ROW)}\n{json.dumps(ROW | change)}\n")
        with pytest.raises(ValueError, match=words):
            read_questions(path)
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(ROW | {"answer": 2}) + "\n")
    assert read_questions(path)[0].answer == "C"
    other = tmp_path / "o.jsonl"
    other.write_text(json.dumps(ROW | {"subject": "law"}))
    with pytest.raises(ValueError, match="has no question on high_school_physics"):
        read_questions(path, shots=other)
    other.write_text("\n")
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(other)
