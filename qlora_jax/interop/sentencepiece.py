"""SentencePiece models (`tokenizer.model`) as tokenizers of the `tokenizers` library.

The file is a protocol buffer, of which four fields matter; they are read here, every
length checked, so that neither `sentencepiece` nor `protobuf` is needed. Layout:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qlora_jax.interop.weights import ModelFileError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"  # stands for a space inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Where a space is put in front: of every stretch of text between control tokens, as
# Llama 1 and 2 were released; of the first alone; or nowhere.
Prefix = Literal["always", "first", "never"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece: its text, its score (the larger, the earlier it is merged), its kind."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """What a model file says.

    Attributes:
        pieces: by id.
        prefix: where a space is put in front of a text.
        squeezes: several spaces count as one, and those at the ends not at all.
        charsmap: rules of normalization, compiled; b"" for none.
        unknown_id: of the piece for what cannot be spelled.
        bos_id: of the first token of a text, -1 for none.
        eos_id: of the last token of a text, -1 for none.
    """

    pieces: Sequence[Piece]
    prefix: Prefix = "always"
    squeezes: bool = False
    charsmap: bytes = b""
    unknown_id: int = 0
    bos_id: int = 1
    eos_id: int = 2


def read_model(path: str | os.PathLike[str]) -> SentencePieceModel:
    """Reads a model file.

    Raises:
        ModelFileError: if it is missing, truncated or no such file.
        NotImplementedError: if it is no BPE, as those of Llama, Mistral and Gemma are.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return _parsed(data)
    except _Malformed as error:
        raise ModelFileError(f"{path} is no SentencePiece model: {error}.") from None


def build(model: SentencePieceModel) -> "tokenizers.Tokenizer":
    """Returns the tokenizer of a model.

    Its ids are those of SentencePiece; a control token in a text becomes one only where
    the caller asks for it.

    Raises:
        ValueError: if the pieces do not make a vocabulary.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

    texts = [piece.text for piece in model.pieces]
    if len(set(texts)) != len(texts) or not 0 <= model.unknown_id < len(texts):
        raise ValueError("pieces occur twice, or the unknown piece is none of them")
    fallback = any(piece.kind == BYTE for piece in model.pieces)
    unknown = texts[model.unknown_id]
    try:
        kind = models.BPE(
            {text: i for i, text in enumerate(texts)},
            merges_of(model.pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=fallback,
        )
        steps: list[Any] = []
        if model.charsmap:
            steps.append(normalizers.Precompiled(model.charsmap))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the pieces make no tokenizer: {error}") from None
    if model.squeezes:
        steps += [normalizers.Strip()]
        steps += [normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    backend = tokenizers.Tokenizer(kind)
    if model.prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE, prepend_scheme="first", split=False
        )
    else:
        if model.prefix == "always":
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback()]
    decoding.append(decoders.Fuse())
    if model.prefix != "never":
        # The space in front; where extra ones do not count, any number of them.
        decoding.append(decoders.Strip(" ", 1 << 16 if model.squeezes else 1, 0))
    backend.decoder = decoders.Sequence(decoding)
    for piece in model.pieces:
        is_control = piece.kind in (CONTROL, UNKNOWN)
        token = AddedToken(piece.text, special=is_control, normalized=False)
        if is_control:
            backend.add_special_tokens([token])
        elif piece.kind == USER_DEFINED:
            backend.add_tokens([token])
    return backend


def merges_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Returns the pairs that make up pieces, the best score first.

    SentencePiece merges the neighbours whose union scores best; every split of a piece
    into two pieces is therefore a merge, ranked by the score of the union. Control
    tokens are made by no merge, so that no text becomes one.
    """
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        if piece.kind not in (NORMAL, UNUSED) or len(piece.text) < 2:
            continue
        splits = [
            (piece.text[:at], piece.text[at:])
            for at in range(1, len(piece.text))
            if piece.text[:at] in ids and piece.text[at:] in ids
        ]
        splits.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(-piece.score, pair) for pair in splits]
    merges.sort(key=lambda merge: merge[0])  # stable
    return [pair for _, pair in merges]


class _Malformed(ValueError):
    """What is wrong with the bytes."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Malformed("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _Malformed(f"a number before byte {at} is longer than ten bytes")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field of a message: int, 4 or 8 bytes, bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire in (1, 5):
            length = 8 if wire == 1 else 4
        elif wire == 2:
            length, at = _varint(data, at)
        else:
            raise _Malformed(f"wire type {wire} before byte {at}")
        if length > len(data) - at:
            raise _Malformed(f"a field of {length} bytes at {at} leaves its message")
        yield number, data[at : at + length]
        at += length


def _numbers(data: bytes) -> dict[int, int]:
    """The fields of a message that are numbers; negative ones are ten bytes long."""
    found = {n: value for n, value in _fields(data) if isinstance(value, int)}
    return {n: v - (1 << 64) if v >> 63 else v for n, v in found.items()}


def _bytes(value: Any, what: str) -> bytes:
    if not isinstance(value, bytes):
        raise _Malformed(f"{what} is a number")
    return value


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            try:
                text = _bytes(value, "a piece").decode("utf-8")
            except UnicodeDecodeError:
                raise _Malformed("a piece is not UTF-8") from None
        elif number == 2:
            if not isinstance(value, bytes) or len(value) != 4:
                raise _Malformed("the score of a piece is no float")
            (score,) = struct.unpack("<f", value)
        elif number == 3:
            kind = value if isinstance(value, int) else 0
    if not text or not math.isfinite(score) or not NORMAL <= kind <= BYTE:
        raise _Malformed(f"piece {text!r} with score {score} of kind {kind}")
    return Piece(text, score, kind)


def _checked_charsmap(data: bytes) -> bytes:
    """Returns rules of normalization that lead nowhere outside of themselves.

    They are the bytes of a table, the table (a trie as a double array of 32-bit units:
    https://github.com/s-yata/darts-clone) and the texts that its leaves point into. The
    library that walks it does not look where it goes.
    """
    if not data:
        return data
    size = int.from_bytes(data[:4], "little")
    if size % 4 or not 4 <= size <= len(data) - 4:
        raise _Malformed(f"precompiled_charsmap has a table of {size} bytes")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(data, np.uint8, offset=4 + size)
    try:
        texts.tobytes().decode("utf-8")
    except UnicodeDecodeError:
        raise _Malformed("the texts of precompiled_charsmap are not UTF-8") from None
    inner = units >> 31 == 0
    inner[0] = True  # the root is walked from whatever it says
    base = np.arange(len(units)) ^ (units >> 10 << ((units & 512) >> 6))
    if (inner & ((base | 255) >= len(units))).any():
        raise _Malformed("the table of precompiled_charsmap leads out of itself")
    ends = units[base[inner & (units >> 8 & 1).astype(bool)]] & 0x7FFFFFFF
    inside = ends < len(texts)
    starts = (texts[ends[inside]] & 0xC0) != 0x80  # of a character
    if not inside.all() or not starts.all():
        raise _Malformed("precompiled_charsmap points at no text")
    return data


def _parsed(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer = normalizer = b""
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value, "a piece")))
        elif number == 2:
            trainer = _bytes(value, "trainer_spec")
        elif number == 3:
            normalizer = _bytes(value, "normalizer_spec")
    if not pieces:
        raise _Malformed("it holds no piece")
    spec = _numbers(trainer)
    if (kind := spec.get(3, 1)) != 2:
        raise NotImplementedError(
            f"SentencePiece model of type {kind}; supported is BPE (2)."
        )
    switches = _numbers(normalizer)
    charsmap = next((value for n, value in _fields(normalizer) if n == 2), b"")
    kinds = [piece.kind for piece in pieces]
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else -1
    if unknown < 0:
        raise _Malformed("it has no unknown piece")
    ids = [spec.get(field, default) for field, default in ((41, 1), (42, 2))]
    if any(i >= len(pieces) for i in ids):
        raise _Malformed(f"first or last token is none of {len(pieces)} pieces")
    return SentencePieceModel(
        pieces,
        prefix="always" if switches.get(3, 1) else "never",
        squeezes=bool(switches.get(4, 1)),
        charsmap=_checked_charsmap(_bytes(charsmap, "precompiled_charsmap")),
        unknown_id=unknown,
        bos_id=ids[0],
        eos_id=ids[1],
    )
