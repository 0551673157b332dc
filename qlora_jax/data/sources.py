"""Where rows come from: files in several forms, folders of them, data sets by name."""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.data.conversations import Conversation, DataError
from qlora_jax.data.encoding import is_empty
from qlora_jax.data.formats import detect_format, known_format, to_conversations
from qlora_jax.data.readers import READERS, Found, hub_rows, kind_of


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows to train on.

    Attributes:
        path: a file (.json, .jsonl, .csv, .tsv, .txt, each also .gz, or .parquet), a
            folder or glob of them, or a data set of Hugging Face as "hf:owner/name".
        format: a name in `FORMATS`, or "auto" to find it by the fields of each file's
            first row.
        weight: its share of the rows that are drawn, beside the weights of the other
            sources. None, for all of them: every row once a pass.
        split: of a data set by name.
        config: of a data set by name that has several.
        fields: the format's name of a field -> the name it has in the rows.
        limit: how many rows are taken, from the first on.

    Raises:
        ValueError: if the format is unknown, or a number is not positive.
    """

    path: str | os.PathLike[str]
    format: str = "auto"
    weight: float | None = None
    split: str = "train"
    config: str | None = None
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self):
        known_format(self.format)
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"{self.path}: weight={self.weight} must be positive.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"{self.path}: limit={self.limit} must be at least 1.")

    @property
    def hub_name(self) -> str | None:
        """The name of a data set of Hugging Face; None for files."""
        text = str(self.path)
        if text.startswith("hf:"):
            return text[3:]
        # A name of the hub, unless there is such a file.
        plain = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not kind_of(text)
        return text if plain and not pathlib.Path(text).exists() else None

    def files(self) -> list[pathlib.Path]:
        """Returns the files, in order of their names.

        Raises:
            DataError: if there is none.
        """
        path = pathlib.Path(self.path).expanduser()
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.is_file() and kind_of(p.name)
            )
            visible = [
                p
                for p in found
                if not any(n.startswith(".") for n in p.relative_to(path).parts)
            ]
            if not visible:
                raise DataError(
                    f"The folder {path} holds no data file ({', '.join(READERS)})."
                )
            return visible
        if path.is_file():
            if not kind_of(path.name):
                raise DataError(
                    f"{path} is not one of {', '.join(READERS)} (or .gz of them)."
                )
            return [path]
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [pathlib.Path(m) for m in matches if kind_of(m)]
        if not files:
            raise DataError(f"There is no data file {path}.")
        return files

    def sha256(self) -> str:
        """Returns the hash of all that is read.

        Raises:
            DataError: if there is nothing to read.
        """
        digest = hashlib.sha256()
        if self.hub_name is not None:
            # The rows themselves: the same ones may lie in files of other bytes.
            for _, row in self.rows():
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            return digest.hexdigest()
        for file in self.files():
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def rows(self) -> Iterator[Found]:
        """Yields each row with its place; in the place of one that is none, the error.

        Raises:
            DataError: if a file cannot be read at all.
            ImportError: if a package that reads it is not installed.
        """
        return itertools.islice(self._all_rows(), self.limit)

    def _all_rows(self) -> Iterator[Found]:
        if self.hub_name is not None:
            yield from hub_rows(self.hub_name, self.config, self.split)
            return
        for file in self.files():
            yield from READERS[kind_of(file.name)](file)

    def conversations(self) -> Iterator[tuple[str, list[Conversation] | DataError]]:
        """Yields what each row stands for, or what is wrong with it.

        Raises:
            DataError: if a file cannot be read.
        """
        formats: dict[str, str] = {}
        for where, row in self.rows():
            if isinstance(row, DataError):
                yield where, row
                continue
            if self.fields and isinstance(row, Mapping):
                row = {**row, **{n: row[f] for n, f in self.fields.items() if f in row}}
            file = where.rsplit(", ", 1)[0]
            try:
                if file not in formats:
                    auto = self.format == "auto"
                    found = detect_format(row, where=where) if auto else self.format
                    formats[file] = found
                yield where, to_conversations(row, formats[file], where=where)
            except DataError as error:
                yield where, error


def as_sources(value: Any, format: str = "auto") -> list[Source]:
    """Returns the sources that a path, a mapping, or a list of such stands for.

    Args:
        value: paths, mappings of `Source`'s arguments (as from YAML), or sources.
        format: of those that name none.

    Raises:
        ValueError: if it is something else, or some have weights and some have none.
    """
    several = isinstance(value, Sequence) and not isinstance(value, str)
    sources = [_as_source(v, format) for v in (value if several else [value])]
    if not sources:
        raise ValueError("There is no source of data.")
    weighted = [s for s in sources if s.weight is not None]
    if weighted and len(weighted) < len(sources):
        without = next(s for s in sources if s.weight is None)
        raise ValueError(
            f"{without.path} has no weight, {weighted[0].path} has one: give one to "
            "every source, or to none."
        )
    return sources


def _as_source(value: Any, format: str) -> Source:
    if isinstance(value, Mapping):
        names = {field.name for field in dataclasses.fields(Source)}
        if "path" not in value or not value.keys() <= names:
            raise ValueError(
                f"A source has path and optionally {', '.join(sorted(names))}; this "
                f"one has {', '.join(map(str, value))}."
            )
        value = Source(**value)
    elif isinstance(value, str | os.PathLike):
        value = Source(value)
    elif not isinstance(value, Source):
        raise ValueError(f"{value!r} is no path, mapping or Source.")
    return dataclasses.replace(
        value, format=format if value.format == "auto" else value.format
    )


class BadRows:
    """Counts rows that are no good, and refuses one too many.

    Args:
        limit: how many are left out.

    Attributes:
        count: how many were.
        first: what was wrong with the first of them, "" if there is none.
    """

    def __init__(self, limit: int = 0):
        if limit < 0:
            raise ValueError(f"skip_bad_rows={limit} must not be negative.")
        self.limit, self.count, self.first = limit, 0, ""

    def add(self, error: DataError) -> None:
        """Leaves a row out.

        Raises:
            DataError: the row's, if `limit` were left out before.
        """
        self.count += 1
        self.first = self.first or str(error)
        if self.count > self.limit:
            before = f" (after {self.limit} bad rows that were left out)"
            raise DataError(f"{error}{before if self.limit else ''}")


def read_conversations(
    source: str | os.PathLike[str] | Source,
    format: str = "auto",
    *,
    skip_bad_rows: int = 0,
) -> list[Conversation]:
    r"""Reads all conversations of a source, those with an empty answer left out.

    Lines end at "\n" alone: texts may hold other separators, as U+2028.

    Args:
        source: what `Source` takes as path, or one.
        format: a name in `FORMATS`, or "auto".
        skip_bad_rows: how many rows that are not what they should be are left out.

    Raises:
        DataError: if a file is missing or holds no answers, or a row is bad.
    """
    (source,) = as_sources(source, format)
    bad, kept = BadRows(skip_bad_rows), []
    for _, found in source.conversations():
        if isinstance(found, DataError):
            bad.add(found)
        else:
            kept += [c for c in found if not is_empty(c, "last")]
    if not kept:
        raise DataError(f"{source.path} holds no rows with an answer.")
    return kept
