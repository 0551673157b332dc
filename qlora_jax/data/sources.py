"""Where rows come from: files in several forms, folders of them, data sets by name."""

import csv
import dataclasses
import glob
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

from qlora_jax.data.conversations import Conversation, DataError
from qlora_jax.data.encoding import is_empty
from qlora_jax.data.formats import detect_format, known_format, to_conversations

# A row with what an error calls it, or the error that stands in its place.
Found = tuple[str, Any]


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
        plain = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not _kind(text)
        return text if plain and not pathlib.Path(text).exists() else None

    def files(self) -> list[pathlib.Path]:
        """Returns the files, in order of their names.

        Raises:
            DataError: if there is none.
        """
        path = pathlib.Path(self.path).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p.name))
            visible = [
                p
                for p in found
                if not any(n.startswith(".") for n in p.relative_to(path).parts)
            ]
            if not visible:
                raise DataError(
                    f"The folder {path} holds no data file ({', '.join(_READERS)})."
                )
            return visible
        if path.is_file():
            if not _kind(path.name):
                raise DataError(
                    f"{path} is not one of {', '.join(_READERS)} (or .gz of them)."
                )
            return [path]
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [pathlib.Path(m) for m in matches if _kind(m)]
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
            yield from _hub_rows(self.hub_name, self.config, self.split)
            return
        for file in self.files():
            yield from _READERS[_kind(file.name)](file)

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


def _kind(name: str | os.PathLike[str]) -> str:
    """Returns the ending that says how a file is read; "" if none does."""
    suffix = pathlib.Path(str(name).removesuffix(".gz")).suffix
    return suffix if suffix in _READERS else ""


def _open(file: pathlib.Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")  # type: ignore


def _lines(file: pathlib.Path) -> Iterator[bytes]:
    r"""Yields lines that end at "\n" alone; files of bytes know no other separator."""
    try:
        with _open(file) as stream:
            first = True
            for line in stream:
                yield line.removeprefix(b"\xef\xbb\xbf") if first else line
                first = False
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}.") from None


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error}); save it as such.") from None


def _json_rows(file: pathlib.Path) -> Iterator[Found]:
    lines = _lines(file)
    head = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    if head and head[-1].lstrip()[:1] == b"[":
        text = _text(b"".join([*head, *lines]), str(file))
        for i, row in enumerate(_parsed(text, str(file)), 1):
            yield f"{file}, row {i}", row
        return
    for i, line in enumerate(itertools.chain(head, lines), 1):
        if line.strip():
            where = f"{file}, line {i}"
            try:
                row = _parsed(_text(line, where), where)
            except DataError as error:
                row = error
            yield where, row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON ({error}). Give a JSON array or one object a line."
        ) from None


def _table_rows(file: pathlib.Path) -> Iterator[Found]:
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB, shorter than some texts
    tabs = _kind(file.name) == ".tsv"
    lines = (_text(line, f"{file}, line {i}") for i, line in enumerate(_lines(file), 1))
    reader = csv.DictReader(lines, delimiter="\t" if tabs else ",", strict=True)
    try:
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if None in row or None in row.values():
                columns = ", ".join(reader.fieldnames or ())
                yield (
                    where,
                    DataError(f"{where} has not the columns of the header: {columns}."),
                )
            else:
                yield where, row
    except csv.Error as error:
        # Lines are counted when they have been read.
        place = f"{file}, line {reader.line_num + 1}"
        raise DataError(f"{place} is no table: {error}.") from None


def _text_rows(file: pathlib.Path) -> Iterator[Found]:
    yield f"{file}, line 1", {"text": _text(b"".join(_lines(file)), str(file))}


def _parquet_rows(file: pathlib.Path) -> Iterator[Found]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"Reading {file} needs pyarrow: pip install 'qlora-jax[data]'."
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet file: {error}") from None


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[Found]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"There is no file {name}; as a data set of Hugging Face it needs "
            "`datasets`: pip install 'qlora-jax[data]'."
        ) from None
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library lets through those of many others
        raise DataError(
            f"The data set {name} (config {config}, split {split}) cannot be had: "
            f"{type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(found, 1):
        yield f"{name}, row {number}", row


_READERS: dict[str, Callable[[pathlib.Path], Iterator[Found]]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".txt": _text_rows,
    ".parquet": _parquet_rows,
}
