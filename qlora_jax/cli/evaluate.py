"""`qlora-jax eval`: how good a model is."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from qlora_jax.cli.model import ModelOptions
from qlora_jax.cli.parsing import parse


@dataclasses.dataclass(frozen=True)
class Evaluate(ModelOptions):
    """Measures the perplexity of a text, and accuracy on MMLU.

    Attributes:
        text: a UTF-8 file whose perplexity is measured.
        window: tokens that the model sees at a time.
        stride: tokens from one window to the next; 0 for windows that do not overlap.
        windows: take only so many of them; 0 for all.
        bos: begin each window with the token that a text begins with.
        mmlu: a file of MMLU questions (.jsonl, .jsonl.gz).
        shots: a file of solved questions, five of which come before each.
        limit: take only so many questions of each subject; 0 for all.
        batch_size: windows computed at a time.
        out: write the numbers here as JSON too.
    """

    text: str | None = None
    window: int = 1024
    stride: int = 0
    windows: int = 0
    bos: bool = False
    mmlu: str | None = None
    shots: str | None = None
    limit: int = 0
    batch_size: int = 1
    out: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Evaluate, argv, "qlora-jax eval")
    from qlora_jax import evals

    if args.text is None and args.mmlu is None:
        raise ValueError("say what to measure: --text FILE, --mmlu FILE, or both.")
    # What is wrong with a file is said before the model is loaded.
    text = None if args.text is None else evals.read_text(args.text)
    questions = None
    if args.mmlu is not None:
        limit = args.limit or None
        questions = evals.read_questions(args.mmlu, shots=args.shots, limit=limit)
    model, tokenizer = args.load()
    numbers: dict[str, Any] = {"model": args.model, "adapter": args.adapter}
    if text is not None:
        if args.bos and tokenizer.bos_id is None:
            raise ValueError("--bos: the model's texts begin with no special token.")
        found = evals.perplexity(
            model,
            tokenizer.encode(text),
            window=args.window,
            stride=args.stride or None,
            limit=args.windows or None,
            bos_id=tokenizer.bos_id if args.bos else None,
            batch_size=args.batch_size,
        )
        numbers |= {"loss": found.loss, "perplexity": found.perplexity}
        numbers |= {"tokens": found.tokens, "windows": len(found.windows)}
        print(
            f"Perplexity {found.perplexity:.3f} (loss {found.loss:.4f} nats) over "
            f"{found.tokens:,} tokens in {len(found.windows)} windows"
        )
    if questions is not None:
        result = evals.mmlu(model, tokenizer, questions)
        numbers |= {"mmlu": result.accuracy, "mmlu_subjects_mean": result.mean}
        numbers |= {"questions": result.count, "subjects": dict(result.subjects)}
        for name, accuracy in result.subjects.items():
            print(f"  {name.replace('_', ' '):40} {accuracy:6.1%}")
        print(
            f"MMLU {result.mean:.1%}, the mean of {len(result.subjects)} subjects "
            f"({result.accuracy:.1%} of {result.count:,} questions)"
        )
    if args.out is not None:
        text = json.dumps(numbers, indent=2) + "\n"
        pathlib.Path(args.out).write_text(text, encoding="utf-8")
    return 0
