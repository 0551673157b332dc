"""Damages files and reads them: the reader's own error or none, and little memory.

    python -m tests.interop.fuzz              # 10,000 files for each reader
    python -m tests.interop.fuzz --count 500 --reader gguf --seed 7

The test suite does the same with a few. A reader is a function of a folder; its own
errors are ValueError (ModelFileError is one) and NotImplementedError with a text.
"""

import argparse
import copy
import json
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qlora_jax.interop.bitsandbytes_folder import open_folder
from qlora_jax.interop.gguf import GGUFSource
from qlora_jax.interop.gguf_out import save_gguf
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.inspect import inspect_file
from qlora_jax.interop.merged import MergedSource
from qlora_jax.interop.sentencepiece import build, read_model
from qlora_jax.interop.tokenizer import load_tokenizer
from qlora_jax.interop.weights import check_tensors
from tests.conftest import GOLDEN
from tests.interop.folders import LLAMA, byte_tokenizer, write_folder

SIZES = [
    0,
    1,
    2,
    7,
    8,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63,
    2**64 - 1,
]
JSON_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**40,
    1e300,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]
JSON_VALUES += [[[[]]], "\ud7ff", "../x", -(2**63), 0.5]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Returns the bytes with a few of them damaged, or cut, or repeated."""
    content = bytearray(data)
    head = min(len(content), rng.choice([16, 64, 512, 4096, len(content)]))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(head, 1))
        kind = rng.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            content[at : at + 8] = struct.pack("<Q", rng.choice(SIZES))
        elif kind == 2:
            content[at : at + 4] = struct.pack("<I", rng.choice(SIZES) % 2**32)
        elif kind == 3:
            del content[at : at + rng.choice([1, 8, 100, len(content)])]
        elif kind == 4:
            content[at:at] = content[at : at + rng.choice([1, 8, 100])]
        else:
            content[at : at + 1] = (
                bytes([content[at] ^ 1 << rng.randrange(8)])
                if (at < len(content))
                else b"\0"
            )
        if not content:
            break
    return bytes(content)


def mutated_end(data: bytes, rng: random.Random) -> bytes:
    """As `mutated`, of the last quarter: settings and rules of normalization."""
    at = len(data) * 3 // 4
    return data[:at] + mutated(data[at:], rng)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """Returns a JSON text with values exchanged, or its bytes damaged."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        holder, key = value, None
        while isinstance(holder, dict | list) and holder:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = rng.choice(list(keys)[:40])
            if not isinstance(holder[key], dict | list) or rng.random() < 0.4:
                break
            if not holder[key]:
                break
            holder = holder[key]
        if key is None or not isinstance(holder, dict | list) or not holder:
            continue
        if rng.random() < 0.2:
            del holder[key]
        elif isinstance(holder, dict) and rng.random() < 0.1:
            holder[rng.choice(["x", "", "\u2028"])] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(rng.choice(JSON_VALUES))
    return json.dumps(value).encode()


def with_header(change: Callable[[bytes, random.Random], bytes]):
    """Returns a mutation of a safetensors file; half the time its length stays true."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutated(data, rng)
        size = int.from_bytes(data[:8], "little")
        header = change(data[8 : 8 + size], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]

    return mutate


def read_source(source: Any) -> None:
    """Reads a few tensors of every kind."""
    check_tensors(source)
    for name in list(source.shapes())[::4]:
        source.nbytes(name)
        source.read(name)


def read_folder(folder: pathlib.Path) -> None:
    read_source(open_folder(folder))


def read_adapter(folder: pathlib.Path) -> None:
    base = open_folder(GOLDEN / "peft_lora" / "base")
    read_source(MergedSource(base, folder))


def read_pieces(folder: pathlib.Path) -> None:
    build(read_model(folder / "tokenizer.model")).encode("some text")


def read_tokenizer(folder: pathlib.Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("some text"))
    tokenizer.render([{"role": "user", "content": "Hi"}])


def read_gguf(folder: pathlib.Path) -> None:
    read_source(GGUFSource(folder / "m.gguf"))


def read_gguf_tokenizer(folder: pathlib.Path) -> None:
    load_tokenizer(folder / "m.gguf").encode("some text")


def inspect(folder: pathlib.Path) -> None:
    inspect_file(folder).table(limit=3)


# name: the folder it begins with, the file damaged, how, and the reader.
Case = tuple[str, str, Callable[[bytes, random.Random], bytes], Callable]
READERS: dict[str, Case] = {
    "safetensors": (
        "llama",
        "model.safetensors",
        with_header(mutated_json),
        read_folder,
    ),
    "config": ("llama", "config.json", mutated_json, read_folder),
    "bitsandbytes": (
        "nf4_double",
        "model.safetensors",
        with_header(mutated_json),
        read_folder,
    ),
    "int8": ("int8", "model.safetensors", with_header(mutated_json), read_folder),
    "index": ("sharded", "model.safetensors.index.json", mutated_json, read_folder),
    "gguf": ("gguf", "m.gguf", mutated, read_gguf),
    "gguf tokenizer": ("gguf", "m.gguf", mutated, read_gguf_tokenizer),
    "adapter": (
        "whole",
        "adapter_model.safetensors",
        with_header(mutated_json),
        read_adapter,
    ),
    "adapter config": ("whole", "adapter_config.json", mutated_json, read_adapter),
    "tokenizer.json": ("sharded", "tokenizer.json", mutated_json, read_tokenizer),
    "tokenizer_config": (
        "sharded",
        "tokenizer_config.json",
        mutated_json,
        read_tokenizer,
    ),
    "tokenizer.model": ("pieces", "tokenizer.model", mutated, read_pieces),
    "normalization": ("rules", "tokenizer.model", mutated_end, read_pieces),
    "inspect": ("llama", "model.safetensors", with_header(mutated_json), inspect),
}


def prepare(folder: pathlib.Path, kind: str) -> None:
    """Puts sound files of a kind into a new folder."""
    if kind in ("llama", "nf4_double", "int8"):
        shutil.copytree(GOLDEN / "families" / kind, folder)
    elif kind == "whole":
        shutil.copytree(GOLDEN / "peft_lora" / "saved_ensured", folder)
    elif kind == "sharded":
        write_folder(folder, LLAMA | {"num_hidden_layers": 1}, shards=2)
    elif kind == "gguf":
        write_folder(folder, LLAMA | {"num_hidden_layers": 1})
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        save_gguf(model, folder / "m.gguf", tokenizer=tokenizer)
    else:
        folder.mkdir()
        name = "normalized.model" if kind == "rules" else "llama.model"
        shutil.copy(GOLDEN / "sentencepiece" / name, folder / "tokenizer.model")


def attempt(case: Case, folder: pathlib.Path, data: bytes, seed: int) -> str | None:
    """Reads one damaged file; returns the reader's error, None if there was none."""
    _, file, mutate, read = case
    # A new file: the one before may still be mapped, and must not shrink under that.
    (folder / file).unlink()
    (folder / file).write_bytes(mutate(data, random.Random(seed)))
    try:
        read(folder)
    except (ValueError, NotImplementedError) as error:
        if not str(error):
            raise AssertionError(f"{type(error).__name__} without a word") from error
        return str(error)
    return None


def peak_memory() -> int:
    """Returns the most memory this process had."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    """Runs the readers and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append")
    arguments = parser.parse_args()
    byte_tokenizer()
    failed = 0
    print("| reader | files | refused | read | other errors | s | memory grew by MB |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.reader or READERS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary) / "m"
            prepare(folder, READERS[name][0])
            data = (folder / READERS[name][1]).read_bytes()
            READERS[name][3](folder)  # sound, and what is compiled is
            refused, others, first = 0, 0, ""
            before, start = peak_memory(), time.monotonic()
            for i in range(arguments.count):
                seed = arguments.seed + i
                try:
                    refused += attempt(READERS[name], folder, data, seed) is not None
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    others += 1
                    first = first or f"seed {seed}: {error!r}"
            seconds = time.monotonic() - start
        grown = (peak_memory() - before) / 1e6
        read = arguments.count - refused - others
        print(
            f"| {name} | {arguments.count} | {refused} | {read} | {others} | "
            f"{seconds:.0f} | {grown:.0f} |",
            flush=True,
        )
        if first:
            print(first[:600], file=sys.stderr)
        failed += others
    sys.exit(bool(failed))


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
