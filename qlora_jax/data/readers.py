"""Rows of files, each form with its reader, and of data sets by name."""

import csv
import gzip
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from qlora_jax.data.conversations import DataError

# A row with what an error calls it, or the error that stands in its place.
Found = tuple[str, Any]


def kind_of(name: str | os.PathLike[str]) -> str:
    """Returns the ending that says how a file is read; "" if none does."""
    suffix = pathlib.Path(str(name).removesuffix(".gz")).suffix
    return suffix if suffix in READERS else ""


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
    tabs = kind_of(file.name) == ".tsv"
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


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Found]:
    """Yields the rows of a data set of Hugging Face.

    Raises:
        DataError: if it cannot be had.
        ImportError: without `datasets`.
    """
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


# What a name ends with (and .gz after it) -> what reads it.
READERS: dict[str, Callable[[pathlib.Path], Iterator[Found]]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".txt": _text_rows,
    ".parquet": _parquet_rows,
}
