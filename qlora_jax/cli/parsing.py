"""From a command line and a YAML file to the dataclass of a subcommand."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import pathlib
import re
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

# What other trainers call it.
_ELSEWHERE = {
    "bits": "quantize",
    "dataset": "data",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate_scheduler": "schedule",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "max_seq_length": "seq_len",
    "max_steps": "steps",
    "model_name_or_path": "model",
    "neftune_noise_alpha": "neftune_alpha",
    "num_train_epochs": "epochs",
    "optim": "algorithm",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "r": "rank",
    "sample_packing": "packing",
    "save_steps": "save_every",
    "target_modules": "targets",
}


def parse[Options](
    options: type[Options],
    argv: Sequence[str],
    prog: str,
    *,
    values: Mapping[str, Any] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Options:
    """Returns the options that a command line gives.

    Args:
        options: a dataclass; its docstring has the help of every field.
        argv: flags, and positional arguments where the dataclass has some.
        prog: what the usage calls the program.
        values: of fields in groups, instead of the dataclass's defaults.
        groups: what the help calls some options -> their fields, each in one group;
            None for one list in the order of the dataclass.

    Raises:
        ValueError: if a flag is unknown (with the nearest one) or a value is wrong.
        SystemExit: after --help.
    """
    import tyro

    names = [field.name for field in dataclasses.fields(options)]  # pyright: ignore
    shape = options if groups is None else _grouped(options, groups, values or {})
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(shape, args=list(argv), prog=prog)
    except SystemExit as end:
        if not end.code:
            raise
        command = prog.split(" [")[0]
        words, meant = _plain(said.getvalue())
        unknown = re.match(r"Unrecognized options: --([\w-]+)", words)
        if unknown:
            near = nearest(unknown[1].replace("-", "_"), names)
            meant = meant if near is None else "--" + near.replace("_", "-")
            words += f" Perhaps you meant {meant}." if meant else ""
        raise ValueError(f"{words} See {command} --help.") from None
    if groups is None:
        return found
    parts = [vars(part) for part in vars(found).values()]
    return options(**{name: value for part in parts for name, value in part.items()})


def _grouped(
    options: type, groups: Mapping[str, Sequence[str]], values: Mapping[str, Any]
) -> Any:
    """Returns a dataclass with one for each group in it, as tyro takes it.

    They check nothing: values are complete only when all flags are read.
    """
    import tyro

    hints = typing.get_type_hints(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    defaults |= values
    described = [inspect.cleandoc(c.__doc__ or "") for c in options.__mro__[:-1]]
    after = [part for d in described for part in d.split("Attributes:\n")[1:]]
    attributes = "\n".join(part.split("\n\n")[0] for part in after)
    parts: list[tuple[str, type, Any]] = []
    for name, members in groups.items():
        part = dataclasses.make_dataclass(
            name,
            [(n, hints[n], dataclasses.field(default=defaults[n])) for n in members],
        )
        part.__doc__ = f"\n\nAttributes:\n{attributes}"
        parts.append((name, part, dataclasses.field(default_factory=part)))
    whole = dataclasses.make_dataclass(options.__name__, parts)
    whole.__doc__ = described[0].split("\n\nAttributes:")[0]
    return tyro.conf.OmitArgPrefixes[whole]


def _plain(box: str) -> tuple[str, str | None]:
    """Returns the words of tyro's framed message as one line, and a flag it names.

    A frame of lines, whose upper edge holds a title, or in ASCII a title and a rule;
    then paragraphs with rules between them.
    """
    framed = box.startswith("╭")
    lines = [line.strip("│") for line in box.splitlines() if line[:1] not in "╭╰"]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() and set(line.strip()) <= set("─-"):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    words = " ".join(" ".join(paragraphs[0 if framed else 1]).split())
    meant = re.findall(r"^ {4,}(--\w[\w-]*)", "\n".join(lines), re.MULTILINE)
    words = words if words.endswith((".", "?")) else f"{words}."
    return words, meant[0] if meant else None


def read_yaml(path: pathlib.Path, options: type) -> dict[str, Any]:
    """Reads the values that a YAML (or JSON) file gives to fields of a dataclass.

    Raises:
        ValueError: if the file cannot be read, a key is none of the fields (with the
            nearest one), or a value is not of the field's type.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {where}.") from None
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold `name: value` lines.")
    hints = typing.get_type_hints(options)
    names = [field.name for field in dataclasses.fields(options)]
    values = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = nearest(name, names)
            hint = "." if near is None else f"; did you mean {near!r}?"
            raise ValueError(f"{path}: there is no setting {key!r}{hint}")
        try:
            values[name] = _as_type(value, hints[name])
        except ValueError:
            raise ValueError(
                f"{path}: {key} is {value!r}, expected {_described(hints[name])}."
            ) from None
    return values


def nearest(name: str, names: Collection[str]) -> str | None:
    """Returns which of the names was meant, None if there is no telling."""
    if _ELSEWHERE.get(name) in names:
        return _ELSEWHERE[name]
    near = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    return near[0] if near else None


def _as_type(value: Any, hint: Any) -> Any:
    """Returns a value of YAML as a field has it; ValueError if it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            with contextlib.suppress(ValueError):
                return _as_type(value, option)
        raise ValueError
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        # One of them, or a list; a source is a path or a mapping with more about it.
        several = value if isinstance(value, list | tuple) else [value]
        return tuple(_as_type(v, args[0]) for v in several)
    elif hint is type(None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is str:
        if isinstance(value, Mapping):
            return json.dumps(value)
        if isinstance(value, str):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float and not isinstance(value, bool):
        # YAML takes 2e-4, which has no point, for text.
        if isinstance(value, int | float | str):
            return float(value)
    raise ValueError


def _described(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    names |= {str: "text", type(None): "nothing"}
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        return "a list of " + ("numbers" if int in typing.get_args(hint) else "texts")
    parts = typing.get_args(hint) or (hint,)
    return " or ".join(names.get(part, str(part)) for part in parts)


def by_pattern[Number: (int, float)](
    name: str, pairs: Sequence[str], kind: type[Number]
) -> dict[str, Number]:
    """Returns the numbers that settings as 'down_proj=16' give to patterns.

    Raises:
        ValueError: if there is no number behind the last "=", or it is not positive.
    """
    numbers = {}
    for pair in pairs:
        pattern, _, text = pair.rpartition("=")
        try:
            numbers[pattern] = kind(text)
        except ValueError:
            numbers[pattern] = kind(0)
        if not pattern or not numbers[pattern] > 0:
            raise ValueError(f"{name}: {pair!r} is not like 'down_proj=16'.")
    return numbers


def source_of(text: str) -> Any:
    """Returns a source of data: a path, or what a text that begins with { maps."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The source {text} is not JSON ({error}).") from None


def split_config(argv: Sequence[str]) -> tuple[pathlib.Path | None, list[str]]:
    """Takes the configuration file, which may come first, from a command line."""
    if argv and not argv[0].startswith("-"):
        return pathlib.Path(argv[0]), list(argv[1:])
    return None, list(argv)


def command_line(command: str, argv: Sequence[str]) -> str:
    """Returns what a user would type."""
    import shlex

    as_module = pathlib.Path(sys.argv[0]).parts[-2:] == ("cli", "__main__.py")
    start = "python -m qlora_jax.cli" if as_module else "qlora-jax"
    return f"{start} {command} {shlex.join(argv)}".strip()
