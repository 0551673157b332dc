"""From conversations to tokens with a mask: what the model sees and what it learns."""

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from qlora_jax.data.chat_tokenizer import ChatTokenizer
from qlora_jax.data.conversations import Conversation, DataError, Message
from qlora_jax.data.templates import template_source

# Templates that tell the model what day it is are told this one, so that the same rows
# are the same tokens tomorrow. It is the day that Llama 3.1's falls back on.
_TODAY = datetime.date(2024, 7, 26)

# Stands for the text of a message while a template is rendered.
_PLACEHOLDER = "\ue000{}\ue001"
_PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")


@dataclasses.dataclass(frozen=True)
class Example:
    """One document as the model sees it.

    Attributes:
        tokens: int32 [n].
        loss_mask: float32 [n], 1 where the token is to be predicted.
        divisible: a text without a question, of which any piece is as good.
        truncated: a limit cut something off.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    divisible: bool = False
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class EncodingOptions:
    """What is learned of a conversation, and how much of it is kept.

    Attributes:
        answers: learn the last answer, or all of them.
        train_on_source: learn the questions too.
        source_max_len: tokens that a question is cut to; with `answers="last"` all that
            stands before the answer is the question. None: not cut.
        target_max_len: tokens that an answer is cut to, its end token included.
        truncate_source: which end of a question falls: "right", as in QLoRA's code, or
            "left", which keeps the words next to the answer.
        chat_template: a name in `TEMPLATES`, or Jinja source; None: the model's own.

    Raises:
        ValueError: if a value is none of these, or a limit is not positive.
    """

    answers: Literal["last", "all"] = "last"
    train_on_source: bool = False
    source_max_len: int | None = None
    target_max_len: int | None = None
    truncate_source: Literal["right", "left"] = "right"
    chat_template: str | None = None

    def __post_init__(self):
        if self.answers not in ("last", "all"):
            raise ValueError(f"answers={self.answers!r} must be 'last' or 'all'.")
        if self.truncate_source not in ("right", "left"):
            raise ValueError(
                f"truncate_source={self.truncate_source!r} must be 'right' or 'left'."
            )
        for name in ("source_max_len", "target_max_len"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit} must be at least 1, or None.")
        if self.chat_template is not None:
            template_source(self.chat_template)


class Part(NamedTuple):
    """A piece of a document that is tokenized by itself."""

    text: str
    special: bool  # its control tokens are control tokens
    target: bool  # it is an answer


class Encoder:
    """Conversations -> examples, many at a time.

        [prompt up to where the answer begins] [answer, end token]
         mask 0                                 mask 1

    The prompt is tokenized by itself, as it will be when an answer is asked for. Text
    of a message that looks like a control token stays text.

    Args:
        tokenizer: of the model.
        options: what is learned.

    Attributes:
        fingerprint: a text that is another one if examples may come out otherwise.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, options: EncodingOptions | None = None
    ):
        self.options = options = options or EncodingOptions()
        if options.chat_template is not None:
            source = template_source(options.chat_template)
            tokenizer = dataclasses.replace(tokenizer, chat_template=source)  # pyright: ignore
        self.tokenizer = tokenizer
        self.fingerprint = repr((tokenizer.fingerprint, options))
        control = {t for t in (*tokenizer.control_tokens, tokenizer.eos_token) if t}
        # Longer ones first: one may begin with another.
        longest = sorted(control, key=lambda token: (-len(token), token))
        self._control = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._knows_tools = "tool" in tokenizer.template_source

    def encode(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Returns an example of each conversation.

        Raises:
            DataError: if the template refuses one, see `parts`.
        """
        return self.encode_parts([(self.parts(c), c) for c in conversations])

    def encode_parts(
        self, documents: Sequence[tuple[Sequence[Part], Conversation]]
    ) -> list[Example]:
        """Returns an example of each conversation and its parts."""
        flat = [part for parts, _ in documents for part in parts]
        ids: list[list[int]] = [[]] * len(flat)
        for special in (False, True):
            places = [i for i, part in enumerate(flat) if part.special == special]
            texts = [flat[i].text for i in places]
            found = self.tokenizer.encode_many(texts, special=special)
            for i, tokens in zip(places, found, strict=True):
                ids[i] = tokens
        examples, at = [], 0
        for parts, conversation in documents:
            stop = at + len(parts)
            divisible = self._divisible(conversation)
            examples.append(self._joined(parts, ids[at:stop], divisible))
            at = stop
        return examples

    def _joined(
        self, parts: Sequence[Part], ids: Sequence[list[int]], divisible: bool
    ) -> Example:
        """Joins the parts; questions and answers are cut each to its own limit."""
        runs: list[tuple[bool, list[int]]] = []
        for part, tokens in zip(parts, ids, strict=True):
            if not runs or runs[-1][0] != part.target:
                runs.append((part.target, []))
            runs[-1][1].extend(tokens)
        options, truncated = self.options, False
        tokens: list[int] = []
        mask: list[np.ndarray] = []
        for target, run in runs:
            limit = options.target_max_len if target else options.source_max_len
            if limit is not None and len(run) > limit:
                left = not target and options.truncate_source == "left"
                run, truncated = run[-limit:] if left else run[:limit], True
            tokens += run
            mask.append(np.full(len(run), target or options.train_on_source))
        return Example(
            np.array(tokens, np.int32),
            np.concatenate(mask or [np.zeros(0)]).astype(np.float32),
            divisible,
            truncated,
        )

    def _divisible(self, conversation: Conversation) -> bool:
        # A text with a limit is cut off there, as QLoRA's code does.
        question = len(conversation.messages) > 1
        return conversation.raw and not question and not self.options.target_max_len

    def parts(self, conversation: Conversation) -> list[Part]:
        """Returns the pieces of a conversation, those to be learned marked.

        Raises:
            DataError: if the template refuses the turns, has no place for the tools
                they use, or writes earlier turns anew after each one.
        """
        if conversation.messages[-1]["role"] != "assistant":
            raise DataError(
                f"The last turn is of the {conversation.messages[-1]['role']}: there "
                "is no answer to learn."
            )
        if conversation.raw:
            return self._raw_parts(conversation)
        messages = conversation.messages
        if conversation.tools or any("tool_calls" in m for m in messages):
            self._check_tools(conversation)
        texts: list[str] = []
        if self._control.search("".join(m["content"] for m in messages)):
            # Texts that look like control are kept apart from the template's own.
            texts = [m["content"] for m in messages]
            messages = tuple(
                {**m, "content": _PLACEHOLDER.format(i)} if m["content"] else m
                for i, m in enumerate(messages)
            )
        pieces = self._spans(messages, conversation.tools)
        return [part for piece in pieces for part in _restored(piece, texts)]

    def _raw_parts(self, conversation: Conversation) -> list[Part]:
        parts = [Part(self.tokenizer.bos_token, True, False)]
        for message in conversation.messages:
            target = message["role"] == "assistant"
            parts.append(Part(message["content"], False, target))
        parts.append(Part(self.tokenizer.eos_token, True, True))
        return [part for part in parts if part.text]

    def _spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> list[Part]:
        """Cuts the rendered text where answers begin and end."""
        last = len(messages) - 1
        whole = self._render(messages, tools)
        spans: list[Part] = []
        at = 0
        for i in self._learned(messages):
            head = self._render(messages[:i], tools, answer_next=True)
            if i == last and not whole.startswith(head):
                # The template writes a past answer otherwise than it asks for one.
                content = Part(messages[i]["content"], True, True)
                spans.append(Part(head[at:], True, False))
                return [*spans, content, Part(self.tokenizer.eos_token, True, True)]
            upto = whole if i == last else self._render(messages[: i + 1], tools)
            stop = _common(whole, upto)
            # The last turn of a shorter conversation may end with more than the same
            # turn does here, but with no other words.
            otherwise = self._control.sub("", upto[stop:]).strip()
            if not whole.startswith(head) or stop < len(head) or otherwise:
                raise DataError(
                    f"the chat template writes the turns before messages[{i + 1}] anew "
                    "after it, so that answers cannot be told apart; learn the last "
                    "one alone (answers='last')."
                )
            answer = whole[len(head) : stop]
            ends = [match.end() for match in self._control.finditer(answer)]
            answer = answer[: ends[-1]] if ends else answer
            spans.append(Part(whole[at : len(head)], True, False))
            spans.append(Part(answer, True, True))
            at = len(head) + len(answer)
            if i == last and not ends:
                spans.append(Part(self.tokenizer.eos_token, True, True))
        return spans

    def _learned(self, messages: Sequence[Message]) -> list[int]:
        """Returns which turns are learned: answers to something, as the options say."""
        last = len(messages) - 1
        if not last:
            raise DataError("the only turn is the assistant's: there is no question.")
        weighted = [
            i
            for i, m in enumerate(messages)
            if i and m["role"] == "assistant" and m.get("weight", 1)
        ]
        if not weighted:
            raise DataError("every answer has weight 0: there is nothing to learn.")
        return weighted if self.options.answers == "all" else weighted[-1:]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        answer_next: bool = False,
    ) -> str:
        try:
            return self.tokenizer.render(
                messages, answer_next=answer_next, tools=tools, date=_TODAY
            )
        except ValueError as error:
            raise DataError(str(error)) from None

    def _check_tools(self, conversation: Conversation) -> None:
        if not self._knows_tools:
            raise DataError(
                "the chat template has no place for tools and their calls; give "
                "chat_template='hermes', or another that has."
            )
        calls = [m.get("tool_calls") for m in conversation.messages]
        found = self._control.search(repr((calls, conversation.tools)))
        if found:
            raise DataError(f"a tool or its call holds the control token {found[0]!r}.")


def _restored(part: Part, texts: Sequence[str]) -> list[Part]:
    if not texts:
        return [part]
    pieces = _PLACEHOLDERS.split(part.text)  # template, number, template, ...
    parts = [
        Part(texts[int(piece)], False, part.target)
        if i % 2
        else Part(piece, True, part.target)
        for i, piece in enumerate(pieces)
    ]
    return [part for part in parts if part.text]


def _common(a: str, b: str) -> int:
    """Returns how many characters two texts begin with together."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def is_empty(conversation: Conversation, answers: Literal["last", "all"]) -> bool:
    """Tells whether the answers to be learned hold nothing."""
    learned = conversation.messages[-1:] if answers == "last" else conversation.messages
    return not any(
        m["content"].strip() or m.get("tool_calls")
        for m in learned
        if m["role"] == "assistant"
    )


def encode_conversation(
    conversation: Conversation,
    tokenizer: ChatTokenizer,
    options: EncodingOptions | None = None,
) -> Example:
    """Tokenizes one conversation; see `Encoder`."""
    return Encoder(tokenizer, options).encode([conversation])[0]
