"""What `benchmarks/quality.py` trains on, and how it counts right answers.

A task has conversations to train on, others that are held out, and a measure of how
many of those a model gets right:

    gsm8k        worked solutions; right if the number it comes to is
    arc numbers  "the correct answer is answer3", among three to five
    arc texts    the answer itself, which is not named in the question

Of ARC a model is right if, of all answers to choose from, the right one has the lowest
loss.
"""

import dataclasses
import decimal
import functools
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import qlora_jax as ql
from qlora_jax.evals import log_probs

# Rows of answers are padded to one of these, so that few programs are compiled.
_WIDTHS = (64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How many answers were right."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """Right answers, of all."""
        return self.right / self.count


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What is learned and how it is measured.

    Attributes:
        name: of the task.
        train: documents to train on.
        test: documents held out, for the loss.
        accuracy: counts the right answers of a model.
    """

    name: str
    train: list[ql.data.Example]
    test: list[ql.data.Example]
    accuracy: Callable[[Any], Accuracy]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, the answers to choose from, and which of them is right."""

    text: str
    answers: tuple[str, ...]
    right: int


def final_number(text: str) -> decimal.Decimal | None:
    """Returns the number a solution comes to: that after "####", else its last one.

    Commas between thousands are none of it; None if there is no number.
    """
    _, marked, after = text.partition("####")
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", after if marked else text)
    if not found:
        return None
    return decimal.Decimal(found[0 if marked else -1].replace(",", ""))


def parse_question(row: dict[str, str]) -> Question:
    """Returns the question of a row of `finetune_pairs`.

    Raises:
        ValueError: if it is none: of another form, or without its right answer.
    """
    parts = row["instruction"].split("\n\n")
    answers = re.split(r"(?:^|\s)Answer\d: ", parts[-2])[1:] if len(parts) > 2 else []
    number = re.fullmatch(r"answer(\d)", row["answer"])
    if not answers or number is None or not 1 <= int(number[1]) <= len(answers):
        raise ValueError(
            f"{row['answer']!r} of {row['instruction']!r}: expected a question, a line "
            "of 'Answer1: ... Answer2: ...' and the answer's name, as 'answer2'."
        )
    _, _, text = parts[0].partition(": ")
    stripped = tuple(answer.strip() for answer in answers)
    return Question(text, stripped, int(number[1]) - 1)


def chosen(
    model: Any, questions: Sequence[Sequence[ql.data.Example]], batch_tokens: int
) -> list[int]:
    """Returns, for each question, which of its answers has the lowest loss.

    Args:
        model: has `hidden` and `head`, as `Llama`.
        questions: of each, the question followed by every answer.
        batch_tokens: tokens computed at a time.
    """
    documents = [document for answers in questions for document in answers]
    losses = np.empty(len(documents))
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
    while order:
        longest = len(documents[order[0]])
        width = next((w for w in _WIDTHS if w >= longest), longest)
        size = max(batch_tokens // width, 1)
        batch, order = order[:size], order[size:]
        tokens = np.zeros((size, width), np.int32)
        for place, i in enumerate(batch):
            tokens[place, : len(documents[i])] = documents[i].tokens
        scores = np.asarray(log_probs(model, tokens, chunk_size=4096))
        for place, i in enumerate(batch):
            mask = documents[i].loss_mask[1:]
            losses[i] = -scores[place, : len(mask)] @ mask / mask.sum()
    stops = np.cumsum([len(answers) for answers in questions])
    return [int(part.argmin()) for part in np.split(losses, stops[:-1])]


def read_tasks(
    data: pathlib.Path,
    tokenizer: Any,
    *,
    rows: int | None = None,
    answers: int = 500,
    max_new_tokens: int = 256,
    batch_tokens: int = 32_768,
) -> list[Task]:
    """Reads the three tasks.

    Args:
        data: the folder that holds `instruct/` and `finetune_pairs/`, or their files.
        tokenizer: of the model.
        rows: take only so many of each file, from the first on.
        answers: of GSM8K, how many questions are answered to count the right ones; they
            are drawn with a fixed seed.
        max_new_tokens: of such an answer.
        batch_tokens: tokens computed at a time when answers are compared.
    """
    encode = ql.data.Encoder(tokenizer).encode

    def path(folder: str, name: str) -> pathlib.Path:
        inside = data / folder / name
        return inside if inside.exists() else data / name

    gsm8k = [
        ql.data.read_conversations(path("instruct", f"gsm8k_{part}"))[:rows]
        for part in ("train.jsonl.gz", "test.jsonl")
    ]
    drawn = np.random.default_rng(0).permutation(len(gsm8k[1]))[:answers]
    solve = functools.partial(
        solved,
        tokenizer=tokenizer,
        conversations=[gsm8k[1][i] for i in sorted(drawn)],
        max_new_tokens=max_new_tokens,
    )
    tasks = [Task("gsm8k", encode(gsm8k[0]), encode(gsm8k[1]), solve)]

    arc = [
        read_rows(path("finetune_pairs", f"arc_easy_{part}.jsonl.gz"))[:rows]
        for part in ("train", "test")
    ]
    for name, as_pairs in (("arc numbers", numbered), ("arc texts", spelled_out)):
        train, test = ([as_pairs(row) for row in part] for part in arc)
        right = [ql.data.exchange(text, answers[i]) for text, answers, i in train]
        wanted = [i for _, _, i in test]
        flat = [ql.data.exchange(text, a) for text, answers, _ in test for a in answers]
        stops = np.cumsum([len(answers) for _, answers, _ in test]).tolist()
        documents = encode(flat)
        choices = [documents[a:b] for a, b in zip([0, *stops], stops, strict=False)]
        held_out = [choice[i] for choice, i in zip(choices, wanted, strict=True)]
        count = functools.partial(
            compared, choices=choices, wanted=wanted, batch_tokens=batch_tokens
        )
        tasks.append(Task(name, encode(right), held_out, count))
    return tasks


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Returns the objects of a `.jsonl.gz` file."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file.read().split("\n") if line]


def numbered(row: dict[str, str]) -> tuple[str, list[str], int]:
    """Returns prompt, answers and the right one's place, as the row has them."""
    question = parse_question(row)
    answers = [
        f"the correct answer is answer{i}" for i in range(1, len(question.answers) + 1)
    ]
    return row["instruction"], answers, question.right


def spelled_out(row: dict[str, str]) -> tuple[str, list[str], int]:
    """Returns the bare question, the answers' texts and the right one's place."""
    question = parse_question(row)
    return question.text, list(question.answers), question.right


def compared(
    model: Any,
    *,
    choices: Sequence[Sequence[ql.data.Example]],
    wanted: Sequence[int],
    batch_tokens: int,
) -> Accuracy:
    """Counts questions whose right answer has the lowest loss."""
    found = chosen(model, choices, batch_tokens)
    right = sum(a == b for a, b in zip(found, wanted, strict=True))
    return Accuracy(right, len(wanted))


def solved(
    model: Any,
    *,
    tokenizer: Any,
    conversations: Sequence[ql.data.Conversation],
    max_new_tokens: int,
) -> Accuracy:
    """Counts greedy answers that come to the right number."""
    prompts = [
        tokenizer.encode_chat(conversation.question, answer_next=True)
        for conversation in conversations
    ]
    new = ql.generate(model, prompts, max_new_tokens=max_new_tokens)
    right = sum(
        final_number(tokenizer.decode(ids)) == final_number(conversation.answer)
        for ids, conversation in zip(new, conversations, strict=True)
    )
    return Accuracy(right, len(prompts))
