"""From rows of a file to conversations, and from conversations to tokens with a mask.

A format is one entry of `FORMATS`: the fields a row must have, and how it becomes a
conversation. Conversations are lists of {"role", "content"}, as chat templates take
them.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

Message = dict[str, str]
Conversation = list[Message]


class DataError(ValueError):
    """A row that is not what its format asks for; names file, line and field."""


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How a row becomes a conversation.

    Attributes:
        required: fields that must be there and hold text.
        convert: row -> conversation.
    """

    required: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Conversation]


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    question, extra = row["instruction"], row.get("input") or ""
    return [
        {"role": "user", "content": f"{question}\n{extra}" if extra else question},
        {"role": "assistant", "content": row["output"]},
    ]


FORMATS: dict[str, RowFormat] = {
    "alpaca": RowFormat(("instruction", "output"), _alpaca),
}


def to_conversation(
    row: Any, format: str = "alpaca", *, where: str = "the row"
) -> Conversation:
    """Returns the conversation that a row stands for.

    Args:
        row: a mapping with the fields of the format.
        format: a name in `FORMATS`. "alpaca": `instruction`, optional `input`,
            `output`.
        where: what an error calls the row, as "train.jsonl, line 3".

    Raises:
        DataError: if a field is missing or is no text, or the answer is empty.
        ValueError: if the format is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"{format=} must be one of {', '.join(FORMATS)}.")
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is a {type(row).__name__}, expected an object.")
    for field in FORMATS[format].required:
        if field not in row:
            raise DataError(
                f"{where} has no field {field!r} (it has {', '.join(row) or 'none'}); "
                f"the {format} format needs {', '.join(FORMATS[format].required)}."
            )
    for field, value in row.items():
        if field in (*FORMATS[format].required, "input") and not (
            isinstance(value, str) or (value is None and field == "input")
        ):
            raise DataError(f"{where}: field {field!r} is {value!r}, expected text.")
    conversation = FORMATS[format].convert(row)
    if not conversation[-1]["content"].strip():
        raise DataError(f"{where} has an empty answer: there is nothing to learn.")
    return conversation


def read_conversations(
    path: str | os.PathLike[str], format: str = "alpaca"
) -> list[Conversation]:
    r"""Reads a JSON array, or JSON lines, of rows.

    Lines end at "\n" alone: texts may hold other separators, as U+2028.

    Args:
        path: a `.json` file with one array, or a `.jsonl` file with an object a line.
        format: a name in `FORMATS`.

    Raises:
        DataError: if the file is missing or empty, or a row is not what it should be.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise DataError(f"There is no data file {path}.")
    conversations = [
        to_conversation(row, format, where=where) for where, row in _rows(path)
    ]
    if not conversations:
        raise DataError(f"{path} holds no rows.")
    return conversations


def _rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); save it as such.") from None
    if text.lstrip()[:1] == "[":
        for i, row in enumerate(_parsed(text, str(path)), 1):
            yield f"{path}, row {i}", row
        return
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {i}"
            yield where, _parsed(line, where)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error}). Give a JSON array or one object a line."
        ) from None


@runtime_checkable
class ChatTokenizer(Protocol):
    """What encoding asks of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """Id of the token that ends an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, answer_next: bool = False
    ) -> list[int]:
        """Returns the ids of a conversation."""
        ...


@dataclasses.dataclass(frozen=True)
class Example:
    """One row as the model sees it.

    Attributes:
        tokens: int32 [n].
        loss_mask: float32 [n], 1 where the token is to be predicted.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def encode_conversation(
    conversation: Sequence[Mapping[str, Any]], tokenizer: ChatTokenizer
) -> Example:
    """Tokenizes a conversation; the loss is on its last answer and the end token.

        [prompt up to where the answer begins] [answer] [end]
         mask 0                                 1        1

    Args:
        conversation: turns, the last of them the assistant's.
        tokenizer: of the model, with its chat template.

    Raises:
        ValueError: if the last turn is not the assistant's.
    """
    *before, last = conversation
    if last["role"] != "assistant":
        raise ValueError(
            f"The last turn is of the {last['role']}: there is no answer to learn."
        )
    prompt = tokenizer.encode_chat(before, answer_next=True)
    answer = [*tokenizer.encode(last["content"]), tokenizer.eos_id]
    mask = np.zeros(len(prompt) + len(answer), np.float32)
    mask[len(prompt) :] = 1
    return Example(np.array(prompt + answer, np.int32), mask)
