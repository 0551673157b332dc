"""Rows as the model sees them, printed: what is learned, and what is only read."""

import sys
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from qlora_jax.data.batching import Rows
from qlora_jax.data.cache import Counts, examples_of
from qlora_jax.data.chat_tokenizer import ChatTokenizer
from qlora_jax.data.encoding import Encoder, EncodingOptions, Example
from qlora_jax.data.sources import BadRows, as_sources


class Span(NamedTuple):
    """Text of neighbouring tokens that are all learned, or all only read."""

    text: str
    learned: bool


def spans(example: Example, tokenizer: ChatTokenizer) -> list[Span]:
    """Returns an example as text, in spans that are learned and spans that are not.

    The first token of a document is never learned: nothing stands before it.
    """
    learned = example.loss_mask != 0
    learned[:1] = False
    cuts = np.flatnonzero(np.diff(learned)) + 1
    pieces = np.split(example.tokens, cuts)
    flags = [bool(piece[0]) for piece in np.split(learned, cuts)]
    return [
        Span(tokenizer.decode(piece.tolist(), special=True), flag)
        for piece, flag in zip(pieces, flags, strict=True)
    ]


def preview(
    sources: Any,
    tokenizer: ChatTokenizer,
    *,
    count: int = 3,
    file: IO[str] | None = None,
    seq_len: int = 512,
    packing: bool = False,
    format: str = "auto",
    skip_bad_rows: int = 0,
    **options: Any,
) -> str:
    """Prints the first rows as the model sees them, and returns the text.

    What is only read is dim on a terminal (with rich), and in [brackets] elsewhere.

    Args:
        sources: as `prepare` takes them; so many of the first rows are read as `count`
            rows of the model need.
        tokenizer: of the model.
        count: rows of the model's input.
        file: where it is printed; None for standard output.
        seq_len: tokens of a row.
        packing: several documents to a row.
        format: of sources that name none.
        skip_bad_rows: how many rows that are not what they should be are left out.
        **options: of `EncodingOptions`.

    Raises:
        DataError: if a file is missing, or too many rows are bad.
        ValueError: if an option is out of its range.
    """
    encoder, bad = (
        Encoder(tokenizer, EncodingOptions(**options)),
        BadRows(skip_bad_rows),
    )
    counts, examples = Counts(), []
    # Rows that are packed are filled from more documents than they hold.
    enough = 8 * count * seq_len if packing else 0
    for source in as_sources(sources, format):
        for some in examples_of(source, encoder, bad, counts, chunk=16):
            examples += some
            if len(examples) >= 2 * count and sum(map(len, examples)) >= enough:
                break
    rows = Rows(examples, seq_len, packing=packing)
    parts: list[Span | str] = []
    for row in range(min(count, len(rows))):
        documents = [rows.documents[i] for i in rows.documents_of(row)]
        parts += _shown(row, documents, rows, tokenizer)
    if bad.count:
        parts.append(f"--- {bad.count} bad rows left out, the first: {bad.first}\n")
    left_out = counts.empty_answers + rows.documents.left_out
    if left_out:
        parts.append(
            f"--- {left_out} left out: an empty answer, or none within seq_len\n"
        )
    plain = "".join(
        p if isinstance(p, str) else p.text if p.learned else f"[{p.text}]"
        for p in parts
    )
    if not _print_rich(parts, file or sys.stdout):
        print(plain, end="", file=file)
    return plain


def _shown(
    row: int, documents: list[Example], rows: Rows, tokenizer: ChatTokenizer
) -> Iterator[Span | str]:
    used = int(rows.lengths[row])
    learned = sum(int(np.count_nonzero(d.loss_mask[1:])) for d in documents)
    several = f", {len(documents)} documents" if rows.packing else ""
    cut = ", cut off" if any(d.truncated for d in documents) else ""
    yield f"--- row {row + 1}: {used} of {rows.seq_len} tokens, {learned} learned"
    yield f"{several}{cut}\n"
    for i, document in enumerate(documents):
        if i:
            yield f"--- document {i + 1}\n"
        yield from spans(document, tokenizer)
        yield "\n"


def _print_rich(parts: list[Span | str], file: IO[str]) -> bool:
    """Prints with what is not learned dim; False if the file is no terminal."""
    if not file.isatty():
        return False
    try:
        import rich.console
        import rich.text
    except ImportError:
        return False
    shown = rich.text.Text()
    for part in parts:
        if isinstance(part, str):
            shown.append(part, "cyan" if part.strip() else "")
        else:
            shown.append(part.text, "" if part.learned else "dim")
    rich.console.Console(file=file, highlight=False).print(shown, end="")
    return True
