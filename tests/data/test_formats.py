import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import FORMATS, DataError, to_conversations
from qlora_jax.data.formats import detect_format
from tests.data.examples import ALPACA, turns

HUMAN = "### Human: Hi### Assistant: Hello### Human: Bye### Assistant: Bye!"
# A row of each format, and what it says; the texts of `turns`.
ROWS = {
    "messages": ({"messages": turns("u", "a")}, ["u", "a"]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "u"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        ["u", "a"],
    ),
    "hh_rlhf": (
        {
            "chosen": "\n\nHuman: u\n\nAssistant: a\n\nHuman: v\n\nAssistant: b",
            "rejected": "",
        },
        ["u", "a", "v", "b"],
    ),
    "alpaca": (ALPACA, ["Add.\n1 2", "3"]),
    "dolly": (
        {"instruction": "u", "context": "", "response": "a", "category": ""},
        ["u", "a"],
    ),
    "self_instruct": (
        {"instruction": "u", "instances": [{"input": "v", "output": "a"}]},
        ["u\nv", "a"],
    ),
    "oasst1": ({"text": HUMAN}, ["Hi", "Hello", "Bye", "Bye!"]),
    "oasst1_pairs": (
        {"input": "### Human: Hi ### Assistant:", "output": "Hello"},
        ["Hi", "Hello"],
    ),
    "chip2": ({"text": "<human>: u\n<bot>: a"}, ["u", "a"]),
    "longform": ({"input": "u", "output": "a"}, ["u", "a"]),
    "prompt_completion": ({"prompt": "u", "completion": "a"}, ["u", "a"]),
    "prompt_response": ({"prompt": "u", "response": "a"}, ["u", "a"]),
    "question_answer": ({"question": "u", "answer": "a"}, ["u", "a"]),
    "text": ({"text": "a"}, ["a"]),
}


def test_every_format_is_tested():
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_become_conversations(name):
    row, said = ROWS[name]
    (found,) = to_conversations(row, name)
    assert [m["content"] for m in found.messages] == said
    assert found.messages[-1]["role"] == "assistant"
    assert found.raw == (name in ("prompt_completion", "prompt_response", "text"))


@pytest.mark.parametrize("name", FORMATS)
def test_auto_finds_the_format(name):
    row, _ = ROWS[name]
    assert detect_format(row) == name
    assert to_conversations(row) == to_conversations(row, name)


def test_input_is_optional():
    for empty in ({"input": ""}, {"input": None}, {}):
        row = {k: v for k, v in ALPACA.items() if k != "input"} | empty
        (found,) = to_conversations(row)
        assert found.question[0]["content"] == "Add."


def test_other_shapes_of_preferences():
    for row in (
        {"prompt": "u", "chosen": "a", "rejected": "b"},
        {"prompt": turns("u"), "chosen": turns("a", first="assistant")},
        {"chosen": turns("u", "a")},
    ):
        (found,) = to_conversations(row, "hh_rlhf")
        assert [m["content"] for m in found.messages] == ["u", "a"]


def test_prompts_of_turns_take_the_template():
    row = {"prompt": turns("u"), "completion": turns("a", first="assistant")}
    (found,) = to_conversations(row)
    assert not found.raw
    assert list(found.messages) == turns("u", "a")


def test_every_instance_is_a_conversation():
    instances = [{"input": "1", "output": "a"}, {"input": "", "output": "b"}]
    found = to_conversations({"instruction": "u", "instances": instances})
    assert [c.question[0]["content"] for c in found] == ["u\n1", "u"]
    assert [c.answer for c in found] == ["a", "b"]


@pytest.mark.parametrize(
    "row, format, words",
    [
        ({"instruction": "x"}, "alpaca", r"has no field 'output' \(it has instruction"),
        (
            {"instruction": 3, "output": "y"},
            "alpaca",
            "'instruction' is 3, expected te",
        ),
        (ALPACA | {"input": 3}, "alpaca", "field 'input' is 3, expected text"),
        ({"output": None, "instruction": ""}, "alpaca", "'output' is None, expected"),
        (["x"], "alpaca", "is a list, expected an object"),
        ({"chosen": {}}, "hh_rlhf", "'chosen' is an object, expected text or turns"),
        ({"prompt": "x", "completion": []}, "prompt_completion", "must both be text"),
        ({"instruction": "x", "instances": [{}]}, "self_instruct", r"s\[0\].output is"),
        ({"text": "Hm"}, "oasst1", "'text' begins with 'Hm', expected one of '### Hu"),
        ({"a": 1, "b": 2}, "auto", "fields 'a', 'b', which no format has. Expected on"),
        ({}, "auto", "has fields none, which"),
        ("x", "auto", "has a str, which no format"),
    ],
)
def test_bad_rows_say_what_was_expected(row, format, words):
    with pytest.raises(DataError, match=f"x.jsonl, line 3.*{words}"):
        to_conversations(row, format, where="x.jsonl, line 3")


WORDS = [*{f for format in FORMATS.values() for f in format.fields}]
WORDS += ["role", "from", "content", "value", "tool_calls", "tools", "function"]
WORDS += ["user", "gpt", "function_call", "name", "arguments", "input", "system"]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.sampled_from([*WORDS, HUMAN, "[{}]", '{"name": "f", "arguments": {}}']),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5)
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(JSON, st.sampled_from(["auto", *FORMATS]))
def test_any_row_is_conversations_or_a_data_error(row, format):
    try:
        found = to_conversations(row, format, where="x.jsonl, line 3")
    except DataError as error:
        assert str(error).startswith("x.jsonl, line 3")
        return
    for conversation in found:
        assert conversation.messages[-1]["role"] == "assistant"
        assert all(isinstance(m["content"], str) for m in conversation.messages)


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match="format='parrot' must be one of auto, messag"):
        to_conversations(ALPACA, "parrot")
