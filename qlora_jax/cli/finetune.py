"""`qlora-jax finetune`: QLoRA from a checkpoint and rows of text to an adapter."""

import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qlora_jax.callbacks import Callback, ProgressBar
from qlora_jax.cli.model import Precision, dtype_of, fingerprint
from qlora_jax.cli.parsing import (
    by_pattern,
    command_line,
    parse,
    read_yaml,
    source_of,
    split_config,
)
from qlora_jax.cli.presets import PRESETS
from qlora_jax.run import Run
from qlora_jax.train import Stopped, TrainConfig, may_change


@dataclasses.dataclass(frozen=True)
class Finetune(TrainConfig):
    """Finetunes a model; the adapter, the numbers and a report go into a folder.

    CONFIG.yaml has a line `name: value` for each setting; flags change them.

    The paper's are presets: --preset guanaco-7b, guanaco-13b, -33b or -65b.

    The same command goes on with a run that was ended, however it was.

    Attributes:
        model: a folder, a .gguf file, owner/name on the Hugging Face hub, or
            SmolLM2-135M-Instruct, which needs no account.
        data: files, folders or hf:owner/name; or mappings with more about a source, as
            '{"path": "a.jsonl", "weight": 2}'.
        eval_data: rows to evaluate on, as data.
        eval_size: without eval_data: rows of the data held out, a number or a share.
        format: what the rows are, see `qlora-jax data formats`; auto finds it by their
            fields.
        answers: learn the last answer of a conversation, or all of them.
        train_on_source: learn the questions too.
        source_max_len: tokens that a question is cut to.
        target_max_len: tokens that an answer is cut to.
        truncate_source: which end of a question falls.
        chat_template: guanaco, alpaca, chatml, hermes, plain, or Jinja source; None for
            the model's own.
        packing: several documents to a row, none seeing another.
        group_by_length: rows of like length share a batch.
        skip_bad_rows: leave out up to so many rows that are not what they should be.
        epochs: passes over the data, instead of steps; 0 for steps.
        quantize: format of the frozen weights (nf4, fp4, int8, ...); none leaves them
            as they are in the file.
        double_quant: quantize the scales of the blocks too.
        dtype: type of the rest and of the computation; auto is float32 on a CPU, where
            it is faster, and bfloat16 elsewhere.
        revision: branch, tag or commit of a model on the hub.
        targets: which weights get adapters, a regular expression over their paths; None
            for all linear layers.
        rank_pattern: ranks that differ, as 'down_proj=16': a regular expression over
            paths and a number.
        alpha_pattern: alphas that differ, as 'down_proj=8': a regular expression over
            paths and a number.
        train_rows: tokens whose rows of the embedding are trained too, as those of new
            tokens.
        init: first values of the adapters.
        rslora: scale adapters by alpha / sqrt(rank).
        dora: train the magnitude of each column too.
        paged: keep the optimizer's state in host memory.
        lean: adapters and their gradients in bfloat16, float32 masters in the
            optimizer's state: the least memory, for the largest models.
        samples: held-out rows that are answered before, at evaluations and after.
        sample_tokens: most tokens of such an answer.
        mmlu: a file of MMLU questions; accuracy on them joins each evaluation.
        mmlu_shots: a file of solved questions, five of which come before each.
        mmlu_limit: take only so many questions of each subject; 0 for all.
        out: folder of the run; None for runs/ and the model's name.
        resume: go on with the run in that folder, if one is there.
    """

    model: str = "SmolLM2-135M-Instruct"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    eval_size: int | float = 64
    format: str = "auto"
    answers: Literal["last", "all"] = "last"
    train_on_source: bool = False
    source_max_len: int | None = None
    target_max_len: int | None = None
    truncate_source: Literal["right", "left"] = "right"
    chat_template: str | None = None
    packing: bool = False
    group_by_length: bool = False
    skip_bad_rows: int = 0
    epochs: float = 0.0
    quantize: str = "nf4"
    double_quant: bool = True
    dtype: Precision = "auto"
    revision: str | None = None
    targets: str | None = None
    rank_pattern: tuple[str, ...] = ()
    alpha_pattern: tuple[str, ...] = ()
    train_rows: tuple[int, ...] = ()
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "loftq"] = "kaiming"
    rslora: bool = False
    dora: bool = False
    paged: bool = True
    lean: bool = False
    samples: int = 2
    sample_tokens: int = 64
    mmlu: str | None = None
    mmlu_shots: str | None = None
    mmlu_limit: int = 0
    out: str | None = None
    resume: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ValueError(
                "say what to learn from: --data FILE (see `qlora-jax data formats`)."
            )
        if self.eval_every and not self.eval_data and not self.eval_size:
            raise ValueError(
                f"eval_every={self.eval_every} asks for evaluations: give --eval-size "
                "or --eval-data."
            )
        if self.epochs < 0 or self.samples < 0 or self.sample_tokens < 1:
            raise ValueError(
                f"epochs={self.epochs} and samples={self.samples} must not be "
                f"negative, sample_tokens={self.sample_tokens} at least 1."
            )
        if self.lean and self.ema:
            raise ValueError(
                f"ema={self.ema} keeps a running mean of the adapters, which lean=True "
                "has in bfloat16, where it would stand still: give one of them."
            )
        by_pattern("rank_pattern", self.rank_pattern, int)
        by_pattern("alpha_pattern", self.alpha_pattern, float)

    @property
    def folder(self) -> str:
        """The folder of the run."""
        name = pathlib.Path(self.model).name.removesuffix(".gguf")
        return self.out or f"runs/{name}"

    def settings(self) -> dict[str, Any]:
        """Returns all that determines the run, as its config.yaml has it."""
        settings = dataclasses.asdict(self)
        for name in ("data", "eval_data"):
            settings[name] = [source_of(text) for text in settings[name]]
        return {k: v for k, v in settings.items() if k not in ("out", "resume")}

    def training(self, batches: int) -> TrainConfig:
        """Returns the part that training takes; `batches` are those of a pass."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        config = TrainConfig(**{name: getattr(self, name) for name in names})
        if not self.epochs:
            return config
        return dataclasses.replace(config, steps=math.ceil(self.epochs * batches))


# What belongs together in the help, most needed first.
_GROUPS = {
    "model": ("model", "revision", "quantize", "double_quant", "dtype"),
    "data": (
        "data", "eval_data", "eval_size", "format", "chat_template", "answers",
        "train_on_source", "seq_len", "source_max_len", "target_max_len",
        "truncate_source", "packing", "group_by_length", "skip_bad_rows",
    ),
    "adapter": (
        "rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "also",
        "train_rows", "init", "rslora", "dora",
    ),
    "training": (
        "steps", "epochs", "batch_size", "learning_rate", "schedule", "warmup_steps",
        "algorithm", "b1", "b2", "weight_decay", "lora_plus", "max_grad_norm",
        "neftune_alpha", "ema", "seed",
    ),
    "memory": ("accumulate", "paged", "lean", "remat", "unroll", "chunk_size"),
    "evaluation": (
        "eval_every", "patience", "samples", "sample_tokens", "mmlu", "mmlu_shots",
        "mmlu_limit",
    ),
    "run": ("out", "resume", "save_every", "keep", "max_skipped"),
}  # fmt: skip
# Of what only shows how it goes: it may change when a run is taken up again.
_SHOWN = {"samples", "sample_tokens", "mmlu", "mmlu_shots", "mmlu_limit"}


def options(argv: Sequence[str]) -> Finetune:
    """Returns the options: a preset, changed by a file, changed by flags."""
    path, argv = split_config(argv)
    name, argv = _preset(argv)
    values = {} if path is None else read_yaml(path, Finetune)
    if name is not None:
        values = {**PRESETS[name], **values}
    prog = "qlora-jax finetune [CONFIG.yaml] [--preset NAME]"
    return parse(Finetune, argv, prog, values=values, groups=_GROUPS)


def _preset(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    rest, name = list(argv), None
    for i, word in enumerate(rest):
        if word == "--preset" or word.startswith("--preset="):
            name = word.partition("=")[2] or (rest[i + 1 : i + 2] or [""])[0]
            del rest[i : i + (1 if "=" in word else 2)]
            break
    if name is not None and name not in PRESETS:
        raise ValueError(f"--preset {name!r} must be one of {', '.join(PRESETS)}.")
    return name, rest


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    args = options(argv)
    try:
        finetune(args)
    except Stopped as stopped:
        print(
            f"\nStopped by {stopped.signal} after {stopped.step} steps; all is saved."
        )
        print(f"To go on: {command_line('finetune', argv)}")
    return 0


def finetune(args: Finetune) -> None:
    """Finetunes, and writes what came of it into the folder of the run."""
    import absl.logging
    import jax

    import qlora_jax as ql
    from qlora_jax import data, lora
    from qlora_jax.interop.peft import whole_options

    # What fails in orbax's threads is raised here too, and said once.
    absl.logging.set_verbosity(absl.logging.FATAL)
    began = time.perf_counter()
    # Whatever is wrong with the call is said before anything takes long.
    free = may_change(args.schedule) | _SHOWN
    free -= {"steps"} if args.epochs else set()
    usual = {field.name: field.default for field in dataclasses.fields(args)}
    run = Run(
        args.folder,
        args.settings(),
        resume=args.resume,
        may_change=free,
        defaults={name: usual[name] for name in args.settings()},
    )
    path = ql.find_model(args.model, args.revision)
    tokenizer = ql.load_tokenizer(path)
    print(f"Model: {path}")
    prepared = data.prepare(
        [source_of(text) for text in args.data],
        tokenizer,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        eval_sources=[source_of(text) for text in args.eval_data] or None,
        eval_size=0 if args.eval_data else args.eval_size,
        format=args.format,
        answers=args.answers,
        train_on_source=args.train_on_source,
        source_max_len=args.source_max_len,
        target_max_len=args.target_max_len,
        truncate_source=args.truncate_source,
        chat_template=args.chat_template,
        packing=args.packing,
        group_by_length=args.group_by_length,
        seed=args.seed,
        skip_bad_rows=args.skip_bad_rows,
    )
    print(prepared.statistics)
    run.check_data({"model": fingerprint(path), **prepared.manifest})
    config = args.training(len(prepared.train))
    finished = run.finished
    if finished and _is_all(finished, config):
        print(
            f"{run.folder} is finished: {finished['step']} steps. For a new run give "
            f"another --out; to go on with this one, more {_more(finished)}."
        )
        return
    evaluate = Evaluation(args, prepared, tokenizer)
    model = ql.load_model(
        path,
        None if args.quantize == "none" or _changes_base(args) else args.quantize,
        double_quant=args.double_quant,
        dtype=dtype_of(args.dtype),
    )
    model = ql.add_lora(
        model,
        rank=args.rank,
        alpha=args.alpha,
        dropout=args.dropout,
        targets=args.targets,
        rank_pattern=by_pattern("rank_pattern", args.rank_pattern, int),
        alpha_pattern=by_pattern("alpha_pattern", args.alpha_pattern, float),
        key=jax.random.key(args.seed),
        rslora=args.rslora,
        dora=args.dora,
        init=args.init,
        quantize=args.quantize if _changes_base(args) else None,
        dtype=_trained_dtype(args),
    )
    if args.train_rows:
        rows = {"embed$": args.train_rows}
        model = lora.train_rows(model, rows, dtype=_trained_dtype(args))
    trainable, _ = ql.split_trainable(model, also=args.also)
    trained = sum(x.size for x in jax.tree.leaves(trainable))
    beside = f", and {args.also}" if args.also else ""
    beside += f", and rows of {len(args.train_rows)} tokens" if args.train_rows else ""
    print(f"Trained: {trained:,} parameters in adapters of rank {args.rank}{beside}")
    # What cannot be written as an adapter is better said now than at the end.
    whole = whole_options(model, args.also) if args.also else {}

    # A run that is taken up again has measured this already.
    before = run.recorded(step=0)
    if before is None:
        before = {"step": 0, **evaluate(model)}
        run.record(**before)
    if "eval_loss" in before:
        print(f"Held-out loss before: {before['eval_loss']:.3f}")
    model = ql.fit(
        model,
        prepared.train,
        config,
        _optimizer(args, config, trainable),
        run=run,
        callbacks=[ProgressBar(), SaveBest(run.folder / "best", args.model, whole)],
        evaluate=evaluate if config.eval_every else None,
        consume=True,
    )
    after = _last_evaluation(run, config) or evaluate(model)
    _save_adapter(model, run.folder / "adapter", args.model, whole)
    _finish(run, before, after, time.perf_counter() - began, config)


def _save_adapter(
    model: Any, folder: pathlib.Path, base_model: str, whole: Mapping[str, Any]
) -> None:
    import qlora_jax as ql

    try:
        ql.save_adapter(model, folder, base_model=base_model, **whole)
    except OSError as error:
        raise OSError(
            f"The adapter could not be written into {folder}: "
            f"{error.strerror or error}. When that is mended, the same command goes on."
        ) from None


def _trained_dtype(args: Finetune) -> Any:
    import jax.numpy as jnp

    return jnp.bfloat16 if args.lean else jnp.float32


def _optimizer(args: Finetune, config: TrainConfig, trainable: Any) -> Any:
    import jax

    import qlora_jax as ql
    from qlora_jax.optim.pages import PAGE_SIZE

    tx = config.optimizer()
    if args.lean:
        tx = ql.with_master(tx)
    if not args.paged:
        return tx
    if not args.lean or config.algorithm != "adamw":  # 8-bit states have blocks
        return ql.paged(tx)
    # Half the gradients leave half the room for pages, so that those are slices; each
    # has a layer of a matrix at least, its master and two moments.
    layers = [x.size // x.shape[0] for x in jax.tree.leaves(trainable) if x.shape]
    return ql.paged(tx, page_size=max(PAGE_SIZE, 12 * max(layers)), slice_leaves=True)


def _changes_base(args: Finetune) -> bool:
    """Whether the first adapters take a part of the base, which is quantized after."""
    return args.init in ("pissa", "loftq") and args.quantize != "none"


def _is_all(finished: Mapping[str, Any], config: TrainConfig) -> bool:
    patience = finished.get("ended_by_patience")
    return finished["step"] >= config.steps or patience == config.patience > 0


def _more(finished: Mapping[str, Any]) -> str:
    return "--patience" if finished.get("ended_by_patience") else "--steps"


def _last_evaluation(run: Run, config: TrainConfig) -> dict[str, Any] | None:
    """Returns the numbers of an evaluation after the last step, if there was one."""
    lines = [x for x in run.log.read() if "eval_loss" in x and x["step"] > 0]
    last = max((x["step"] for x in run.log.read()), default=0)
    if not config.eval_every or not lines or lines[-1]["step"] != last:
        return None
    return {k: v for k, v in lines[-1].items() if k not in ("step", "best")}


def _finish(
    run: Run,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    seconds: float,
    config: TrainConfig,
) -> None:
    from qlora_jax import memory

    lines = run.log.read()
    steps = [line for line in lines if "loss" in line]
    best = [line for line in lines if line.get("best")]
    last = steps[-1]["step"] if steps else 0
    extra: dict[str, Any] = {
        "skipped": steps[-1]["skipped"] if steps else 0,
        "seconds": round(seconds, 1),
        "training_seconds": round(sum(line["seconds"] for line in steps), 1),
    }
    if steps:
        rates = [line["tokens_per_s"] for line in steps]
        extra["tokens_per_s_median"] = round(statistics.median(rates))
    if best:
        extra["best_step"] = best[-1]["step"]
        extra["best_eval_loss"] = best[-1]["eval_loss"]
    if last < config.steps:
        extra["ended_by_patience"] = config.patience
    if (peak := memory.device_peak_gb()) is not None:
        extra["peak_device_gb"] = round(peak, 3)
    if "eval_loss" in before:
        extra["eval_loss_before"] = before["eval_loss"]
        extra["eval_loss_after"] = after["eval_loss"]
    run.finish(**after, **extra)
    if last < config.steps:
        print(
            f"Ended after {last} steps: {config.patience} evaluations found no better."
        )
    if "eval_loss" in before:
        fell = before["eval_loss"] - after["eval_loss"]
        change = f"fell by {fell:.3f}" if fell >= 0 else f"rose by {-fell:.3f}"
        print(f"Held-out loss after: {after['eval_loss']:.3f} ({change})")
    if best and best[-1]["step"] != last:
        print(
            f"Best held-out loss: {best[-1]['eval_loss']:.3f} after "
            f"{best[-1]['step']} steps, in best/"
        )
    written = ["adapter/", "report.md", "metrics.jsonl", "config.yaml"]
    written += ["best/"] if best else []
    print(f"Written: {run.folder}/ ({', '.join(written)})")
    print(f"To run it again: qlora-jax finetune {run.folder}/config.yaml --out FOLDER")


class SaveBest(Callback):
    """Writes the adapter of the best evaluation so far.

    Args:
        folder: where; replaced as a whole.
        base_model: the name that the adapter gives to its base.
        whole: how to save what is trained whole, see `whole_options`.
    """

    def __init__(self, folder: pathlib.Path, base_model: str, whole: Mapping[str, Any]):
        self.folder, self.base_model, self.whole = folder, base_model, whole

    def evaluated(
        self, step: int, numbers: Mapping[str, Any], model: Any, best: bool
    ) -> None:
        """Writes, if it is the best."""
        if best:
            _save_adapter(model, self.folder, self.base_model, self.whole)


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
