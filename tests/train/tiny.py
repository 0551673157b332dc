"""A tiny model with adapters and its batches, for the tests of training."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.callbacks import Callback
from qlora_jax.data import Batches, Example
from qlora_jax.lora import add_lora
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.quant import quantize
from qlora_jax.train import (
    TrainConfig,
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


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, step):
        self.at = step

    def step(self, report):
        if report.step == self.at:
            raise Killed
