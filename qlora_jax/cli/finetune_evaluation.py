"""What a run of `qlora-jax finetune` tells of a model on rows that it held out."""

import math
from typing import Any

from qlora_jax.cli.finetune_options import Finetune


class Evaluation:
    """From a model to what is known about it on rows that it did not learn.

    Args:
        args: which of it is wanted.
        prepared: the data.
        tokenizer: of the model.
    """

    def __init__(self, args: Finetune, prepared: Any, tokenizer: Any):
        self._args, self._prepared, self._tokenizer = args, prepared, tokenizer
        self._questions: Any = None
        if args.mmlu is not None:
            from qlora_jax.evals.mmlu import read_questions

            self._questions = read_questions(
                args.mmlu, shots=args.mmlu_shots, limit=args.mmlu_limit or None
            )

    def __call__(self, model: Any) -> dict[str, Any]:
        """Returns loss, perplexity, accuracy and samples, as far as they are wanted."""
        from qlora_jax.train import evaluate

        numbers: dict[str, Any] = {}
        if self._prepared.evaluation:
            batches, chunk = self._prepared.evaluation, self._args.chunk_size
            loss = evaluate(model, batches, chunk_size=chunk)
            # The exponential of a greater loss is no float.
            numbers = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700))}
        if self._questions is not None:
            from qlora_jax.evals.mmlu import mmlu

            result = mmlu(model, self._tokenizer, self._questions)
            numbers |= {"mmlu": result.accuracy, "mmlu_subjects": result.mean}
        if self._args.samples and self._prepared.evaluation:
            numbers["samples"] = self._samples(model)
        return numbers

    def _samples(self, model: Any) -> list[dict[str, str]]:
        import qlora_jax as ql

        rows = self._prepared.samples(self._args.samples)
        ids = [prompt for prompt, _ in rows]
        ends = {*model.config.eos_token_id, self._tokenizer.eos_id}
        count = self._args.sample_tokens
        answers = ql.generate(model, ids, max_new_tokens=count, eos_ids=sorted(ends))
        decode = self._tokenizer.decode
        return [
            {
                "prompt": decode(prompt).strip(),
                "wanted": decode(wanted).strip(),
                "answer": decode(answer).strip(),
            }
            for (prompt, wanted), answer in zip(rows, answers, strict=True)
        ]
