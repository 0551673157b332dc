import pytest

from qlora_jax.data import stdlib_conversations


@pytest.fixture(scope="module")
def parts():
    return stdlib_conversations()


def modules(conversations):
    questions = [c.question[0]["content"] for c in conversations]
    return {question.split("`")[1].split(".")[0] for question in questions}


def test_enough_for_sixty_steps_of_eight(parts):
    train, held_out = parts
    assert len(train) >= 480
    assert len(held_out) >= 64


def test_parts_share_neither_module_nor_answer(parts):
    train, held_out = parts
    assert not modules(train) & modules(held_out)
    answers = [c.answer for c in train + held_out]
    assert len(set(answers)) == len(answers)


def test_questions_and_answers_are_pythons_own(parts):
    import json

    known = {c.question[0]["content"]: c.answer for part in parts for c in part}
    question = "What is the function `json.dumps` of Python for?"
    assert known[question] == json.dumps.__doc__.strip().split("\n\n")[0]


def test_the_same_every_time(parts):
    assert stdlib_conversations() == parts
