import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.callbacks import Callback
from qlora_jax.data import Batches, Example
from qlora_jax.lora import add_lora, split_trainable
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.optim import paged
from qlora_jax.quant import QuantizedTensor, quantize
from qlora_jax.run import Run
from qlora_jax.train import (
    TrainConfig,
    committed,
    evaluate,
    fit,
    make_train_step,
    next_token_loss,
    next_token_loss_sum,
)

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
)
SMALL = TrainConfig(
    rank=4,
    alpha=8,
    dropout=0.1,
    learning_rate=1e-2,
    max_grad_norm=1.0,
    steps=6,
    batch_size=4,
    seq_len=12,
    save_every=2,
    chunk_size=16,
)


def adapted(dropout=0.1, rank=4):
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
        weight = getattr(model.layers, name)[...]
        setattr(model.layers, name, nnx.Param(quantize(weight)))
    return add_lora(model, rank=rank, alpha=8, dropout=dropout, key=jax.random.key(1))


@pytest.fixture(scope="module")
def model():
    return adapted()


def examples(count=12):
    """Sequences that count upwards: easy to learn."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 80, count)
    return [
        Example(np.arange(s, s + 12, dtype=np.int32), np.r_[0.0, 0, np.ones(10)])
        for s in starts
    ]


def batches(seed=0):
    return Batches(examples(), batch_size=4, seq_len=12, seed=seed)


def batch(rows=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "tokens": jnp.array(rng.integers(0, 96, (rows, 12)), jnp.int32),
        "loss_mask": jnp.array(rng.integers(0, 2, (rows, 12)), jnp.float32),
    }


def dense_loss(model, batch):
    """The definition, with all logits at once."""
    logits = model(batch["tokens"], batch.get("segment_ids"), batch.get("positions"))
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probs, batch["tokens"][:, 1:, None], -1)[..., 0]
    mask = batch["loss_mask"][:, 1:]
    return -jnp.sum(picked * mask) / jnp.sum(mask)


@pytest.mark.parametrize("chunk_size", [7, 44, 1000])
def test_the_loss_in_chunks_is_the_loss(model, chunk_size):
    loss = next_token_loss(model, batch(), chunk_size=chunk_size)
    np.testing.assert_allclose(loss, dense_loss(model, batch()), rtol=1e-6)


def test_its_gradient_too(model):
    # Of the embedding, which is the head too; quantized codes have no gradient.
    graph, state, rest = nnx.split(model, lambda path, _: path[0] == "embed", ...)

    def gradient(loss):
        return jax.grad(lambda s: loss(nnx.merge(graph, s, rest), batch()))(state)

    chunked = gradient(functools.partial(next_token_loss, chunk_size=16))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        chunked,
        gradient(dense_loss),
    )


def test_nothing_to_predict_is_loss_0(model):
    empty = batch() | {"loss_mask": jnp.zeros((4, 12))}
    assert next_token_loss(model, empty) == 0


def test_the_mask_is_of_the_token_predicted(model):
    mask = jnp.zeros((4, 12)).at[0, 5].set(1)
    loss = next_token_loss(model, batch() | {"loss_mask": mask})
    logits = model(batch()["tokens"])[0, 4]
    expected = -jax.nn.log_softmax(logits)[batch()["tokens"][0, 5]]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    everything = {"tokens": batch()["tokens"]}
    ones = everything | {"loss_mask": jnp.ones((4, 12))}
    assert next_token_loss(model, everything) == next_token_loss(model, ones)


def test_packed_documents_cost_what_they_cost_alone(model):
    """The first token of a document is predicted by nothing."""
    tokens = batch(rows=2)["tokens"]
    segment_ids = jnp.array([[1] * 5 + [2] * 7, [1] * 12])
    packed = {"tokens": tokens, "segment_ids": segment_ids}
    total, count = next_token_loss_sum(model, packed)
    parts = [tokens[:1, :5], tokens[:1, 5:], tokens[1:]]
    sums = [next_token_loss_sum(model, {"tokens": part}) for part in parts]
    np.testing.assert_allclose(total, sum(s for s, _ in sums), rtol=1e-5)
    assert count == sum(c for _, c in sums) == 4 + 6 + 11


def test_logits_are_never_whole(model):
    """No array of the program has as many numbers as [tokens, vocab]."""
    trainable, frozen = split_trainable(model)
    tx = optax.adam(1e-3)
    loss_sum = functools.partial(next_token_loss_sum, chunk_size=8)
    step = make_train_step(tx, loss_sum=loss_sum)
    wide = batch(rows=32)
    text = step.lower(trainable, tx.init(trainable), frozen, wide).as_text()
    assert f"tensor<8x{CONFIG.vocab_size}xf32>" in text
    assert f"x{CONFIG.vocab_size}xf32>" in text
    whole = {f"tensor<{n}x{CONFIG.vocab_size}xf32>" for n in (32 * 11, 32 * 12)}
    assert not any(shape in text for shape in whole)
    assert f"tensor<32x11x{CONFIG.vocab_size}xf32>" not in text


def test_accumulation_is_normalised_over_all_tokens():
    """Parts with few and with many tokens give the step of the whole batch."""
    model = adapted(dropout=0)
    uneven = batch() | {"loss_mask": jnp.ones((4, 12)).at[:2, 3:].set(0)}
    tx = optax.sgd(1.0)

    def run(parts):
        trainable, frozen = split_trainable(model)
        trainable = jax.tree.map(jnp.copy, trainable)
        step = make_train_step(tx, accumulate=parts)
        trainable, _, metrics = step(trainable, tx.init(trainable), frozen, uneven)
        return trainable, metrics

    (whole, expected), (parts, metrics) = run(1), run(4)
    for name in ("loss", "grad_norm", "target_tokens"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole,
        parts,
    )
    with pytest.raises(ValueError, match="4 rows cannot be cut into parts=3"):
        run(3)


def test_a_step_is_compiled_once_and_donates(model):
    trainable, frozen = split_trainable(model)
    trainable = committed(jax.tree.map(jnp.copy, trainable))
    tx = paged(optax.adam(1e-3), min_size=0)
    step = make_train_step(tx)
    state = committed(tx.init(trainable))
    for seed in range(3):
        old = jax.tree.leaves(trainable)
        key = jax.random.key(seed)
        trainable, state, metrics = step(
            trainable, state, frozen, batch(seed=seed), key
        )
        assert all(leaf.is_deleted() for leaf in old)
    assert step._cache_size() == 1
    assert np.isfinite(metrics["loss"])
    host = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}
    assert host == {"pinned_host"}


class Losses(Callback):
    def __init__(self):
        self.reports = []

    def step(self, report):
        self.reports.append(report)


def test_training_reaches_a_loss():
    model = adapted(dropout=0, rank=16)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    losses = Losses()
    config = dataclasses.replace(SMALL, dropout=0.0, steps=100, rank=16)
    tx = paged(config.optimizer(), min_size=0)
    trained = fit(model, batches(), config, tx, callbacks=[losses])
    assert losses.reports[0].loss > 4  # log(96) = 4.56
    assert losses.reports[-1].loss < 3.6
    assert [r.step for r in losses.reports] == list(range(1, 101))
    assert losses.reports[-1].tokens == 48 and losses.reports[-1].target_tokens == 40
    assert evaluate(trained, [batches().batch(0)]) < 3.6
    # The model that was given is as it was, and the base of the trained one too.
    after = jax.tree.leaves(nnx.state(model))
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    weight = nnx.state(trained)["layers"]["q_proj"]
    assert isinstance(jax.tree.leaves(weight)[0], jax.Array)


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.at = step

    def step(self, report):
        if report.step == self.at:
            raise Killed


def leaves(model):
    return jax.tree.leaves(split_trainable(model)[0])


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    config = dataclasses.replace(SMALL, accumulate=2, schedule="linear")

    def run(name, resume=False, callbacks=()):
        folder = Run(tmp_path / name, {"some": "settings"}, resume=resume)
        if folder.recorded(step=0) is None:
            folder.record(step=0)
        tx = paged(config.optimizer(), min_size=0)
        return fit(adapted(), batches(), config, tx, run=folder, callbacks=callbacks)

    def numbers(name):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        timed = {"seconds", "tokens_per_s"}
        return [{k: v for k, v in line.items() if k not in timed} for line in lines]

    unbroken = run("unbroken")
    for step in (1, 5):  # before the first checkpoint, between two
        with pytest.raises(Killed):
            run("broken", resume=True, callbacks=[KillAt(step)])
    resumed = run("broken", resume=True)
    assert all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(leaves(unbroken), leaves(resumed), strict=True)
    )
    assert numbers("broken") == numbers("unbroken")
    assert [line["step"] for line in numbers("broken")] == list(range(7))
    # A finished run has nothing to do, and gives the same.
    again = run("broken", resume=True)
    assert all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(leaves(again), leaves(resumed), strict=True)
    )


def test_going_on_with_something_else_is_refused(tmp_path):
    def run(config=SMALL, seed=0, model=None, tx=None):
        folder = Run(tmp_path, {}, resume=True)
        folder.record(step=0)
        return fit(model or adapted(), batches(seed), config, tx, run=folder)

    run()
    for change, words in [
        ({"learning_rate": 2e-2}, r"learning_rate=0\.02 \(saved: 0\.01\)"),
        ({"seed": 3}, r"seed=3 \(saved: 0\)"),
        ({"schedule": "linear", "steps": 8}, r"schedule='linear'.*steps=8"),
    ]:
        with pytest.raises(ValueError, match=f"other settings: .*{words}"):
            run(dataclasses.replace(SMALL, **change))
    with pytest.raises(ValueError, match="not those that the saved run was using"):
        run(seed=1)
    with pytest.raises(ValueError, match="is of another model or optimizer"):
        run(tx=optax.sgd(1e-2))
    # Of what changes no number, and of a longer run, nothing is said.
    run(dataclasses.replace(SMALL, steps=8, save_every=3, remat="none"))
    assert Run(tmp_path, {}, resume=True).checkpoints.latest() == 8


def test_schedules():
    def rates(**change):
        config = dataclasses.replace(SMALL, learning_rate=1.0, steps=10, **change)
        return [float(config.learning_rates()(i)) for i in range(10)]

    assert rates() == [1.0] * 10
    line = 1 - np.arange(10) / 10
    np.testing.assert_allclose(rates(schedule="linear"), line, atol=1e-6)
    half_wave = (1 + np.cos(np.pi * np.arange(10) / 10)) / 2
    np.testing.assert_allclose(rates(schedule="cosine"), half_wave, atol=1e-6)
    warm = rates(warmup_steps=4, schedule="linear")
    np.testing.assert_allclose(warm[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(warm[4:], 1 - np.arange(6) / 6, atol=1e-6)
    assert rates(warmup_steps=1)[0] == 1.0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size=6 must be a multiple of"),
        ({"warmup_steps": 9}, "warmup_steps=9 must be at most self.steps=6"),
    ],
)
def test_wrong_settings(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


def test_a_model_is_evaluated_with_adapters_or_without(model):
    plain = Llama(CONFIG, rngs=nnx.Rngs(0))
    parts = [batch(seed=0), batch(seed=1) | {"loss_mask": jnp.ones((4, 12))}]
    sums = [next_token_loss_sum(plain, part) for part in parts]
    expected = sum(float(s) for s, _ in sums) / sum(float(c) for _, c in sums)
    assert evaluate(plain, parts) == pytest.approx(expected, rel=1e-6)
    assert abs(evaluate(model, parts) - expected) < 0.1  # the base in 4 bits
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(plain, [])


def test_the_paper_is_the_default():
    config = TrainConfig()
    assert (config.rank, config.alpha, config.learning_rate) == (64, 16, 2e-4)
    assert (config.b2, config.max_grad_norm, config.batch_size) == (0.999, 0.3, 16)
    assert (config.schedule, config.dropout, config.weight_decay) == (
        "constant",
        0.1,
        0,
    )


def test_codes_stay_codes(model):
    """The frozen part holds packed codes: no weight is dequantized for the gradient."""
    _, (_, rest) = split_trainable(model)
    held = jax.tree.leaves(rest, is_leaf=lambda x: isinstance(x, QuantizedTensor))
    assert sum(isinstance(x, QuantizedTensor) for x in held) == 6
