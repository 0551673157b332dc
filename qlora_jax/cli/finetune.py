"""`qlora-jax finetune`: QLoRA from a checkpoint and rows of text to an adapter."""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.callbacks import Callback, ProgressBar
from qlora_jax.cli.finetune_evaluation import Evaluation
from qlora_jax.cli.finetune_options import SHOWN, Finetune, options
from qlora_jax.cli.model import dtype_of, fingerprint
from qlora_jax.cli.parsing import (
    by_pattern,
    command_line,
    source_of,
)
from qlora_jax.run import Run
from qlora_jax.train import Stopped, TrainConfig, may_change


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
    free = may_change(args.schedule) | SHOWN
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
        group_by_length=args.group_by_length,
        seed=args.seed,
        **args.of_rows(),
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
