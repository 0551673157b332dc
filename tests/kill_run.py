"""Kills a training run again and again, and holds what it ends with to an unbroken one.

A run of a tiny model that saves after every step is killed (SIGKILL) at random moments,
most of them while a checkpoint is being written, and started again. After each kill all
checkpoints in its folder are read; at the end the adapter must be that of a run nobody
killed, bit for bit, and the metrics must have each step once.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
from flax import nnx

from qlora_jax.callbacks import Callback
from qlora_jax.checkpoint import Checkpoints
from qlora_jax.data import Batches, Example
from qlora_jax.lora import add_lora, split_trainable
from qlora_jax.quant import quantize
from qlora_jax.run import Run
from qlora_jax.train import TrainConfig, fit

CONFIG = TrainConfig(
    rank=4, dropout=0.1, batch_size=4, seq_len=8, steps=60, save_every=1, eval_every=7,
    remat="none", chunk_size=64,
)  # fmt: skip


class Tiny(nnx.Module):
    """As little as `fit` takes: it compiles in a second."""

    def __init__(self):
        key = jax.random.key(0)
        self.embed = nnx.Param(jax.random.normal(key, (64, 64)))
        self.w = nnx.Param(quantize(jax.random.normal(key, (64, 64)) / 8))

    def hidden(self, tokens, segment_ids=None, positions=None, *, remat="none"):
        """Returns hidden states."""
        x = self.embed[...][tokens]
        # An adapter stands in the place of the parameter.
        w = self.w.get_value() if isinstance(self.w, nnx.Variable) else self.w
        return x + x @ w

    def head(self, x):
        """Returns logits."""
        return x @ self.embed[...].T


def batches():
    """Returns the data of the run."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 64, (10, 8)).astype(np.int32)
    examples = [Example(row, np.ones(8, np.float32)) for row in rows]
    return Batches(examples, batch_size=4, seq_len=8)


class Beat(Callback):
    """Tells the one who will kill that training goes on."""

    def __init__(self, path):
        self.path = path

    def step(self, report):
        """Leaves a sign."""
        self.path.touch()


def work(folder: str, cache: str) -> None:
    """Trains in a folder, from where it was left to the end."""
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    path = pathlib.Path(folder)
    run = Run(path / "run", {"steps": CONFIG.steps}, resume=True)
    run.begin()
    model = add_lora(Tiny(), rank=4, alpha=8, dropout=0.1, key=jax.random.key(1))

    def evaluate(model):
        (leaf, *_) = jax.tree.leaves(split_trainable(model)[0])
        return {"eval_loss": float(jnp.sum(jnp.square(leaf)))}

    model = fit(
        model, batches(), CONFIG, run=run, callbacks=[Beat(path / "beat")],
        evaluate=evaluate,
    )  # fmt: skip
    leaves = jax.tree.leaves(split_trainable(model)[0])
    with open(path / "partial", "wb") as file:
        np.savez(file, *map(np.asarray, leaves))
    os.replace(path / "partial", path / "adapter.npz")


@dataclasses.dataclass
class Outcome:
    """What came of it.

    Attributes:
        kills: how often a run was killed while it trained.
        writing: how many of those while a checkpoint was being written.
        checkpoints: how many checkpoints were read afterwards.
        runs: how many runs were finished, each equal to the unbroken one.
    """

    kills: int = 0
    writing: int = 0
    checkpoints: int = 0
    runs: int = 0


def kill_runs(folder: pathlib.Path, kills: int, seed: int = 0) -> Outcome:
    """Runs to the end at least once, with so many kills on the way.

    Raises:
        AssertionError: if a checkpoint cannot be read or an adapter differs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kill_run"])
    rng, outcome = random.Random(seed), Outcome()
    cache = str(folder / "cache")

    def started(place):
        place.mkdir(exist_ok=True)
        process = context.Process(target=work, args=(str(place), cache))
        process.start()
        return process

    whole = started(folder / "whole")
    whole.join()
    assert whole.exitcode == 0
    while outcome.kills < kills or not outcome.runs:
        place = folder / f"killed{outcome.runs}"
        while not (place / "adapter.npz").exists():
            process = started(place)
            beat = place / "beat"
            beat.unlink(missing_ok=True)
            while not beat.exists() and process.is_alive():
                time.sleep(0.001)
            if outcome.kills < kills:
                process.join(rng.uniform(0, 0.4))
                if process.is_alive():
                    process.kill()
                    process.join()
                    outcome.kills += 1
                    checkpoints = place / "run" / "checkpoints"
                    outcome.writing += any(checkpoints.glob("*.orbax-checkpoint-tmp"))
                    outcome.checkpoints += _read_all(checkpoints)
            process.join()
        _check_equal(folder / "whole", place)
        outcome.runs += 1
    return outcome


def _read_all(folder: pathlib.Path) -> int:
    """Reads every checkpoint, without touching the folder; returns how many."""
    found = [path for path in folder.iterdir() if path.name.isdigit()]
    handler = orbax.checkpoint.StandardCheckpointer()
    for path in found:
        arrays = handler.restore(path / "arrays")
        assert arrays and all(np.isfinite(x).all() for x in arrays.values()), path
    assert found or not list(folder.parent.glob("loss.png"))
    return len(found)


def _check_equal(whole: pathlib.Path, broken: pathlib.Path) -> None:
    with np.load(whole / "adapter.npz") as a, np.load(broken / "adapter.npz") as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])

    def lines(folder):
        numbers = Run(folder / "run", {"steps": CONFIG.steps}, resume=True).log.read()
        timed = {"seconds", "tokens_per_s", "peak_gb"}
        return [{k: v for k, v in x.items() if k not in timed} for x in numbers]

    assert lines(whole) == lines(broken)
    assert Checkpoints(broken / "run" / "checkpoints").latest() == CONFIG.steps
