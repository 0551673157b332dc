"""What is wrong with a safetensors file that its library refuses, by tensor.

A file is 8 bytes, the length n of the header; n bytes of JSON, which has type, shape
and `data_offsets` of each tensor; and the numbers, without a gap.
"""

import json
import math
import os
import pathlib
from typing import Any

# The most that the library allows.
_MAX_HEADER = 100_000_000
# Bits of a number, by the format's name of its type.
BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64} | {
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "U8": 8,
    "I8": 8,
    "BOOL": 8,
    "F4": 4,
}


def fault_of(path: str | os.PathLike[str]) -> str | None:
    """Returns what is wrong with a file, in words, or None if nothing is found."""
    path = pathlib.Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 + length:
            return f"its header should take {8 + length} bytes, the file has {size}"
        if length > _MAX_HEADER:
            return f"its header should take {length} bytes"
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return "its header is not JSON"
    if not isinstance(header, dict):
        return "its header is no JSON object"
    spans = []
    for name, described in header.items():
        if name == "__metadata__":
            continue
        span = _span(described)
        if isinstance(span, str):
            return f"tensor {_short(name)} {span}"
        spans.append((*span, name))
    return _gap(sorted(spans), size - 8 - length)


def _span(described: Any) -> tuple[int, int] | str:
    """Where a tensor begins and ends, or what is wrong with its description."""
    keys = ("dtype", "shape", "data_offsets")
    if not isinstance(described, dict) or not all(key in described for key in keys):
        return "lacks one of dtype, shape and data_offsets"
    kind, shape, offsets = (described[key] for key in keys)
    if not _are_sizes(shape):
        return f"has the shape {_short(shape)}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the data_offsets {_short(offsets)}"
    begin, end = offsets
    if not isinstance(kind, str) or kind not in BITS:
        return f"is of type {_short(kind)}"
    bits = math.prod(shape) * BITS[kind]
    if bits != 8 * (end - begin):
        takes = f"{bits // 8} bytes" if bits < 2**66 else "more than any file can hold"
        return (
            f"is {_short(shape)} of {kind}, which takes {takes}, and has {end - begin}"
        )
    return begin, end


def _gap(spans: list[tuple[int, int, str]], nbytes: int) -> str | None:
    """Where tensors, in the order of their bytes, leave the file or do not join."""
    last = 0
    for begin, end, name in spans:
        if begin != last:
            return (
                f"tensor {_short(name)} begins at byte {begin} of the numbers, the one "
                f"before it ends at {last}"
            )
        if end > nbytes:
            return (
                f"tensor {_short(name)} ends at byte {end} of the numbers, the file at "
                f"{nbytes}: it is truncated"
            )
        last = end
    if last != nbytes:
        return f"{nbytes - last} bytes after the last tensor belong to none"
    return None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _short(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = "[...]"
    return text if len(text) <= 200 else f"{text[:200]}..."
