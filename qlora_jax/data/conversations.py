"""What every row of every format becomes: the turns of a conversation."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]  # role, content; of a tool call also tool_calls and the like

# Names that data sets give to the speakers, and those that chat templates know.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}


class DataError(ValueError):
    """Data that are not what was asked for; names file, line and field."""


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns, the last of them the assistant's.

    Attributes:
        messages: each has `role` and `content` as chat templates take them; an
            assistant's may have `tool_calls` (arguments as objects) and `weight` 0,
            which keeps the loss off it.
        tools: descriptions of the tools that may be called, handed to the template.
        raw: there are no turns to mark: the texts follow one another as they are, with
            the first and last token of the model around them.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    raw: bool = False

    @property
    def question(self) -> tuple[Message, ...]:
        """The turns before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The text of the last answer."""
        return self.messages[-1]["content"]


def exchange(question: str, answer: str, *, raw: bool = False) -> Conversation:
    """Returns one question with its answer."""
    turns = ({"role": "user", "content": question}, _assistant(answer))
    return Conversation(turns, raw=raw)


def text(content: str) -> Conversation:
    """Returns a text that answers nothing."""
    return Conversation((_assistant(content),), raw=True)


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def conversation(
    messages: Any, tools: Any = None, *, field: str = "messages"
) -> Conversation:
    """Returns turns as chat templates take them; what follows the last answer is left.

    Args:
        messages: a list of {"role", "content"} as OpenAI has them, or {"from", "value"}
            as ShareGPT has them.
        tools: a list of descriptions, or JSON of one.
        field: what an error calls `messages`.

    Raises:
        DataError: naming what is wrong in the row, not the row.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"field {field!r} is {short(messages)}, expected turns.")
    turns = [_turn(turn, f"{field}[{i}]") for i, turn in enumerate(messages)]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"field {field!r} has no turn of the assistant to learn.")
    return Conversation(tuple(turns), _tools(tools))


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {short(turn)}, expected an object.")
    speaker = turn.get("role", turn.get("from"))
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(f"{where} has the role {short(speaker)}, expected {known}.")
    content = turn["content"] if "content" in turn else turn.get("value")
    if speaker in ("function_call", "tool_call"):
        calls = _parsed(content, f"{where}.value")
        calls = calls if isinstance(calls, list) else [calls]
        return {
            "role": role,
            "content": "",
            "tool_calls": [_call(c, where) for c in calls],
        }
    message: Message = {"role": role, "content": _content(content, turn, where)}
    calls = turn.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise DataError(f"{where}.tool_calls is {short(calls)}, expected a list.")
        message["tool_calls"] = [_call(call, where) for call in calls]
    # What templates may read: who called, which tool answered, what was thought.
    for name in ("name", "tool_call_id", "reasoning_content", "weight"):
        if turn.get(name) is not None:
            message[name] = turn[name]
    return message


def _content(content: Any, turn: Mapping[str, Any], where: str) -> str:
    if isinstance(content, list):  # OpenAI's parts
        parts: list[str] = []
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise DataError(
                    f"{where}.content has the part {short(part)}, expected text."
                )
            parts.append(part["text"])
        return "".join(parts)
    if content is None and turn.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        raise DataError(f"{where}.content is {short(content)}, expected text.")
    return content


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where} calls {short(call)}, expected an object with name and arguments."
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # OpenAI writes an object as text; templates write it out themselves.
        arguments = _parsed(arguments or "{}", f"{where}: arguments")
    kept = {"id": call["id"]} if call.get("id") is not None else {}
    named = {"name": function["name"], "arguments": arguments}
    return {**kept, "type": "function", "function": named}


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(tools, str):
        tools = _parsed(tools, "field 'tools'") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(t, Mapping) for t in tools):
        raise DataError(f"field 'tools' is {short(tools)}, expected a list of them.")
    return tuple(
        tool if "function" in tool else {"type": "function", "function": tool}
        for tool in tools
    )


def _parsed(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} is {short(text)}, expected JSON: {error}.") from None


def short(value: Any) -> str:
    """Returns a value as an error shows it."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def turns_of(content: str, markers: Mapping[str, str], *, field: str) -> list[Message]:
    """Returns the turns of a text where markers stand before each.

    Args:
        content: as "### Human: Hi### Assistant: Hello".
        markers: what stands before a turn -> its role.
        field: what an error calls the text.

    Raises:
        DataError: if the text does not begin with a marker.
    """
    pattern = "|".join(re.escape(marker) for marker in markers)
    before, *pieces = re.split(f"({pattern})", content)
    if before.strip() or not pieces:
        raise DataError(
            f"field {field!r} begins with {short(content[:40])}, expected one of "
            f"{', '.join(map(repr, markers))}."
        )
    return [
        {"role": markers[marker], "content": said.strip()}
        for marker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def transcript(content: str, markers: Mapping[str, str], *, field: str) -> Conversation:
    """Returns the conversation of such a text, up to its last answer."""
    return conversation(turns_of(content, markers, field=field), field=field)
