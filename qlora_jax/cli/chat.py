"""`qlora-jax chat`: a conversation with a model."""

import dataclasses
import sys
from collections.abc import Sequence

from qlora_jax.cli.generate import Sampling
from qlora_jax.cli.model import ModelOptions
from qlora_jax.cli.parsing import parse

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it."


@dataclasses.dataclass(frozen=True)
class Chat(ModelOptions, Sampling):
    """Talks with a model; a line is a turn.

    Attributes:
        system: what the chat template takes as the system's turn.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_p: draw from the most likely tokens whose probabilities reach this.
    """

    system: str | None = None
    temperature: float = 0.7
    top_p: float = 0.9


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Chat, argv, "qlora-jax chat")
    model, tokenizer = args.load()
    first = [{"role": "system", "content": args.system}] if args.system else []
    turns = list(first)
    to_person = sys.stdin.isatty()
    if to_person:
        print(_HELP)
    count = 0
    while True:
        try:
            line = input("> " if to_person else "").strip()
        except EOFError:
            return 0
        match line:
            case "":
                continue
            case "/exit":
                return 0
            case "/reset":
                turns = list(first)
                continue
        turns.append({"role": "user", "content": line})
        ids = tokenizer.encode_chat(turns, answer_next=True)
        answer = ""
        for piece in args.pieces(model, tokenizer, ids, count):
            print(piece, end="", flush=True)
            answer += piece
        print(flush=True)
        turns.append({"role": "assistant", "content": answer})
        count += 1
