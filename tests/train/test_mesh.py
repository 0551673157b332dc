"""Training a model on several devices: the numbers of one, and its work divided."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from benchmarks.models import spread
from qlora_jax.data import Batches
from qlora_jax.lora import add_lora, join_trainable, split_trainable
from qlora_jax.models import Llama, llama
from qlora_jax.optim import paged
from qlora_jax.run import Run
from qlora_jax.sharding import batch_sharding, committed, make_mesh
from qlora_jax.train import evaluate, fit, make_train_step, next_token_loss_sum
from tests.on_mesh import model
from tests.tolerances import MESH_LOSS_RELATIVE, MESH_TRAINED_RELATIVE
from tests.train.tiny import SMALL, KillAt, Killed, examples

pytestmark = pytest.mark.unoptimized

MESHES = [
    dict(data=4),
    dict(fsdp=4),
    dict(model=2),
    dict(data=2, fsdp=2, model=2),
]
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 24)).astype(np.int32)


# Tokens of each device's rows; 192 tokens on one.
CHUNK = 20


def adapted(mesh) -> Llama:
    base = model() if mesh is None else spread(model(), mesh)
    return add_lora(base, rank=4, alpha=8, key=jax.random.key(0))


def begun(mesh, tx, accumulate=1, remat="full"):
    """The step and its arguments."""
    trainable, frozen = committed(split_trainable(adapted(mesh)))
    state = committed(tx.init(trainable))

    rows = None if mesh is None else batch_sharding(mesh)
    options = dict(remat=remat, chunk_size=CHUNK, rows=rows)
    loss_sum = functools.partial(next_token_loss_sum, **options)
    shardings, batch = None, {"tokens": TOKENS}
    if mesh is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        batch = jax.device_put(batch, rows)
    step = make_train_step(
        tx, accumulate=accumulate, loss_sum=loss_sum, shardings=shardings
    )
    return step, [trainable, state, frozen, batch]


def losses(mesh, *args, steps=3, **options):
    step, (trainable, state, frozen, batch) = begun(mesh, *args, **options)
    found = []
    for _ in range(steps):
        trainable, state, metrics = step(trainable, state, frozen, batch)
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert step._cache_size() == 1  # what it returns lies as what it was given
    if mesh is not None:
        leaves = jax.tree.leaves((trainable, state))
        assert all(x.sharding.device_set == set(mesh.devices.flat) for x in leaves)
    return np.asarray(found)


@pytest.fixture(scope="module")
def alone():
    return losses(None, optax.adam(1e-2))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_numbers_are_those_of_one_device(sizes, alone):
    found = losses(make_mesh(**sizes), paged(optax.adam(1e-2), min_size=1))
    assert alone[-1, 0] < alone[0, 0] - 0.1
    np.testing.assert_allclose(found, alone, rtol=MESH_LOSS_RELATIVE["float32"])


@pytest.mark.parametrize("remat", ["none", "attention", "offload"])
def test_whatever_is_recomputed(remat, alone):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    found = losses(mesh, paged(optax.adam(1e-2), min_size=1), remat=remat)
    np.testing.assert_allclose(found, alone, rtol=MESH_LOSS_RELATIVE["float32"])


@pytest.mark.parametrize("axis, accumulate", [("data", 2), ("fsdp", 1)])
def test_each_device_computes_its_rows(axis, accumulate, alone, monkeypatch):
    """Of each part of a batch, chunk of the MLP and chunk of the loss."""
    monkeypatch.setattr(llama, "_MLP_ROWS", 12)
    tx, mesh = optax.adam(1e-2), make_mesh(**{axis: 4})

    def compiled(mesh):
        step, arguments = begun(mesh, tx, accumulate)
        return step.lower(*arguments).compile()

    whole, own = compiled(None), compiled(mesh)
    # What does not depend on rows, decoding weights and the optimizer, is the rest.
    assert own.cost_analysis()["flops"] < 0.4 * whole.cost_analysis()["flops"]
    text = own.as_text()
    # What was looked up in an embedding whose features are split goes to its rows.
    assert text.count(" all-to-all(") == (axis == "fsdp")
    assert "collective-permute" not in text
    found = losses(mesh, tx, accumulate=accumulate)
    np.testing.assert_allclose(found, alone, rtol=MESH_LOSS_RELATIVE["float32"])


class SameBatch:
    def __iter__(self):
        while True:
            yield {"tokens": TOKENS}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit(accumulate):
    config = dataclasses.replace(
        SMALL,
        dropout=0.0,
        batch_size=8,
        seq_len=24,
        steps=3,
        accumulate=accumulate,
    )
    mesh = make_mesh(data=2, model=2)
    trained = [fit(adapted(m), SameBatch(), config) for m in (None, mesh)]
    for one, other in zip(
        *(jax.tree.leaves(split_trainable(m)[0]) for m in trained), strict=True
    ):
        error = np.linalg.norm(np.asarray(other) - np.asarray(one)) / np.linalg.norm(
            one
        )
        assert error < MESH_TRAINED_RELATIVE


def test_evaluate():
    """Rows that divide over the devices, and rows that do not."""
    batches = [{"tokens": TOKENS}, {"tokens": TOKENS[:3]}]
    one, other = (evaluate(adapted(m), batches) for m in (None, make_mesh(fsdp=4)))
    assert abs(other - one) < MESH_LOSS_RELATIVE["float32"] * one


def test_rows_are_of_no_use_to_a_model_of_another_class():
    class Other:
        """What knows nothing of meshes."""

        def __init__(self, whole):
            self.head = whole.head
            self.hidden = lambda *args, remat: whole.hidden(*args, remat=remat)

    mesh, whole = make_mesh(data=2), adapted(None)
    rows = batch_sharding(mesh)
    found = next_token_loss_sum(Other(whole), {"tokens": TOKENS}, rows=rows)
    np.testing.assert_array_equal(found, next_token_loss_sum(whole, {"tokens": TOKENS}))
    with pytest.raises(ValueError, match="7 rows cannot be split over the 2 parts of"):
        next_token_loss_sum(whole, {"tokens": TOKENS[:7]}, rows=rows)


@pytest.mark.optimized
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """Adapters put on the model by hand, on one device, join the others."""
    mesh = make_mesh(fsdp=2, model=2)
    config = dataclasses.replace(SMALL, seq_len=24, steps=4, save_every=2)

    def run(name, callbacks=()):
        folder = Run(tmp_path / name, {}, resume=True)
        if folder.recorded(step=0) is None:
            folder.record(step=0)
        data = Batches(examples(), batch_size=4, seq_len=24, seed=0)
        adapters = split_trainable(adapted(None))[0]
        whole = join_trainable(adapters, split_trainable(adapted(mesh))[1])
        return fit(whole, data, config, run=folder, callbacks=callbacks)

    unbroken = run("unbroken")
    with pytest.raises(Killed):
        run("broken", [KillAt(3)])
    for one, other in zip(
        *(jax.tree.leaves(split_trainable(m)[0]) for m in (unbroken, run("broken"))),
        strict=True,
    ):
        assert len(other.sharding.device_set) == 4
        np.testing.assert_array_equal(other, one)


def test_rows_that_do_not_divide():
    config = dataclasses.replace(SMALL, batch_size=8, accumulate=4)
    words = r"batch_size=8 with accumulate=4 is 2 rows .* multiple of the 4 parts"
    with pytest.raises(ValueError, match=words):
        fit(adapted(make_mesh(data=4)), SameBatch(), config)
