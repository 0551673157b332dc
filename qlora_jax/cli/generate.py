"""`qlora-jax generate`: answers to prompts."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_jax.cli.model import ModelOptions
from qlora_jax.cli.parsing import parse


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: of an answer, at most.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_p: draw from the most likely tokens whose probabilities reach this.
        seed: of what is drawn.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def answers(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        turn: int = 0,
    ) -> list[str]:
        """Returns the text after each prompt; `turn` makes another draw."""
        import qlora_jax as ql

        new = ql.generate(model, prompts, **self._options(model, tokenizer, turn))
        return [tokenizer.decode(ids).strip("\n") for ids in new]

    def pieces(
        self, model: Any, tokenizer: Any, prompt: Sequence[int], turn: int = 0
    ) -> Iterator[str]:
        """Yields the text after a prompt as it comes."""
        import qlora_jax as ql

        ids, said, text = [], "", ""
        options = self._options(model, tokenizer, turn)
        for token in ql.stream(model, prompt, **options):
            ids.append(token)
            text = tokenizer.decode(ids)
            # The bytes of a character may come in several tokens.
            if not text.endswith("\ufffd"):
                yield text[len(said) :]
                said = text
        yield text[len(said) :]

    def _options(self, model: Any, tokenizer: Any, turn: int) -> dict[str, Any]:
        import jax

        return {
            "max_new_tokens": self.max_new_tokens,
            "eos_ids": sorted({*model.config.eos_token_id, tokenizer.eos_id}),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "key": jax.random.fold_in(jax.random.key(self.seed), turn),
        }


@dataclasses.dataclass(frozen=True)
class Generate(ModelOptions, Sampling):
    """Answers a prompt, or the prompts of a file.

    Attributes:
        prompt: a question; - reads it from standard input.
        file: instead, prompts: a text each line, or .jsonl with a field prompt.
        raw: continue the text as it is, without the chat template.
        system: what the chat template takes as the system's turn.
        batch_size: prompts answered at a time.
        out: write JSON lines of prompt and answer here; None prints them.
    """

    prompt: str | None = None
    file: str | None = None
    raw: bool = False
    system: str | None = None
    batch_size: int = 8
    out: str | None = None


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = parse(Generate, argv, "qlora-jax generate")
    if (args.prompt is None) == (args.file is None):
        raise ValueError("give one of --prompt TEXT and --file FILE.")
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be at least 1.")
    texts = _prompts(args)
    model, tokenizer = args.load()
    rows = []
    for first in range(0, len(texts), args.batch_size):
        part = texts[first : first + args.batch_size]
        ids = [_encoded(text, tokenizer, args) for text in part]
        answers = args.answers(model, tokenizer, ids, first)
        for text, answer in zip(part, answers, strict=True):
            rows.append({"prompt": text, "answer": answer})
            if args.out is None:
                print(answer if args.file is None else json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        pathlib.Path(args.out).write_text(lines, encoding="utf-8")
        print(f"Written: {args.out} ({len(rows)} answers)")
    return 0


def _prompts(args: Generate) -> list[str]:
    if args.prompt is not None:
        return [sys.stdin.read() if args.prompt == "-" else args.prompt]
    from qlora_jax.evals import read_text

    path = str(args.file)
    # Other separators of lines, as U+2028, belong to the text.
    lines = enumerate(read_text(path).split("\n"), 1)
    prompts = [(i, line) for i, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts.")
    if path.endswith(".jsonl"):
        return [_field(line, f"{path}, line {i}") for i, line in prompts]
    return [line for _, line in prompts]


def _field(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        if not isinstance(prompt, str):
            raise TypeError(f"{prompt!r} is no text")
        return prompt
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} has no text in a field prompt ({error}).") from None


def _encoded(text: str, tokenizer: Any, args: Generate) -> list[int]:
    if args.raw:
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return start + tokenizer.encode(text)
    turns = [{"role": "system", "content": args.system}] if args.system else []
    turns.append({"role": "user", "content": text})
    return tokenizer.encode_chat(turns, answer_next=True)
