import pytest

from qlora_jax.data import DataError, conversation
from qlora_jax.data.conversations import turns_of
from tests.data.examples import turns


def test_speakers_get_the_names_that_templates_know():
    found = conversation(
        [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"},
        ]
    )
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant"]
    assert [m["content"] for m in found.messages] == ["s", "u", "a"]
    assert found.question == found.messages[:2]
    assert found.answer == "a"


def test_what_follows_the_last_answer_is_left():
    assert len(conversation(turns("u", "a", "u")).messages) == 2
    with pytest.raises(DataError, match="'messages' has no turn of the assistant"):
        conversation(turns("u"))


def test_openai_calls_keep_ids_names_and_arguments():
    call = {"id": "7", "type": "function"}
    call["function"] = {"name": "f", "arguments": '{"x": 1}'}
    found = conversation(
        [
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2", "tool_call_id": "7", "name": "f"},
            {"role": "assistant", "content": "a", "weight": 0},
        ],
        [{"name": "f"}],
    )
    user, calling, tool, answer = found.messages
    assert user["content"] == "u"
    assert calling["content"] == ""
    assert calling["tool_calls"] == [
        {
            "id": "7",
            "type": "function",
            "function": {"name": "f", "arguments": {"x": 1}},
        }
    ]
    assert tool == {
        "role": "tool",
        "content": "2",
        "tool_call_id": "7",
        "name": "f",
    }
    assert answer["weight"] == 0
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)


def test_sharegpt_calls_become_calls():
    found = conversation(
        [
            {"from": "human", "value": "u"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
        '[{"name": "f"}]',
    )
    assert [m["role"] for m in found.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    function = found.messages[1]["tool_calls"][0]["function"]
    assert function == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "messages, tools, words",
    [
        ("x", None, "'messages' is 'x', expected turns"),
        ([], None, r"'messages' is \[\], expected turns"),
        (["x"], None, r"messages\[0\] is 'x', expected an object"),
        ([{"role": "narrator", "content": ""}], None, "has the role 'narrator', exp"),
        ([{"content": "x"}], None, "has the role None, expected system"),
        ([{"role": "user", "content": 3}], None, "content is 3, expected text"),
        ([{"role": "user", "content": [{"type": "image"}]}], None, "has the part"),
        ([{"from": "function_call", "value": "x"}], None, "'x', expected JSON"),
        ([{"from": "function_call", "value": "[1]"}], None, "calls 1, expected an"),
        (turns("u", "a"), "x", "field 'tools' is 'x', expected JSON"),
        (turns("u", "a"), [1], r"field 'tools' is \[1\], expected a list of them"),
    ],
)
def test_what_is_no_conversation_is_named(messages, tools, words):
    with pytest.raises(DataError, match=words):
        conversation(messages, tools)


def test_a_text_with_markers_is_cut_at_them():
    markers = {"### Human:": "user", "### Assistant:": "assistant"}
    found = turns_of("### Human: a\nb### Assistant:c ", markers, field="text")
    assert found == turns("a\nb", "c")
    with pytest.raises(DataError, match="'text' begins with 'Hm ###', expected one of"):
        turns_of("Hm ###", markers, field="text")
