"""`qlora-jax data`: rows as the model sees them, and the formats of rows."""

import dataclasses
from collections.abc import Sequence

import tyro

from qlora_jax.cli.model import load_tokenizer
from qlora_jax.cli.parsing import parse, source_of
from qlora_jax.cli.rows import Rows

_USAGE = "give `show FILE --model M` or `formats`"


@dataclasses.dataclass(frozen=True)
class Show(Rows):
    """Prints rows as the model sees them; what is not learned is dim, or in brackets.

    Attributes:
        data: files, folders or hf:owner/name.
        model: whose tokenizer and chat template are taken.
        count: rows of the model's input to print.
        seq_len: tokens of a row.
        revision: branch, tag or commit of a model on the hub.
    """

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    model: str = "SmolLM2-135M-Instruct"
    count: int = 3
    seq_len: int = 512
    revision: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    command, *rest = argv or [""]
    if command in ("-h", "--help"):
        print("usage: qlora-jax data show FILE... [OPTIONS]")
        print("       qlora-jax data formats")
        return 0
    match command:
        case "show":
            _show(parse(Show, rest, "qlora-jax data show"))
        case "formats":
            if rest:
                raise ValueError(f"data formats takes no {rest[0]!r}: {_USAGE}.")
            _formats()
        case _:
            raise ValueError(f"there is no command 'data {command}': {_USAGE}.")
    return 0


def _show(args: Show) -> None:
    from qlora_jax.data import preview

    if not args.data:
        raise ValueError("say what to show: qlora-jax data show FILE --model M.")
    tokenizer = load_tokenizer(args.model, args.revision, None)
    preview(
        [source_of(text) for text in args.data],
        tokenizer,
        count=args.count,
        seq_len=args.seq_len,
        **args.of_rows(),
    )


def _formats() -> None:
    from qlora_jax.data import FORMATS

    width = max(map(len, FORMATS))
    for name, row_format in FORMATS.items():
        print(f"{name:{width}}  {row_format.summary}")
