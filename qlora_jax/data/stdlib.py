"""An instruction set that every machine has: the documentation of Python itself.

The question is about a function or class of the standard library, the answer is the
first paragraph of its docstring. Sources are parsed, never imported.
"""

import ast
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator

from qlora_jax.data.conversations import Conversation, exchange

_SKIPPED = {
    "__phello__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip
# Answers of about a sentence; in characters.
_SHORTEST, _LONGEST = 24, 120


def _first_paragraph(docstring: str) -> str:
    return " ".join(docstring.strip().split("\n\n")[0].split())


def _documented(source: str) -> Iterator[tuple[str, str, str]]:
    """Yields kind, name and first paragraph of the public names of a module."""
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if node.name.startswith("_") or not docstring:
            continue
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        yield kind, node.name, _first_paragraph(docstring)


def _modules(folder: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Yields the public modules below a folder, in order of their names."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        hidden = any(p.startswith("_") or p in _SKIPPED or "-" in p for p in parts)
        if parts and not hidden:
            yield ".".join(parts), path


def stdlib_conversations(
    *, held_out: int = 10
) -> tuple[list[Conversation], list[Conversation]]:
    """Returns questions on Python's standard library with their answers.

    Args:
        held_out: one top-level module in this many is held out, whole.

    Returns:
        The conversations to train on, and those of the held-out modules; which ones
        depends on the version of Python.
    """
    train: list[Conversation] = []
    test: list[Conversation] = []
    seen: set[str] = set()
    for module, path in _modules(pathlib.Path(sysconfig.get_paths()["stdlib"])):
        split = (
            test if zlib.crc32(module.split(".")[0].encode()) % held_out == 0 else train
        )
        for kind, name, answer in _documented(path.read_text(encoding="utf-8")):
            # The same sentence in both parts would let the model learn it by heart.
            if not _SHORTEST <= len(answer) <= _LONGEST or answer in seen:
                continue
            seen.add(answer)
            question = f"What is the {kind} `{module}.{name}` of Python for?"
            split.append(exchange(question, answer))
    return train, test
