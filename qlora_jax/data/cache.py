"""Tokenized sources on disk: written once, mapped into memory ever after."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qlora_jax.data.conversations import Conversation, DataError
from qlora_jax.data.documents import Documents
from qlora_jax.data.encoding import Encoder, Example, Part, is_empty
from qlora_jax.data.sources import BadRows, Source

# Part of every key: changes with what is written, or with what encoding makes.
_VERSION = 1
# Conversations that are tokenized at a time.
_CHUNK = 2048
_ABANDONED_S = 24 * 3600
# Times that an entry may vanish under us before we say so.
_ATTEMPTS = 5
_ARRAYS = {
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "starts": np.int64,
    "stops": np.int64,
    "divisible": np.bool_,
    "truncated": np.bool_,
}


def default_cache_dir() -> pathlib.Path:
    """Returns $QLORA_JAX_CACHE/data, or ~/.cache/qlora_jax/data."""
    default = pathlib.Path.home() / ".cache" / "qlora_jax"
    return pathlib.Path(os.environ.get("QLORA_JAX_CACHE", default)) / "data"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenized source.

    Attributes:
        documents: its examples, in the order of the rows.
        sha256: hash of what was read.
        rows: how many were read.
        bad_rows: how many of them were no good and left out.
        first_bad_row: what was wrong with the first of these; "" if there is none.
        empty_answers: conversations that were left out since nothing is answered.
    """

    documents: Documents
    sha256: str
    rows: int
    bad_rows: int
    first_bad_row: str
    empty_answers: int


class TokenCache:
    """A folder with an entry for each source, tokenizer and options.

        KEY/meta.json           counts, sizes
        KEY/tokens.bin ...      the arrays of `Documents`, as they are in memory

    An entry appears whole or not at all. The key is a hash of the content of the files,
    the tokenizer with its template, and the options.

    Args:
        folder: where; None for `default_cache_dir()`.
        max_bytes: the entries that were not used for longest go when there is more.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int = 20 * 10**9,
    ):
        self.folder = pathlib.Path(folder) if folder else default_cache_dir()
        self.max_bytes = max_bytes

    def encoded(
        self, source: Source, encoder: Encoder, *, skip_bad_rows: int = 0
    ) -> Encoded:
        """Returns a source tokenized, from the folder if it is there.

        Raises:
            DataError: if the source cannot be read, or has too many bad rows.
        """
        sha256 = source.sha256()
        asked = (
            _VERSION, sha256, encoder.fingerprint, source.format,
            sorted(source.fields.items()), source.limit,
        )  # fmt: skip
        key = hashlib.sha256(repr(asked).encode()).hexdigest()[:32]
        entry = self.folder / key
        for _ in range(_ATTEMPTS):
            meta = _checked_meta(entry)
            if meta is None or meta["bad_rows"] > skip_bad_rows:
                bad = BadRows(skip_bad_rows)
                try:
                    self._write(entry, source, encoder, bad, sha256)
                except OSError as error:
                    raise DataError(
                        f"The cache {self.folder} cannot be written "
                        f"({error.strerror or error}); name another folder by "
                        "$QLORA_JAX_CACHE or cache_dir=."
                    ) from None
                continue
            try:
                os.utime(entry)  # used just now
                documents = _mapped(entry, meta)
            except FileNotFoundError:  # another process removed it meanwhile
                continue
            self._bound(keep=entry)
            told = ("rows", "bad_rows", "first_bad_row", "empty_answers")
            return Encoded(documents, sha256, **{name: meta[name] for name in told})
        raise DataError(
            f"The cache {self.folder} does not keep what is written into it: do other "
            "processes remove it? Name another folder by $QLORA_JAX_CACHE or "
            "cache_dir=."
        )

    def _write(
        self,
        entry: pathlib.Path,
        source: Source,
        encoder: Encoder,
        bad: BadRows,
        sha256: str,
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(dir=self.folder, prefix="partial-"))
        try:
            counts = Counts()
            with _Writer(partial) as writer:
                for examples in examples_of(source, encoder, bad, counts):
                    writer.add(examples)
            meta = {
                **dataclasses.asdict(counts),
                "bad_rows": bad.count,
                "first_bad_row": bad.first,
                "sha256": sha256,
                "path": str(source.path),
                "sizes": {n: (partial / f"{n}.bin").stat().st_size for n in _ARRAYS},
            }
            (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            if _checked_meta(entry) is not None:
                return  # another process was quicker
            # What is damaged goes aside, at once and whole, and then away.
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(entry.rename(partial.with_name(f"{partial.name}-old")))
            partial.rename(entry)
        except OSError:
            if _checked_meta(entry) is None:
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _bound(self, keep: pathlib.Path) -> None:
        """Removes entries until the rest fits; the one in use stays."""
        entries = []
        for partial in self.folder.glob("partial-*"):  # of processes that were killed
            with contextlib.suppress(OSError):  # another process is done with it
                if time.time() - partial.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(partial, ignore_errors=True)
        for meta in self.folder.glob("*/meta.json"):
            try:
                files = list(meta.parent.iterdir())
                size = sum(file.stat().st_size for file in files)
                entries.append((meta.parent.stat().st_mtime, size, meta.parent))
            except OSError:  # another process removes it
                continue
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self.max_bytes:
                return
            if entry != keep:
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


@dataclasses.dataclass
class Counts:
    """How many rows were read, and conversations left out with an empty answer."""

    rows: int = 0
    empty_answers: int = 0


def examples_of(
    source: Source, encoder: Encoder, bad: BadRows, counts: Counts, chunk: int = _CHUNK
) -> Iterator[list[Example]]:
    """Yields the examples of a source, `chunk` or somewhat more at a time.

    Raises:
        DataError: if the source cannot be read, is empty, or has too many bad rows.
    """
    # Tokenizers work outside Python's lock: the next rows are rendered meanwhile.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        encoding = None
        for parts in _parts_of(source, encoder, bad, counts, chunk):
            next_one = thread.submit(encoder.encode_parts, parts)
            if encoding is not None:
                yield encoding.result()
            encoding = next_one
        if encoding is not None:
            yield encoding.result()


def _parts_of(
    source: Source, encoder: Encoder, bad: BadRows, counts: Counts, chunk: int
) -> Iterator[list[tuple[list[Part], Conversation]]]:
    waiting: list[tuple[list[Part], Conversation]] = []
    for where, found in source.conversations():
        counts.rows += 1
        if isinstance(found, DataError):
            bad.add(found)
            continue
        for conversation in found:
            if is_empty(conversation, encoder.options.answers):
                counts.empty_answers += 1
                continue
            try:
                waiting.append((encoder.parts(conversation), conversation))
            except DataError as error:
                bad.add(DataError(f"{where}: {error}"))
        if len(waiting) >= chunk:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
    if not counts.rows:
        raise DataError(f"{source.path} holds no rows.")


class _Writer:
    """Appends examples to the files of an entry."""

    def __init__(self, folder: pathlib.Path):
        self._files = {name: open(folder / f"{name}.bin", "wb") for name in _ARRAYS}
        self._total = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, examples: list[Example]) -> None:
        documents = Documents.of(examples)
        shifted = {
            "starts": documents.starts + self._total,
            "stops": documents.stops + self._total,
        }
        for name, file in self._files.items():
            array = shifted.get(name, getattr(documents, name))
            file.write(np.ascontiguousarray(array, _ARRAYS[name]).tobytes())
        self._total += len(documents.tokens)


def _mapped(entry: pathlib.Path, meta: Mapping[str, Any]) -> Documents:
    arrays = {
        name: np.memmap(entry / f"{name}.bin", dtype, "r")
        if meta["sizes"][name]
        else np.zeros(0, dtype)
        for name, dtype in _ARRAYS.items()
    }
    small = {name: np.array(arrays[name]) for name in list(_ARRAYS)[2:]}
    return Documents(**{**arrays, **small}, name=entry.name)  # pyright: ignore


def _checked_meta(entry: pathlib.Path) -> Mapping[str, Any] | None:
    """Returns what an entry says of itself; None if it is absent or damaged."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        sizes = {name: (entry / f"{name}.bin").stat().st_size for name in _ARRAYS}
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("sizes") == sizes else None
