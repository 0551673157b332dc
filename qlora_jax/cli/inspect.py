"""`qlora-jax inspect`: what a model's or adapter's files hold."""

import dataclasses
from collections.abc import Sequence

import tyro

from qlora_jax.cli.parsing import parse


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Lists the tensors of a model or adapter; only headers are read.

    Attributes:
        path: a .safetensors or .gguf file, a folder, or owner/name on the hub.
        limit: print only so many tensors; 0 for all.
        revision: branch, tag or commit of a model on the hub.
    """

    path: tyro.conf.Positional[str]
    limit: int = 0
    revision: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Inspect, argv, "qlora-jax inspect")
    from qlora_jax.interop.inspect import inspect_file

    print(inspect_file(args.path, args.revision).table(limit=args.limit or None))
    return 0
