"""The loop around the train step.

It adds what is not pure: batches, callbacks, evaluation, checkpoints, signals; it never
waits for the device except to hand out the numbers of the step before.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.atomic import new_file
from qlora_jax.callbacks import Callback, StepReport
from qlora_jax.checkpoint import CheckpointError
from qlora_jax.lora import join_trainable, split_trainable
from qlora_jax.one_gpu import warn_of_others
from qlora_jax.optim import SkipNonfiniteState
from qlora_jax.run import Run
from qlora_jax.sharding import (
    batch_sharding,
    committed,
    mesh_of,
    on_all_of,
    row_parts,
)
from qlora_jax.throughput import flops_per_token, peak_flops
from qlora_jax.train.config import TrainConfig, check_same_run
from qlora_jax.train.loss import next_token_loss_sum
from qlora_jax.train.progress import NonfiniteError, Progress
from qlora_jax.train.step import make_train_step, step_options
from qlora_jax.train.stop import Interruption, Stopped, StopRequest
from qlora_jax.train.tuning import tuned_if_it_fits

if TYPE_CHECKING:
    from jax.sharding import Mesh, NamedSharding

    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]
    Evaluate = Callable[[Any], Mapping[str, Any]]


def fit(
    model: Any,
    batches: Iterable["Batch"],
    config: TrainConfig,
    tx: optax.GradientTransformation | None = None,
    *,
    run: Run | None = None,
    callbacks: Sequence[Callback] = (),
    evaluate: "Evaluate | None" = None,
    consume: bool = False,
) -> Any:
    """Trains the adapters of a model.

    With a `Run` it may be killed at any moment: called again in the same way it goes on
    from the last checkpoint, and every number is the one that an unbroken run gives.
    SIGTERM and Ctrl-C end it after the step that is going on, the state saved.

    A step whose loss or gradient is no finite number is not taken.

    Args:
        model: with adapters, see `add_lora`, and rows of new tokens, see
            `lora.train_rows`; it stays as it was, unless `consume`.
        batches: gives `config.batch_size` rows at a time. With a `Run` its iterator
            has `get_state()` and `set_state(state)`, as `data.Batches` has.
        config: hyperparameters; those of LoRA have been used in `add_lora`.
        tx: the optimizer; None for `config.optimizer()`. One of your own that should
            outlive bad gradients is `paged(skip_nonfinite(inner))`.
        run: the folder where every step is written down, and the state is saved every
            `config.save_every` steps and at the end, and taken up from.
        callbacks: told about every step, as `ProgressBar()`.
        evaluate: from a model to numbers, among them `eval_loss`; called every
            `config.eval_every` steps and at the end. The checkpoint of the lowest
            loss stays, and `config.patience` waits for a lower one.
        consume: train the model's own arrays instead of a copy of them, which would
            take the memory of the adapters once more for as long as the run; the model
            that was given cannot be used afterwards.

    Returns:
        The model with trained adapters, rows and arrays of `config.also` (their
        running mean, with `config.ema`).

    Raises:
        ValueError: if the run was saved with other hyperparameters, another model or
            other data.
        Stopped: after a signal; the state is saved.
        NonfiniteError: if `config.max_skipped` steps in a row had no finite gradient
            (the first one, for an optimizer without `skip_nonfinite`).
        CheckpointError: if a checkpoint could not be written.
    """
    if evaluate is None and config.eval_every:
        raise ValueError(
            f"eval_every={config.eval_every} asks for evaluations: give evaluate=."
        )
    loop = _Loop(model, batches, config, tx, run, callbacks, evaluate, consume)
    with StopRequest() if run is not None else contextlib.nullcontext() as stop:
        loop.run_until(stop)
    return loop.model()


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A step that was handed to the device, its numbers not looked at yet.

    It is the first if no other was under way when it began.
    """

    number: int
    batch: "Batch"
    metrics: Any
    first: bool
    began: float
    handed: float


class _Loop:
    """The state of `fit`: arrays, position in the data, counts."""

    def __init__(self, model, batches, config, tx, run, callbacks, evaluate, consume):
        self.config, self.folder, self.evaluate = config, run, evaluate
        tx = config.optimizer() if tx is None else tx
        trainable, self.frozen = split_trainable(model, also=config.also)
        if not consume:  # the step donates what it is given
            trainable = jax.tree.map(jnp.copy, trainable)
        mesh = mesh_of((trainable, self.frozen))
        if mesh is not None:
            trainable = on_all_of(mesh, trainable)
        trainable = committed(trainable)
        warn_of_others(trainable)
        self.rows = None if mesh is None else _sharding_of_rows(mesh, config)
        arrays = [trainable, committed(tx.init(trainable))]
        if config.ema:
            arrays.append(jax.tree.map(jnp.copy, trainable))
        self.arrays, self.progress, self.done = arrays, Progress(), 0
        shardings = None
        if mesh is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        self.iterator = iter(batches)
        self.saved: int | None = None
        if run is not None:
            self._take_up(run)
        self.guarded = _is_guarded(self.arrays[1])
        loss_sum = functools.partial(
            next_token_loss_sum,
            remat=config.remat,
            unroll=config.unroll,
            chunk_size=config.chunk_size,
            rows=self.rows,
        )
        parts, tokens = config.accumulate, config.batch_size * config.seq_len
        self.step = tuned_if_it_fits(
            lambda options: make_train_step(
                tx,
                accumulate=parts,
                loss_sum=loss_sum,
                neftune_alpha=config.neftune_alpha,
                compiler_options=options,
                shardings=shardings,
            ),
            functools.partial(step_options, tokens // parts, remat=config.remat),
        )
        self.key = jax.random.fold_in(jax.random.key(config.seed), 1)
        self.callbacks = [*callbacks, run.log] if run is not None else callbacks
        self.rates = _rates(config)
        self.taken: _Taken | None = None
        self.flops, self.peak = flops_per_token(model), peak_flops()
        if self.peak is not None and mesh is not None:
            self.peak *= mesh.size
        self.told = 0.0  # when the numbers of a step came last

    def _take_up(self, run: Run) -> None:
        run.begin()
        run.checkpoints.keep = self.config.keep
        if run.checkpoints.latest() is None:
            run.checkpoints.check_room(self.arrays)
            return
        saved = run.checkpoints.restore(self.arrays)
        check_same_run(saved.notes["config"], self.config)
        self.iterator.set_state(saved.notes["data"])
        self.progress = Progress(**saved.notes["progress"])
        self.arrays, self.done, self.saved = saved.tree, saved.step, saved.step

    def model(self) -> Any:
        """Returns the model as it is evaluated and returned."""
        return join_trainable(self.arrays[-1 if self.config.ema else 0], self.frozen)

    def run_until(self, stop: StopRequest | None) -> None:
        """Trains to the end, or to a signal."""
        for callback in self.callbacks:
            callback.start(self.done, self.config.steps)
        try:
            self._train(stop)
        except Interruption:
            assert self.folder is not None and stop is not None and stop.signal
            self._save()
            self._wait()
            raise Stopped(self.done, self.folder.folder, stop.signal) from None
        except BaseException:
            # Whoever calls again, from this process, finds nothing half written.
            with contextlib.suppress(CheckpointError):
                self._wait()
            raise
        finally:
            for callback in self.callbacks:
                callback.end()

    def _train(self, stop: StopRequest | None) -> None:
        # It may have been stopped while it evaluated.
        self._evaluate_if_due(stop)
        while not self._is_over():
            self._advance()
            self._evaluate_if_due(stop)
            if self._is_due(self.config.save_every) or self._is_over():
                self._save()
            if stop is not None and stop.signal is not None:
                raise Interruption
        self._tell()
        self._wait()

    def _is_over(self) -> bool:
        patience = self.config.patience
        no_better = patience > 0 and self.progress.without >= patience
        return self.done >= self.config.steps or no_better

    def _is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and last, does now."""
        last = self.done == self.config.steps
        return every > 0 and (last or self.done % every == 0)

    def _advance(self) -> None:
        """Hands a step to the device, and meanwhile tells of the one before."""
        began, first = time.perf_counter(), self.taken is None
        batch = {k: np.asarray(v) for k, v in next(self.iterator).items()}
        given = batch if self.rows is None else jax.device_put(batch, self.rows)
        key = None
        if self.config.dropout or self.config.neftune_alpha:
            key = jax.random.fold_in(self.key, self.done)
        trainable, state, metrics = self.step(*self.arrays[:2], self.frozen, given, key)
        average = self.arrays[2:]
        if average:
            average = [_running_mean(average[0], trainable, self.config.ema)]
        self.arrays = [trainable, state, *average]
        handed = time.perf_counter()
        self._tell(ended=began)
        self.taken = _Taken(self.done, batch, metrics, first, began, handed)
        self.done += 1

    def _tell(self, ended: float | None = None) -> None:
        """Hands out the numbers of the step that was taken last; waits for them.

        Steps overlap, so one lasts until the next begins, `ended`: a step handed over
        later is one whose predecessor had to end. The first one had none to wait for,
        and lasts until its numbers come. Without a next one it lasts as long as the
        host or the device was busy with it alone.
        """
        if self.taken is None:
            return
        taken, self.taken = self.taken, None
        under_way = not all(x.is_ready() for x in jax.tree.leaves(taken.metrics))
        numbers = {k: float(v) for k, v in jax.device_get(taken.metrics).items()}
        now, before = time.perf_counter(), self.told
        if ended is None:
            on_device = now - max(taken.began, before)
            seconds = max(taken.handed - taken.began, on_device)
        else:
            seconds = (now if taken.first and under_way else ended) - taken.began
        self.told = now
        self.progress.took(finite=math.isfinite(numbers["grad_norm"]))
        tokens = taken.batch["tokens"].size
        report = StepReport(
            step=taken.number + 1,
            steps=self.config.steps,
            loss=numbers["loss"],
            grad_norm=numbers["grad_norm"],
            learning_rate=float(self.rates[taken.number]),
            tokens=tokens,
            target_tokens=int(np.nan_to_num(numbers["target_tokens"])),
            seconds=seconds,
            skipped=self.progress.skipped,
            mfu=self.peak and self.flops * tokens / max(seconds, 1e-9) / self.peak,
        )
        for callback in self.callbacks:
            callback.step(report)
        allowed = self.config.max_skipped if self.guarded else 1
        if self.progress.in_a_row >= allowed:
            raise _nonfinite(report, taken.batch, self.progress.in_a_row, self.folder)

    def _evaluate_if_due(self, stop: StopRequest | None) -> None:
        due = self._is_due(self.config.eval_every) and self.done
        if self.evaluate is None or not due or self.progress.evaluated == self.done:
            return
        self._tell()
        with stop.at_once() if stop is not None else contextlib.nullcontext():
            model = self.model()
            numbers = dict(self.evaluate(model))
        best = self.progress.found(self.done, float(numbers["eval_loss"]))
        for callback in self.callbacks:
            callback.evaluated(self.done, numbers, model, best)
        if best:
            self._save()

    def _save(self) -> None:
        if self.folder is None or self.saved == self.done:
            return
        self._tell()
        notes = {
            "config": dataclasses.asdict(self.config),
            "data": self.iterator.get_state(),
            "progress": dataclasses.asdict(self.progress),
        }
        self.folder.checkpoints.save(
            self.done, self.arrays, notes, best=self.progress.best_step
        )
        self.saved = self.done

    def _wait(self) -> None:
        if self.folder is not None:
            self.folder.checkpoints.wait()


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _running_mean(mean: Any, new: Any, decay: float) -> Any:
    return optax.incremental_update(new, mean, 1 - decay)


def _rates(config: TrainConfig) -> np.ndarray:
    """Returns the learning rates of all steps, so that no step has to ask for its."""
    rates = jax.vmap(config.learning_rates())(jnp.arange(config.steps))
    return np.asarray(rates)


def _sharding_of_rows(mesh: "Mesh", config: TrainConfig) -> "NamedSharding":
    """That of a batch, checked."""
    sharding = batch_sharding(mesh)
    parts, rows = row_parts(sharding), config.batch_size // config.accumulate
    if rows % parts:
        raise ValueError(
            f"batch_size={config.batch_size} with accumulate={config.accumulate} is "
            f"{rows} rows at a time, which must be a multiple of the {parts} parts of "
            f"the mesh that they are split over ({dict(mesh.shape)})."
        )
    return sharding


def _is_guarded(state: Any) -> bool:
    def is_guard(node):
        return isinstance(node, SkipNonfiniteState)

    return any(map(is_guard, jax.tree.leaves(state, is_leaf=is_guard)))


def _nonfinite(
    report: StepReport, batch: "Batch", in_a_row: int, run: Run | None
) -> NonfiniteError:
    """Writes the batch down, and returns the error that names the file."""
    folder = pathlib.Path(tempfile.gettempdir()) if run is None else run.folder
    path = folder / f"nonfinite_step_{report.step}.npz"
    with new_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, **batch)
    return NonfiniteError(
        f"{in_a_row} steps in a row had no finite gradient, the last one step "
        f"{report.step} (loss {report.loss}, gradient norm {report.grad_norm}). They "
        f"were not taken. The batch is in {path}. A lower learning rate, or a look at "
        "those rows, may help."
    )
