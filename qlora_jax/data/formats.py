"""The forms that rows of instruction data come in: one table.

A format is one entry of `FORMATS`: the fields a row must have, and how it becomes
conversations.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qlora_jax.data.conversations import (
    Conversation,
    DataError,
    conversation,
    exchange,
    short,
    text,
    transcript,
    turns_of,
)

Row = Mapping[str, Any]

_GUANACO = {
    "### Human:": "user",
    "### Assistant:": "assistant",
    "### System:": "system",
}
_CHIP2 = {"<human>:": "user", "<bot>:": "assistant"}
_HH = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How a row becomes conversations.

    Attributes:
        summary: what it looks like, in a line.
        fields: those that must be there -> `str`, `list`, or `object` for either.
        convert: row -> its conversations; nearly always one.
        marker: "auto" takes the format only if this text is in the first field.
    """

    summary: str
    fields: Mapping[str, type]
    convert: Callable[[Row], Iterator[Conversation]]
    marker: str = ""

    def matches(self, row: Row) -> bool:
        """Tells whether a row looks like one of this format."""
        for name, kind in self.fields.items():
            if row.get(name) is None or not isinstance(row[name], kind):
                return False
        return self.marker in str(row[next(iter(self.fields))])


def _messages(row: Row) -> Iterator[Conversation]:
    yield conversation(row["messages"], row.get("tools"))


def _sharegpt(row: Row) -> Iterator[Conversation]:
    turns = row["conversations"]
    if isinstance(row.get("system"), str) and row["system"].strip():
        turns = [{"role": "system", "content": row["system"]}, *turns]
    # Preferences in this form: the answer that was chosen stands beside the turns.
    turns = [*turns, row["chosen"]] if isinstance(row.get("chosen"), Mapping) else turns
    yield conversation(turns, row.get("tools"), field="conversations")


def _hh_rlhf(row: Row) -> Iterator[Conversation]:
    chosen, prompt = row["chosen"], row.get("prompt")
    if isinstance(chosen, list):
        before = prompt if isinstance(prompt, list) else []
        turns = [*before, *chosen]
        yield conversation(turns, row.get("tools"), field="chosen")
    elif isinstance(chosen, str) and isinstance(prompt, str) and "Human:" not in chosen:
        yield exchange(prompt, chosen)
    elif isinstance(chosen, str):
        yield transcript("\n\n" + chosen.lstrip("\n"), _HH, field="chosen")
    else:
        raise DataError("field 'chosen' is an object, expected text or turns.")


def _with_input(question: str, extra: Any, field: str) -> str:
    if extra is not None and not isinstance(extra, str):
        raise DataError(f"field {field!r} is {short(extra)}, expected text.")
    return f"{question}\n{extra}" if extra else question


def _alpaca(row: Row) -> Iterator[Conversation]:
    question = _with_input(row["instruction"], row.get("input"), "input")
    yield exchange(question, row["output"])


def _dolly(row: Row) -> Iterator[Conversation]:
    question = _with_input(row["instruction"], row.get("context"), "context")
    yield exchange(question, row["response"])


def _self_instruct(row: Row) -> Iterator[Conversation]:
    for i, instance in enumerate(row["instances"]):
        answer = instance.get("output") if isinstance(instance, Mapping) else None
        if not isinstance(answer, str):
            raise DataError(f"instances[{i}].output is {short(answer)}, expected text.")
        extra = instance.get("input")
        question = _with_input(row["instruction"], extra, f"instances[{i}].input")
        yield exchange(question, answer)


def _oasst1(row: Row) -> Iterator[Conversation]:
    yield transcript(row["text"], _GUANACO, field="text")


def _oasst1_pairs(row: Row) -> Iterator[Conversation]:
    # The input ends with "### Assistant:", where the answer begins.
    asked = row["input"].rstrip().removesuffix("### Assistant:")
    question = turns_of(asked, _GUANACO, field="input")
    answer = {"role": "assistant", "content": row["output"]}
    yield conversation([*question, answer], field="input")


def _chip2(row: Row) -> Iterator[Conversation]:
    yield transcript(row["text"], _CHIP2, field="text")


def _longform(row: Row) -> Iterator[Conversation]:
    yield exchange(row["input"], row["output"])


def _prompt_completion(row: Row) -> Iterator[Conversation]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        yield exchange(prompt, completion, raw=True)
    elif isinstance(prompt, list) and isinstance(completion, list):
        yield conversation([*prompt, *completion], row.get("tools"), field="prompt")
    else:
        raise DataError("fields 'prompt' and 'completion' must both be text or turns.")


def _prompt_response(row: Row) -> Iterator[Conversation]:
    yield exchange(row["prompt"], row["response"], raw=True)


def _question_answer(row: Row) -> Iterator[Conversation]:
    yield exchange(row["question"], row["answer"])


def _text(row: Row) -> Iterator[Conversation]:
    yield text(row["text"])


# In the order in which "auto" tries them: what asks for more comes first.
FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(
        "OpenAI: messages of role and content, optional tools",
        {"messages": list},
        _messages,
    ),
    "sharegpt": RowFormat(
        "conversations of from and value, optional system, tools and chosen",
        {"conversations": list},
        _sharegpt,
    ),
    "hh_rlhf": RowFormat(
        "chosen: 'Human: ... Assistant: ...', or an answer beside prompt",
        {"chosen": object},
        _hh_rlhf,
    ),
    "alpaca": RowFormat(
        "instruction, optional input, output",
        {"instruction": str, "output": str},
        _alpaca,
    ),
    "dolly": RowFormat(
        "instruction, optional context, response",
        {"instruction": str, "response": str},
        _dolly,
    ),
    "self_instruct": RowFormat(
        "instruction with instances of input and output",
        {"instruction": str, "instances": list},
        _self_instruct,
    ),
    "oasst1": RowFormat(
        "text of '### Human: ...### Assistant: ...', as Guanaco was trained on",
        {"text": str},
        _oasst1,
        marker="### Human:",
    ),
    "oasst1_pairs": RowFormat(
        "input of '### Human: ... ### Assistant:', output",
        {"input": str, "output": str},
        _oasst1_pairs,
        marker="### Human:",
    ),
    "chip2": RowFormat(
        "text of '<human>: ... <bot>: ...'",
        {"text": str},
        _chip2,
        marker="<human>:",
    ),
    "longform": RowFormat(
        "input, output",
        {"input": str, "output": str},
        _longform,
    ),
    "prompt_completion": RowFormat(
        "prompt, completion: as they are if text, by the chat template if turns",
        {"prompt": object, "completion": object},
        _prompt_completion,
    ),
    "prompt_response": RowFormat(
        "prompt, response: as they are, without a chat template",
        {"prompt": str, "response": str},
        _prompt_response,
    ),
    "question_answer": RowFormat(
        "question, answer",
        {"question": str, "answer": str},
        _question_answer,
    ),
    "text": RowFormat(
        "text, all of it learned; longer ones are cut into pieces",
        {"text": str},
        _text,
    ),
}


def known_format(name: str) -> str:
    """Returns the name, "auto" included.

    Raises:
        ValueError: if there is no such format.
    """
    if name != "auto" and name not in FORMATS:
        raise ValueError(f"format={name!r} must be one of auto, {', '.join(FORMATS)}.")
    return name


def detect_format(row: Any, *, where: str = "the row") -> str:
    """Returns the name of the first format that a row's fields fit.

    Raises:
        DataError: if none does.
    """
    for name, format in FORMATS.items():
        if isinstance(row, Mapping) and format.matches(row):
            return name
    found = (
        f"fields {', '.join(map(repr, row)) or 'none'}"
        if isinstance(row, Mapping)
        else f"a {type(row).__name__}"
    )
    forms = "; ".join(f"{name} ({', '.join(f.fields)})" for name, f in FORMATS.items())
    raise DataError(
        f"{where} has {found}, which no format has. Expected one of: {forms}. Name one "
        "with format=, or say which of your fields are its with fields=."
    )


_EXPECTED = {str: "text", list: "a list", object: "something"}


def to_conversations(
    row: Any, format: str = "auto", *, where: str = "the row"
) -> list[Conversation]:
    """Returns the conversations that a row stands for; nearly always one.

    Args:
        row: a mapping with the fields of the format.
        format: a name in `FORMATS`, or "auto" to find it by the fields.
        where: what an error calls the row, as "train.jsonl, line 3".

    Raises:
        DataError: if a field is missing or is not what the format asks for.
        ValueError: if the format is unknown.
    """
    if known_format(format) == "auto":
        format = detect_format(row, where=where)
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}, expected an object.")
    for field, kind in FORMATS[format].fields.items():
        if field not in row:
            raise DataError(
                f"{where} has no field {field!r} (it has {', '.join(row) or 'none'}); "
                f"the {format} format needs {', '.join(FORMATS[format].fields)}."
            )
        if not isinstance(row[field], kind) or row[field] is None:
            raise DataError(
                f"{where}: field {field!r} is {short(row[field])}, expected "
                f"{_EXPECTED[kind]}."
            )
    try:
        return list(FORMATS[format].convert(row))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
