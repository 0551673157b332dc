"""The loop around the train step.

It adds what is not pure: batches, callbacks, checkpoints; it never waits for the device
except to hand out the numbers of the step before.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qlora_jax.callbacks import Callback, StepReport
from qlora_jax.lora import join_trainable, split_trainable
from qlora_jax.run import Run
from qlora_jax.train.config import TrainConfig, check_same_run
from qlora_jax.train.loss import next_token_loss_sum
from qlora_jax.train.step import committed, make_train_step

if TYPE_CHECKING:
    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]


def fit(
    model: Any,
    batches: Iterable["Batch"],
    config: TrainConfig,
    tx: optax.GradientTransformation | None = None,
    *,
    run: Run | None = None,
    callbacks: Sequence[Callback] = (),
) -> Any:
    """Trains the adapters of a model.

    With a `Run` it may be killed at any moment: called again in the same way it goes on
    from the last checkpoint, and every number is the one that an unbroken run gives.

    Args:
        model: with adapters, see `add_lora`; it stays as it was.
        batches: gives `config.batch_size` rows at a time. With a `Run` its iterator
            has `get_state()` and `set_state(state)`, as `data.Batches` has.
        config: hyperparameters; those of LoRA have been used in `add_lora`.
        tx: the optimizer; None for `config.optimizer()`.
        run: the folder where every step is written down, and the state is saved every
            `config.save_every` steps and at the end, and taken up from.
        callbacks: told about every step, as `ProgressBar()`.

    Returns:
        The model with trained adapters.

    Raises:
        ValueError: if the run was saved with other hyperparameters, another model or
            other data.
    """
    tx = config.optimizer() if tx is None else tx
    rates = config.learning_rates()
    trainable, frozen = split_trainable(model)
    trainable = committed(jax.tree.map(jnp.copy, trainable))  # the step donates it
    opt_state = committed(tx.init(trainable))
    iterator = iter(batches)
    first = 0
    if run is not None and run.checkpoints.latest() is not None:
        saved = run.checkpoints.restore((trainable, opt_state))
        check_same_run(saved.notes["config"], config)
        trainable, opt_state = saved.tree
        iterator.set_state(saved.notes["data"])  # pyright: ignore
        first = saved.step
    loss_sum = functools.partial(
        next_token_loss_sum, remat=config.remat, chunk_size=config.chunk_size
    )
    step = make_train_step(tx, accumulate=config.accumulate, loss_sum=loss_sum)
    dropout_key = jax.random.fold_in(jax.random.key(config.seed), 1)
    callbacks = [*callbacks, run.log] if run is not None else callbacks
    for callback in callbacks:
        callback.start(first, config.steps)
    clock = time.perf_counter()
    waiting: tuple[int, int, Any] | None = None

    def tell() -> None:
        nonlocal clock
        if waiting is None:
            return
        number, tokens, metrics = waiting
        metrics = {name: float(value) for name, value in metrics.items()}  # waits
        now = time.perf_counter()
        report = StepReport(
            step=number + 1,
            steps=config.steps,
            loss=metrics["loss"],
            grad_norm=metrics["grad_norm"],
            learning_rate=float(jnp.asarray(rates(number))),
            tokens=tokens,
            target_tokens=int(metrics["target_tokens"]),
            seconds=now - clock,
        )
        clock = now
        for callback in callbacks:
            callback.step(report)

    for number in range(first, config.steps):
        batch = {name: np.asarray(value) for name, value in next(iterator).items()}
        key = jax.random.fold_in(dropout_key, number) if config.dropout else None
        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, key)
        # The numbers of the step before are ready by now, or soon: the device computes
        # this step while they are handed out.
        tell()
        waiting = (number, batch["tokens"].size, metrics)
        done = number + 1
        if run is not None and (done % config.save_every == 0 or done == config.steps):
            tell()
            waiting = None
            notes = {
                "config": dataclasses.asdict(config),
                "data": iterator.get_state(),  # pyright: ignore
            }
            run.checkpoints.save(done, (trainable, opt_state), notes)
    tell()
    for callback in callbacks:
        callback.end()
    return join_trainable(trainable, frozen)
