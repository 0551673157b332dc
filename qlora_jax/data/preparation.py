"""From files and options to the batches of a run: the one function that a run calls."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from qlora_jax.data.batching import Batch, Rows
from qlora_jax.data.cache import Encoded, TokenCache
from qlora_jax.data.chat_tokenizer import ChatTokenizer
from qlora_jax.data.conversations import DataError
from qlora_jax.data.documents import Documents
from qlora_jax.data.encoding import Encoder, EncodingOptions, Example
from qlora_jax.data.mixture import Mixture, load_grain
from qlora_jax.data.sources import Source, as_sources


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What became of the rows; as text, what a user should be told once.

    Attributes:
        rows: read from the sources to train on.
        bad_rows: of them, left out as `skip_bad_rows` allows.
        first_bad_row: what was wrong with the first of these; "" if there is none.
        empty_answers: conversations left out since nothing is answered.
        no_target: documents left out since the limits left nothing to learn.
        truncated: documents that lost their end to a limit.
        documents: to train on.
        held_out: documents to evaluate on.
        tokens: of the documents to train on.
        target_tokens: of them, those that are learned.
        batch_rows: rows of the model's input that a pass takes.
        batches: of a pass.
        padding: share of a pass that is padding.
        packing: several documents share a row.
    """

    rows: int
    bad_rows: int
    first_bad_row: str
    empty_answers: int
    no_target: int
    truncated: int
    documents: int
    held_out: int
    tokens: int
    target_tokens: int
    batch_rows: int
    batches: int
    padding: float
    packing: bool

    def as_dict(self) -> dict[str, Any]:
        """Returns the numbers as JSON can hold them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lost = [
            f"{count:,} {what}"
            for count, what in [
                (self.bad_rows, "bad rows left out"),
                (self.empty_answers, "with an empty answer left out"),
                (self.no_target, "left out with nothing to learn within the limits"),
                (self.truncated, "cut off at a limit"),
            ]
            if count
        ]
        held_out = f", {self.held_out:,} held out" if self.held_out else ""
        packed = f" in {self.batch_rows:,} packed rows" if self.packing else ""
        learned = self.target_tokens / max(self.tokens, 1)
        return "\n".join([
            f"{self.rows:,} rows: {self.documents:,} documents to train on{held_out}",
            *([f"of these: {', '.join(lost)}"] if lost else []),
            *([f"first bad row: {self.first_bad_row}"] if self.bad_rows else []),
            f"{self.tokens:,} tokens, {learned:.1%} of them learned",
            f"{self.batches:,} batches a pass{packed}, {self.padding:.1%} padding",
        ])  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The data of a run.

    Attributes:
        train: batches without end; `len` is of one pass.
        evaluation: batches of the documents held out, each once, in order.
        held_out: those documents.
        statistics: what became of the rows.
        manifest: what the data are, for the run's folder: of each source path, hash of
            the content, format, rows and weight; the options; `fingerprint`.
    """

    train: Mixture
    evaluation: list[Batch]
    held_out: list[Documents]
    statistics: Statistics
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of the data, the tokenizer and the order of the batches."""
        return self.train.fingerprint

    def samples(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Returns ids of questions held out, and of the answers that are wanted.

        Of a text without a question its first token, and what follows.
        """
        examples = (e for part in self.held_out for e in part.answers())
        answered = (example for example in examples if example.loss_mask[1:].any())
        return [split(example) for example in itertools.islice(answered, count)]


def split(example: Example) -> tuple[list[int], list[int]]:
    """Returns the ids before the last answer, at least one, and those of the answer."""
    learned = np.flatnonzero(example.loss_mask[1:]) + 1
    breaks = np.flatnonzero(np.diff(learned) > 1)
    first = int(learned[breaks[-1] + 1 if len(breaks) else 0])
    stop = int(learned[-1]) + 1
    tokens = example.tokens.tolist()
    return tokens[:first], tokens[first:stop]


def prepare(
    sources: Any,
    tokenizer: ChatTokenizer,
    *,
    seq_len: int,
    batch_size: int,
    eval_sources: Any = None,
    eval_size: int | float = 0,
    format: str = "auto",
    answers: Literal["last", "all"] = "last",
    train_on_source: bool = False,
    source_max_len: int | None = None,
    target_max_len: int | None = None,
    truncate_source: Literal["right", "left"] = "right",
    chat_template: str | None = None,
    packing: bool = False,
    group_by_length: bool = False,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    skip_bad_rows: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Prepared:
    """Reads, tokenizes (or finds in the cache), holds out, lays out and orders rows.

    Args:
        sources: a path, a `Source`, a mapping of its arguments, or a list of these.
        tokenizer: of the model, as `load_tokenizer` returns it.
        seq_len: tokens of a row; what is longer is cut off.
        batch_size: rows of an optimizer step, over all processes.
        eval_sources: rows to evaluate on, as `sources`.
        eval_size: instead, how many rows of the sources are held out: a number, or a
            share below 1; chosen by `seed`.
        format: of sources that name none, see `FORMATS`.
        answers: learn the last answer of a conversation, or all.
        train_on_source: learn the questions too.
        source_max_len: tokens that a question is cut to, see `EncodingOptions`.
        target_max_len: tokens that an answer is cut to.
        truncate_source: which end of a question falls.
        chat_template: a name in `TEMPLATES`, or Jinja source; None: the model's own.
        packing: several documents to a row, none seeing another.
        group_by_length: rows of like length share a batch, whose width then varies.
        seed: of the order, and of what is held out.
        process_index: which of the processes that share a batch this is.
        process_count: how many there are.
        skip_bad_rows: how many rows that are not what they should be are left out.
        cache_dir: where tokenized sources are kept; None: $QLORA_JAX_CACHE/data, or
            ~/.cache/qlora_jax/data.

    Raises:
        DataError: if a file is missing, too many rows are bad, or nothing is left.
        ValueError: if an option is out of its range.
        ImportError: without grain, or without what reads a file.
    """
    options = EncodingOptions(
        answers=answers,
        train_on_source=train_on_source,
        source_max_len=source_max_len,
        target_max_len=target_max_len,
        truncate_source=truncate_source,
        chat_template=chat_template,
    )
    if eval_sources is not None and eval_size:
        raise ValueError(f"Give eval_sources or {eval_size=}, not both.")
    load_grain()  # it is said at once if it is absent
    train_sources = as_sources(sources, format)
    other = [] if eval_sources is None else as_sources(eval_sources, format)
    # What is read tells answers from questions, whichever of them are learned.
    encoder = Encoder(tokenizer, dataclasses.replace(options, train_on_source=False))
    cache = TokenCache(cache_dir)

    def encoded(parts: Sequence[Source]) -> list[Encoded]:
        found: list[Encoded] = []
        for source in parts:
            left = skip_bad_rows - sum(one.bad_rows for one in found)
            found.append(cache.encoded(source, encoder, skip_bad_rows=left))
        return found

    read, read_to_evaluate = encoded(train_sources), encoded(other)
    train, held_out = (
        [p.documents.all_learned() if train_on_source else p.documents for p in parts]
        for parts in (read, read_to_evaluate)
    )
    if eval_size:
        train, held_out = hold_out(train, eval_size, seed, seq_len)
    weights = [s.weight for s in train_sources if s.weight is not None]
    rows = []
    for source, part in zip(train_sources, train, strict=True):
        with _named(source):
            rows.append(Rows(part, seq_len, packing=packing))
    mixture = Mixture(
        rows,
        weights or None,
        batch_size=batch_size,
        seed=seed,
        group_by_length=group_by_length,
        process_index=process_index,
        process_count=process_count,
    )
    for i, part in enumerate(held_out):
        with _named((other or train_sources)[i]):
            held_out[i] = part.fitted(seq_len) if len(part) else part
    held_out = [part for part in held_out if len(part)]
    evaluation = [
        batch
        for part in held_out
        for batch in Rows(part, seq_len, packing=packing).in_order(
            batch_size, process_index, process_count
        )
    ]
    documents = [r.documents for r in rows]
    statistics = Statistics(
        rows=sum(part.rows for part in read),
        bad_rows=sum(part.bad_rows for part in read),
        first_bad_row=next((p.first_bad_row for p in read if p.bad_rows), ""),
        empty_answers=sum(part.empty_answers for part in read),
        no_target=sum(part.left_out for part in documents),
        truncated=sum(int(part.truncated.sum()) for part in documents),
        documents=sum(map(len, documents)),
        held_out=sum(map(len, held_out)),
        tokens=sum(int(part.lengths.sum()) for part in documents),
        target_tokens=sum(int(part.target_counts.sum()) for part in documents),
        batch_rows=sum(map(len, rows)),
        batches=len(mixture),
        padding=mixture.padding(),
        packing=packing,
    )
    manifest = {
        "fingerprint": mixture.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "sources": list(map(_described, train_sources, read)),
        "eval_sources": list(map(_described, other, read_to_evaluate)),
        "eval_size": eval_size,
        "options": {
            **dataclasses.asdict(options),
            "seq_len": seq_len,
            "batch_size": batch_size,
            "packing": packing,
            "group_by_length": group_by_length,
            "seed": seed,
        },
    }
    return Prepared(mixture, evaluation, held_out, statistics, manifest)


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """What is wrong with documents is said of the source that they are of."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source.path}: {error}") from None


def _described(source: Source, read: Encoded) -> dict[str, Any]:
    return {
        "path": str(source.path),
        "sha256": read.sha256,
        "format": source.format,
        "weight": source.weight,
        "rows": read.rows,
        "bad_rows": read.bad_rows,
    }


def hold_out(
    parts: Sequence[Documents], size: int | float, seed: int, seq_len: int
) -> tuple[list[Documents], list[Documents]]:
    """Returns the documents that stay, and those held out, chosen by the seed.

    Args:
        parts: documents of each source; all that have something to learn have the same
            chance.
        size: how many are held out, or, below 1, which share.
        seed: of the choice.
        seq_len: what documents are cut to, before there is something to learn or not.

    Raises:
        ValueError: if nothing would stay, of all or of a source, or nothing would be
            held out.
    """
    learnable = [part.learnable(seq_len) for part in parts]
    candidates = np.flatnonzero(np.concatenate(learnable))
    firsts = np.cumsum([0, *map(len, parts)])
    total = len(candidates)
    if not total:  # says how short a row would have to be
        parts[0].fitted(seq_len)
    count = round(size * total) if 0 < size < 1 else int(size)
    if not 0 < count < total:
        raise ValueError(
            f"eval_size={size} of {total} documents with something to learn is "
            f"{count}: give more rows, or another size."
        )
    # Another stream of the seed than the order's.
    chosen = np.random.default_rng((seed, 1)).permutation(total)[:count]
    held = np.zeros(int(firsts[-1]), bool)
    held[candidates[chosen]] = True
    masks = [held[a:b] for a, b in zip(firsts[:-1], firsts[1:], strict=True)]
    for number, (own, mask) in enumerate(zip(learnable, masks, strict=True), 1):
        if own.any() and not (own & ~mask).any():
            raise ValueError(
                f"eval_size={size} would hold out all that source {number} has to "
                "learn: give more rows, another size or seed, or eval_sources."
            )
    stay = [p.select(np.flatnonzero(~m)) for p, m in zip(parts, masks, strict=True)]
    out = [p.select(np.flatnonzero(m)) for p, m in zip(parts, masks, strict=True)]
    return stay, out
