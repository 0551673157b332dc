"""What 4 bits cost: QLoRA, bf16 LoRA and full bf16 finetuning, compared.

    python -m benchmarks.quality --data FOLDER
    python -m benchmarks.quality --data FOLDER --rows 64 --seeds 1   a trial

Finetunes one model on GSM8K and on ARC-easy by each method and with several seeds (of
the adapters' start and the order of the data), and measures held-out loss and accuracy
before and after. The folder holds gsm8k_train.jsonl.gz, gsm8k_test.jsonl and
arc_easy_{train,test}.jsonl.gz.

Before them short runs choose the learning rate of each task and method: they train on a
part of the training rows and are compared on the rest of them. The step of a method is
compiled once, since learning rate and number of steps are state of the optimizer.

Writes benchmarks/results/quality.json after each row, and prints a table in the end;
with `--limit` the last seeds of a task are left out rather than the time exceeded.
Methods may be run side by side, each in a process with its `--methods` and `--out`;
`python -m benchmarks.quality_table FILE FILE ...` puts them together.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qlora_jax as ql
from benchmarks import quality_table
from benchmarks.quality_tasks import Accuracy, Task, read_tasks
from qlora_jax.train import committed, next_token_loss_sum, step_options

ALPHA = 16.0
WARMUP = 0.03  # of the steps


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to finetune: what the base is held in, and what is trained."""

    name: str
    quantize: str | None
    adapters: bool


METHODS = (
    Method("QLoRA", "nf4", adapters=True),
    Method("bf16 LoRA", None, adapters=True),
    Method("full bf16", None, adapters=False),
)
EPOCHS = {"arc texts": 3, "gsm8k": 1, "arc numbers": 2}
# Learning rates that are tried: of adapters, and of all weights.
RATES = {True: (2e-3, 4e-3, 8e-3), False: (1e-4, 3e-4, 1e-3)}


def learning_rate(count: Any, peak: Any, steps: Any) -> Any:
    """Returns the rate of step `count`: it rises, then falls along a line to 0."""
    rising = (count + 1) / (WARMUP * steps)
    falling = (steps - count) / ((1 - WARMUP) * steps)
    return peak * jnp.minimum(jnp.minimum(rising, falling), 1)


@optax.inject_hyperparams
def adamw(peak: float, steps: float) -> optax.GradientTransformation:
    """AdamW behind a clip, at `learning_rate`.

    `peak` and `steps` are numbers in the state, so that one program serves all.
    """
    rate = functools.partial(learning_rate, peak=peak, steps=steps)
    return optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(rate, b2=0.999))


def load(path: pathlib.Path, methods: Sequence[Method]) -> dict[str | None, Any]:
    """Returns the models that methods begin with, by the format of their weights."""

    def read(quantize: str | None) -> Any:
        return ql.load_model(
            path, quantize=quantize, dtype=jnp.bfloat16, progress=False
        )

    formats = list(dict.fromkeys(method.quantize for method in methods))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(formats, pool.map(read, formats), strict=True))


class Trainer:
    """A model finetuned by one method, again and again.

    Args:
        method: the method.
        base: its model, without adapters.
        batch_size: rows of a step.
        seq_len: tokens of a row.
        rank: of the adapters.
        guarded: leave out steps without a finite gradient.

    Attributes:
        step: the compiled step, after `compile`.
        step_gb: what its program takes on the device, by XLA's count.
        compile_s: seconds that compiling it took.
    """

    def __init__(
        self,
        method: Method,
        base: Any,
        *,
        batch_size: int,
        seq_len: int,
        rank: int = 64,
        guarded: bool = True,
    ):
        self.method, self._base, self._rank = method, base, rank
        self._shape, self._guarded = (batch_size, seq_len), guarded
        loss_sum = functools.partial(next_token_loss_sum, remat="none", chunk_size=2048)
        self._jitted = ql.make_train_step(
            self.optimizer(0.0, 1),
            loss_sum=loss_sum,
            compiler_options=step_options(batch_size * seq_len),
        )
        self.step: Any = None
        self.step_gb = self.compile_s = 0.0

    def optimizer(self, peak: float, steps: int) -> optax.GradientTransformation:
        """Returns the optimizer; weights in bfloat16 have float32 masters in it."""
        inner = adamw(peak=peak, steps=float(steps))
        if not self.method.adapters:
            inner = ql.with_master(inner)
        return ql.skip_nonfinite(inner) if self._guarded else inner

    def compile(self) -> None:
        """Compiles the step."""
        began = time.perf_counter()
        kinds = ("tokens", "segment_ids", "positions")
        batch: dict[str, np.ndarray] = {
            name: np.zeros(self._shape, np.int32) for name in kinds
        }
        batch["loss_mask"] = np.zeros(self._shape, np.float32)
        self.step = self._jitted.lower(*self.start(0, 0.0, 1), batch).compile()
        self.compile_s = time.perf_counter() - began
        sizes = self.step.memory_analysis()
        used = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        new = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        self.step_gb = (used + new) / 1e9

    def start(self, seed: int, peak: float, steps: int) -> tuple[Any, Any, Any]:
        """Returns the trainable and frozen parts and the optimizer's state between."""
        model, also = self._base, "."
        if self.method.adapters:
            key, also = jax.random.key(seed), None
            model = ql.add_lora(model, rank=self._rank, alpha=ALPHA, key=key)
        trainable, frozen = ql.split_trainable(model, also=also)
        # The step donates them, and the base is needed again.
        trainable = committed(jax.tree.map(jnp.copy, trainable))
        return trainable, committed(self.optimizer(peak, steps).init(trainable)), frozen

    def untrained(self) -> Any:
        """Returns the model before training, its arrays placed as they are after it."""
        trainable, _, frozen = self.start(0, 0.0, 1)
        return ql.join_trainable(trainable, frozen)

    def train(
        self, batches: ql.data.Batches, seed: int, peak: float, steps: int
    ) -> tuple[Any, float]:
        """Returns the trained model, and the seconds that took."""
        trainable, state, frozen = self.start(seed, peak, steps)
        jax.block_until_ready((trainable, state))
        began = time.perf_counter()
        for _, batch in zip(range(steps), batches, strict=False):
            trainable, state, _ = self.step(trainable, state, frozen, batch)
        jax.block_until_ready(trainable)
        seconds = time.perf_counter() - began
        return ql.join_trainable(trainable, frozen), seconds


def measure(model: Any, task: Task, seq_len: int) -> tuple[float, Accuracy]:
    """Returns the held-out loss and the accuracy of a model."""
    accuracy = task.accuracy(model)
    batches = ql.data.in_order(task.test, batch_size=16, seq_len=seq_len, packing=True)
    return ql.evaluate(model, batches, chunk_size=2048), accuracy


class Study:
    """Trainers, tasks, and the rows that are found; `arguments` of the command line."""

    def __init__(self, arguments: argparse.Namespace):
        self.began = time.perf_counter()
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []
        self.swept: list[dict[str, Any]] = []
        path = ql.find_model(arguments.model)
        self.size = {"batch_size": arguments.batch, "seq_len": arguments.seq}
        methods = [method for method in METHODS if method.name in arguments.methods]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            loaded = pool.submit(load, path, methods)
            tasks = read_tasks(
                arguments.data,
                ql.load_tokenizer(path),
                rows=arguments.rows,
                answers=arguments.answers,
                max_new_tokens=arguments.new_tokens,
                batch_tokens=arguments.batch_tokens,
            )
            self.say("data read")
            bases = loaded.result()
        self.tasks = sorted(
            (task for task in tasks if task.name in arguments.tasks),
            key=lambda task: list(EPOCHS).index(task.name),
        )
        self.trainers = [
            Trainer(method, bases[method.quantize], **self.size, rank=arguments.rank)
            for method in methods
        ]
        self.say("models read")

    def elapsed(self) -> float:
        """Seconds since the program began its work."""
        return time.perf_counter() - self.began

    def say(self, what: str) -> None:
        """Prints it, with the time."""
        print(f"[{self.elapsed():5.0f} s] {what}", flush=True)

    def run(self) -> None:
        """Takes all rows, task after task, as long as there is time."""
        for trainer in self.trainers:
            trainer.compile()
            self.say(
                f"{trainer.method.name}: step compiled in {trainer.compile_s:.0f} s, "
                f"{trainer.step_gb:.2f} GB"
            )
        for task in self.tasks:
            if self.elapsed() > self.arguments.limit:
                self.say(f"no time for {task.name}")
                continue
            before, peaks = {}, {}
            for trainer in self.trainers:
                name = trainer.method.name
                found = measure(trainer.untrained(), task, self.size["seq_len"])
                before[name] = found
                self.say(f"{task.name}, {name}, untrained: {found[0]:.4f} {found[1]}")
                peaks[name] = self.chosen_rate(task, trainer)
            took = 0.0  # by a seed
            for seed in range(self.arguments.seeds):
                began = self.elapsed()
                if began + took > self.arguments.limit:
                    self.say(f"no time for {task.name}, seed {seed}")
                    break
                for trainer in self.trainers:
                    name = trainer.method.name
                    loss, accuracy = before[name]
                    row = {"loss_before": loss, "accuracy_before": accuracy.share}
                    row |= self.row(task, trainer, seed, peaks[name])
                    self.rows.append(row)
                    self.write()
                took = self.elapsed() - began
        print(quality_table.table(self.rows))

    def row(
        self, task: Task, trainer: Trainer, seed: int, peak: float
    ) -> dict[str, Any]:
        """Trains and measures once."""
        batches = ql.data.Batches(task.train, seed=seed, packing=True, **self.size)
        epochs = EPOCHS[task.name] * self.arguments.epochs
        steps = max(round(epochs * len(batches.rows) / batches.batch_size), 1)
        model, seconds = trainer.train(batches, seed, peak, steps)
        began = time.perf_counter()
        loss, accuracy = measure(model, task, self.size["seq_len"])
        measured = time.perf_counter() - began
        self.say(
            f"{task.name}, {trainer.method.name}, seed {seed}: loss {loss:.4f}, right "
            f"{accuracy.share:.1%}, {steps} steps in {seconds:.1f} s, measured in "
            f"{measured:.1f} s"
        )
        return {
            "task": task.name,
            "method": trainer.method.name,
            "seed": seed,
            "learning_rate": peak,
            "epochs": epochs,
            "steps": steps,
            "loss_after": loss,
            "accuracy_after": accuracy.share,
            "questions": accuracy.count,
            "train_s": seconds,
            "measure_s": measured,
            "tokens_per_s": steps * batches.batch_size * self.size["seq_len"] / seconds,
            "step_gb": trainer.step_gb,
        }

    def chosen_rate(self, task: Task, trainer: Trainer) -> float:
        """Returns the best of `RATES` by short runs.

        The test rows are not looked at: the last eighth of the training rows is.
        """
        cut = len(task.train) * 7 // 8
        batches = ql.data.Batches(task.train[:cut], packing=True, **self.size)
        held_out = ql.data.in_order(
            task.train[cut:], batch_size=16, seq_len=self.size["seq_len"], packing=True
        )
        steps, losses = self.arguments.sweep_steps, {}
        for peak in RATES[trainer.method.adapters]:
            model, _ = trainer.train(batches, 0, peak, steps)
            losses[peak] = ql.evaluate(model, held_out, chunk_size=2048)
            self.swept.append({
                "task": task.name,
                "method": trainer.method.name,
                "learning_rate": peak,
                "steps": steps,
                "loss": losses[peak],
            })  # fmt: skip
        self.say(f"{task.name}, {trainer.method.name}, rates: {losses}")
        # A rate at which the loss is no number comes last.
        return min(losses, key=lambda peak: np.nan_to_num(losses[peak], nan=np.inf))

    def write(self) -> None:
        """Writes what was found so far."""
        out = self.arguments.out
        out.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
            "model": pathlib.Path(self.arguments.model).name,
            "rank": self.arguments.rank,
            "alpha": ALPHA,
            **self.size,
            "sweep": self.swept,
            "rows": self.rows,
        }
        partial = out / "quality.json.partial"
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(out / "quality.json")


def parse(line: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(description="Compares ways to finetune.")
    add = parser.add_argument
    add("--data", type=pathlib.Path, required=True, help="folder of the rows")
    add("--model", default="SmolLM2-135M-Instruct", help="folder, .gguf or name")
    add("--tasks", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    names = [method.name for method in METHODS]
    add("--methods", nargs="+", default=names, choices=names)
    add("--seeds", type=int, default=3, help="runs of each task and method")
    add("--epochs", type=float, default=1.0, help="times the passes of each task")
    add("--batch", type=int, default=8, help="packed rows of a step")
    add("--seq", type=int, default=512, help="tokens of a row")
    add("--rank", type=int, default=64, help="of the adapters")
    add("--rows", type=int, help="take only so many of each file")
    add("--answers", type=int, default=500, help="questions of GSM8K to be answered")
    add("--new-tokens", type=int, default=256, help="of such an answer, at most")
    add("--batch-tokens", type=int, default=32_768, help="when answers are compared")
    add("--limit", type=float, default=float("inf"), help="seconds it may take")
    add("--sweep-steps", type=int, default=50, help="of the runs that choose rates")
    add("--out", type=pathlib.Path, default=quality_table.PATH.parent)
    return parser.parse_args(line)


def main() -> None:
    Study(parse()).run()


if __name__ == "__main__":
    main()
