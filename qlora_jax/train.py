"""The loss, the train step, and the loop around it.

The step is one pure function, jitted once. The loop adds what is not pure: batches,
callbacks, checkpoints; it never waits for the device except to hand out the numbers of
the step before.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from qlora_jax.callbacks import Callback, StepReport
from qlora_jax.lora import join_trainable, split_trainable
from qlora_jax.run import Run

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Batch = Mapping[str, Any]  # of arrays, NumPy's or jax's, [batch, seq]
    LossSum = Callable[[Any, Batch], tuple[Float[Array, ""], Float[Array, ""]]]

Schedule = Literal["constant", "linear", "cosine"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of a run; the defaults are those of QLoRA's paper at 7B.

    Attributes:
        rank: of the adapters.
        alpha: the adapters' output is scaled by alpha / rank.
        dropout: on the adapters' input; the paper has 0.1 up to 13B and 0.05 above.
        learning_rate: its largest value; the paper has 1e-4 from 33B.
        schedule: how it goes on after the warm-up: "constant", or to 0 at the last step
            along a line or a cosine.
        warmup_steps: it rises from 0 over so many steps.
        b1: AdamW's decay of the mean.
        b2: AdamW's decay of the square.
        weight_decay: AdamW's.
        max_grad_norm: gradients of a larger global norm are scaled down to it.
        steps: optimizer steps.
        batch_size: rows of an optimizer step.
        accumulate: in how many parts, one after another, those rows are computed.
        seq_len: tokens of a row.
        remat: what the backward recomputes, see `Llama.hidden`.
        chunk_size: tokens whose logits are in memory at a time.
        save_every: optimizer steps between checkpoints.
        seed: of the adapters, the order of the rows, and dropout.

    Raises:
        ValueError: if a number is out of its range, or the parts do not divide a batch.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    learning_rate: float = 2e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    steps: int = 1875
    batch_size: int = 16
    accumulate: int = 1
    seq_len: int = 512
    remat: Literal["none", "full", "attention", "offload"] = "full"
    chunk_size: int = 512
    save_every: int = 250
    seed: int = 0

    def __post_init__(self):
        for name in ("rank", "steps", "batch_size", "accumulate", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("chunk_size", "save_every", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"{self.batch_size=} must be a multiple of {self.accumulate=}."
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"{self.warmup_steps=} must be at most {self.steps=}.")

    def learning_rates(self) -> optax.Schedule:
        """Returns the learning rate as a function of the step, counted from 0."""
        rest = max(self.steps - self.warmup_steps, 1)
        peak = self.learning_rate
        match self.schedule:
            case "constant":
                after = optax.constant_schedule(peak)
            case "linear":
                after = optax.linear_schedule(peak, 0.0, rest)
            case "cosine":
                after = optax.cosine_decay_schedule(peak, rest)
            case _:
                raise ValueError(
                    f"{self.schedule=} must be one of constant, linear, cosine."
                )
        if not self.warmup_steps:
            return after
        # The first step already moves: step i of the warm-up has rate (i + 1) / n.
        n = self.warmup_steps
        rising = optax.linear_schedule(peak / n, peak, max(n - 1, 1))
        return optax.join_schedules([rising, after], [n])

    def optimizer(self) -> optax.GradientTransformation:
        """Returns AdamW behind a clip of the global norm."""
        adamw = optax.adamw(
            self.learning_rates(), self.b1, self.b2, weight_decay=self.weight_decay
        )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adamw)


def next_token_loss_sum(
    model: Any, batch: "Batch", *, remat: str = "full", chunk_size: int = 512
) -> "tuple[Float[Array, ''], Float[Array, '']]":
    """Returns the summed loss of a batch and how many tokens it is the sum over.

    As `next_token_loss`, whose quotient these are: sums of parts of a batch add up to
    those of the whole.
    """
    tokens = batch["tokens"]
    segment_ids, positions = batch.get("segment_ids"), batch.get("positions")
    hidden = model.hidden(tokens, segment_ids, positions, remat=remat)
    weights = jnp.ones(tokens.shape, jnp.float32)
    if "loss_mask" in batch:
        weights = batch["loss_mask"].astype(jnp.float32)
    if segment_ids is not None:
        # The last token of a document does not predict the first of the next.
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        weights = weights.at[:, 1:].multiply(same)
    targets, weights = tokens[:, 1:].reshape(-1), weights[:, 1:].reshape(-1)
    hidden = hidden[:, :-1].reshape(targets.size, -1)
    # Tokens that count come first; chunks without any are then skipped. Prompts and
    # padding are most of an instruction batch, and the head is a large part of a step.
    order = jnp.argsort(weights == 0, stable=True)
    hidden, targets, weights = hidden[order], targets[order], weights[order]

    count = min(chunk_size, targets.size)
    padding = -targets.size % count

    def chunked(x: "Array") -> "Array":
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, count, *x.shape[1:])  # [chunks, count, ...]

    # Recomputed in the backward, so that the logits of one chunk are all there is.
    @jax.checkpoint
    def chunk_loss(total, chunk):
        x, target, weight = chunk

        def loss_of_chunk():
            logits = model.head(x)  # float32 [count, vocab]
            picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
            return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - picked) * weight)

        counts = jnp.any(weight != 0)
        return total + lax.cond(counts, loss_of_chunk, lambda: jnp.float32(0)), None

    chunks = (chunked(hidden), chunked(targets), chunked(weights))
    total, _ = lax.scan(chunk_loss, jnp.float32(0), chunks)
    return total, jnp.sum(weights)


def next_token_loss(
    model: Any, batch: "Batch", *, remat: str = "full", chunk_size: int = 512
) -> "Float[Array, '']":
    """Returns the mean cross entropy of the tokens that are to be predicted.

        loss = -sum(mask[t] · log p(tokens[t] | tokens[<t])) / sum(mask),   t > 0

    The logits are made `chunk_size` tokens at a time, in the backward again: [tokens,
    vocab] is never whole in memory.

    Args:
        model: has `hidden(tokens, segment_ids, positions, remat=)` and `head(hidden)`.
        batch: `tokens` int [batch, seq]; optional, of the same shape, `loss_mask` (1
            where a token is to be predicted; all, if absent), `segment_ids` and
            `positions` (of packed rows).
        remat: what the backward recomputes, see `Llama.hidden`.
        chunk_size: tokens whose logits are in memory at a time.

    Returns:
        In nats, float32; 0 if nothing is to be predicted.
    """
    total, count = next_token_loss_sum(model, batch, remat=remat, chunk_size=chunk_size)
    return total / jnp.maximum(count, 1)


def make_train_step(
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    loss_sum: "LossSum" = next_token_loss_sum,
) -> Callable[..., tuple[Any, Any, dict[str, "Float[Array, '']"]]]:
    """Makes the jitted function that takes one optimizer step.

        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, key)

    With accumulation a batch is computed in parts, one after another, and

        gradient = sum over parts of d(loss_sum) / sum over parts of tokens

    so that it is the gradient of the whole batch, however tokens fall into parts.

    Args:
        tx: the optimizer, plain or paged.
        accumulate: the number of parts; it divides the rows of a batch.
        loss_sum: (model, batch) -> summed loss, number of tokens.

    Returns:
        The step. `trainable` and `opt_state` are donated: use what it returns. Give
        them `committed` the first time, or the second call compiles again.
        `metrics` has `loss` (mean over the batch's tokens), `grad_norm` (before any
        clip) and `target_tokens`. `key` is of dropout; None for none.
    """

    def summed(trainable, frozen, batch, key):
        return loss_sum(join_trainable(trainable, frozen, key=key), batch)

    gradient = jax.value_and_grad(summed, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, opt_state, frozen, batch, key=None):
        if accumulate == 1:
            (loss, count), grads = gradient(trainable, frozen, batch, key)
        else:
            parts = jax.tree.map(functools.partial(_split_rows, accumulate), batch)

            def add(carry, part_and_number):
                part, number = part_and_number
                own = None if key is None else jax.random.fold_in(key, number)
                (loss, count), grads = gradient(trainable, frozen, part, own)
                return jax.tree.map(jnp.add, carry, (loss, count, grads)), None

            zeros = jax.tree.map(jnp.zeros_like, trainable)
            start = (jnp.float32(0), jnp.float32(0), zeros)
            parts = (parts, jnp.arange(accumulate))
            (loss, count, grads), _ = lax.scan(add, start, parts)
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        metrics = {
            "loss": loss / count,
            "grad_norm": optax.tree.norm(grads),
            "target_tokens": count,
        }
        # Parameters before state: see the note on donation in optim/paged.py.
        return trainable, opt_state, metrics

    return step


def _split_rows(parts: int, x: "Array") -> "Array":
    if x.shape[0] % parts:
        raise ValueError(f"A batch of {x.shape[0]} rows cannot be cut into {parts=}.")
    return x.reshape(parts, -1, *x.shape[1:])


@functools.cache
def _eval_step(chunk_size: int) -> Callable[..., Any]:
    @jax.jit
    def step(graph, state, batch):
        model = nnx.merge(graph, state)
        return next_token_loss_sum(model, batch, remat="none", chunk_size=chunk_size)

    return step


def evaluate(model: Any, batches: Iterable["Batch"], *, chunk_size: int = 512) -> float:
    """Returns the mean loss over all tokens of the batches, in nats.

    Args:
        model: an NNX module with `hidden` and `head`, with adapters or without.
        batches: as `next_token_loss` takes them, best of one shape.
        chunk_size: tokens whose logits are in memory at a time.

    Raises:
        ValueError: if there is no token to predict.
    """
    graph, state = nnx.split(model)
    step = _eval_step(chunk_size)
    sums = [step(graph, state, batch) for batch in batches]
    count = sum(float(count) for _, count in sums)
    if not count:
        raise ValueError("The batches have no token to predict: is the mask all 0?")
    return sum(float(loss) for loss, _ in sums) / count


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


def committed(tree: Any) -> Any:
    """Returns the tree with every array bound to the device it is on.

    What a step returns is bound, since paged state binds it; beginning with arrays that
    are not would compile the step twice.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), tree)


# What may change when a run is taken up again: it changes no number of it.
_FREE = {"save_every", "remat", "chunk_size"}


def check_same_run(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Compares the hyperparameters of a saved run with those of the one going on.

    Raises:
        ValueError: naming what differs.
    """
    now = dataclasses.asdict(config)
    # Without a schedule that ends at the last step, a run may be made longer.
    free = _FREE | ({"steps"} if config.schedule == "constant" else set())
    changed = [
        f"{name}={now[name]!r} (saved: {saved.get(name)!r})"
        for name in now
        if name not in free and now[name] != saved.get(name)
    ]
    if changed:
        raise ValueError(
            f"The saved run has other settings: {', '.join(changed)}. Give the same "
            "ones, or start anew in another folder."
        )
