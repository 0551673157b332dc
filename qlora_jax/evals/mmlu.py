"""MMLU: the letter of the right answer, by its likelihood.

The prompts are those of QLoRA's code, which are those of the benchmark:

    The following are multiple choice questions (with answers) about  SUBJECT.
    (an empty line)
    QUESTION
    A. ...
    B. ...
    C. ...
    D. ...
    Answer:

with five solved questions of the subject after the headline, or none.
"""

import collections
import dataclasses
import gzip
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qlora_jax.evals.scoring import next_log_probs

LETTERS = "ABCD"
SHOTS = 5
# Rows are padded to a multiple of this, so that few lengths mean few compilations.
_BUCKET = 64


class TextTokenizer(Protocol):
    """What the evaluation asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id of the token a text begins with."""
        ...


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with four answers.

    Attributes:
        subject: its name, with underscores.
        text: from the question to "Answer:".
        answer: the right letter.
        shots: solved questions, each from the question to the letter.
    """

    subject: str
    text: str
    answer: str
    shots: tuple[str, ...] = ()

    def prompt(self, shots: int | None = None) -> str:
        """Returns the prompt, with so many of the solved questions; None for all."""
        subject = self.subject.replace("_", " ")
        # Two blanks: the original has them.
        headline = (
            "The following are multiple choice questions (with answers) about  "
            f"{subject}."
        )
        kept = self.shots if shots is None else self.shots[:shots]
        return "\n\n".join([headline, *kept, self.text])


@dataclasses.dataclass(frozen=True)
class MmluResult:
    """What was found.

    Attributes:
        accuracy: share of all questions.
        mean: mean of the accuracies of the subjects, which the paper reports.
        subjects: accuracy of each.
        count: questions.
    """

    accuracy: float
    mean: float
    subjects: Mapping[str, float]
    count: int


def read_questions(
    path: str | os.PathLike[str],
    *,
    shots: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> list[Question]:
    """Reads questions, a JSON object a line (also .gz).

    Either of `subject`, `question`, `choices` (four) and `answer` (a letter or 0 to 3),
    or of `subject`, `input` (a whole prompt without shots) and `output`.

    Args:
        path: the questions.
        shots: solved questions of the same form; the first five of a subject come
            before each of its questions.
        limit: take only so many of each subject, from the first on.

    Raises:
        ValueError: if a file cannot be read, a line is not of this form (named), or a
            subject has no solved question.
    """
    examples = collections.defaultdict(list)
    if shots is not None:
        for question in _read(pathlib.Path(shots)):
            examples[question.subject].append(f"{question.text} {question.answer}")
    found, taken = [], collections.Counter()
    for question in _read(pathlib.Path(path)):
        taken[question.subject] += 1
        if limit is not None and taken[question.subject] > limit:
            continue
        solved = tuple(examples[question.subject][:SHOTS])
        if shots is not None and not solved:
            raise ValueError(f"{shots} has no question on {question.subject}.")
        found.append(dataclasses.replace(question, shots=solved))
    if not found:
        raise ValueError(f"{path} holds no questions.")
    return found


def _read(path: pathlib.Path) -> list[Question]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            lines = file.read().split("\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from None
    return [
        _question(line, f"{path}, line {i}")
        for i, line in enumerate(lines, 1)
        if line.strip()
    ]


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
        if "choices" in row:
            options = zip(LETTERS, row["choices"], strict=True)
            choices = "".join(f"\n{letter}. {text}" for letter, text in options)
            text, answer = f"{row['question']}{choices}\nAnswer:", row["answer"]
        else:
            # The headline is made again, and may be followed by shots.
            text, answer = row["input"].split("\n\n", 1)[1].rstrip(), row["output"]
        answer = LETTERS[answer] if isinstance(answer, int) else str(answer).strip()
        if answer not in tuple(LETTERS) or not text.endswith("Answer:"):
            raise ValueError(f"the answer is {answer!r}")
        return Question(row["subject"], text, answer)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} is no question of MMLU ({error}): expected subject, question, "
            "four choices and answer, or subject, input and output."
        ) from None


def mmlu(
    model: Any,
    tokenizer: TextTokenizer,
    questions: Sequence[Question],
    *,
    max_tokens: int = 2048,
    batch_tokens: int = 8192,
) -> MmluResult:
    """Measures how often the likeliest of the four letters is the right one.

    Args:
        model: has `hidden` and `head`, as `Llama`.
        tokenizer: of the model.
        questions: from `read_questions`.
        max_tokens: of a prompt. A longer one loses solved questions, the last first;
            the question itself is never cut, but for its beginning where it is longer
            alone.
        batch_tokens: tokens computed at a time.

    Returns:
        The accuracies.
    """
    letters = _letter_ids(tokenizer)
    prompts = [_fitting(question, tokenizer, max_tokens) for question in questions]
    right = np.zeros(len(questions), bool)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    while order:
        width = -(-len(prompts[order[0]]) // _BUCKET) * _BUCKET
        size = max(batch_tokens // width, 1)
        rows, order = order[:size], order[size:]
        tokens = np.zeros((size, width), np.int32)
        lengths = np.ones(size, np.int32)
        for place, row in enumerate(rows):
            tokens[place, : len(prompts[row])] = prompts[row]
            lengths[place] = len(prompts[row])
        scores = np.asarray(next_log_probs(model, tokens, lengths))[:, letters]
        for row, best in zip(rows, scores.argmax(axis=-1), strict=False):
            right[row] = LETTERS[best] == questions[row].answer
    subjects = collections.defaultdict(list)
    for question, was_right in zip(questions, right, strict=True):
        subjects[question.subject].append(was_right)
    means = {name: float(np.mean(values)) for name, values in subjects.items()}
    mean = float(np.mean(list(means.values())))
    return MmluResult(float(right.mean()), mean, means, len(questions))


def _letter_ids(tokenizer: TextTokenizer) -> list[int]:
    """Returns the id that each letter has after the prompt."""
    before, ids = tokenizer.encode("Answer:"), []
    for letter in LETTERS:
        after = tokenizer.encode(f"Answer: {letter}")
        # " A" is one token, or the blank is one and the letter another, alike for all.
        if after[: len(before)] != before or len(after) == len(before):
            raise ValueError(f"The tokenizer merges {letter!r} with the prompt.")
        ids.append(after[-1])
    return ids


def _fitting(
    question: Question, tokenizer: TextTokenizer, max_tokens: int
) -> list[int]:
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for shots in range(len(question.shots), -1, -1):
        ids = first + tokenizer.encode(question.prompt(shots))
        if len(ids) <= max_tokens:
            return ids
    return ids[-max_tokens:]
