"""Training a model on several devices: the numbers of one, and its work divided."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from qlora_jax.lora import add_lora, split_trainable
from qlora_jax.models import Llama
from qlora_jax.optim import paged
from qlora_jax.sharding import batch_sharding, committed, make_mesh
from qlora_jax.train import fit, make_train_step, next_token_loss_sum
from tests.lora.test_on_mesh import model
from tests.tolerances import MESH_LOSS_RELATIVE
from tests.train.spread import spread
from tests.train.tiny import SMALL

MESHES = [
    dict(data=4),
    dict(fsdp=4),
    dict(model=2),
    dict(data=2, fsdp=2, model=2),
]
TOKENS = np.random.default_rng(0).integers(0, 96, (8, 24)).astype(np.int32)


def adapted(mesh) -> Llama:
    base = model() if mesh is None else spread(model(), mesh)
    return add_lora(base, rank=4, alpha=8, key=jax.random.key(0))


def begun(mesh, tx, accumulate=1, remat="full"):
    """The step and its arguments."""
    trainable, frozen = committed(split_trainable(adapted(mesh)))
    state = committed(tx.init(trainable))

    def loss_sum(model, batch):
        return next_token_loss_sum(model, batch, remat=remat)

    shardings, batch = None, {"tokens": TOKENS}
    if mesh is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        batch = jax.device_put(batch, batch_sharding(mesh))
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
@pytest.mark.parametrize("is_paged", [True, False], ids=["paged", "plain"])
def test_the_numbers_are_those_of_one_device(sizes, is_paged, alone):
    tx = optax.adam(1e-2)
    tx = paged(tx, min_size=1) if is_paged else tx
    found = losses(make_mesh(**sizes), tx)
    assert alone[-1, 0] < alone[0, 0] - 0.1
    np.testing.assert_allclose(found, alone, rtol=MESH_LOSS_RELATIVE["float32"])


@pytest.mark.parametrize("remat", ["none", "attention", "offload"])
def test_whatever_is_recomputed(remat, alone):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    found = losses(mesh, paged(optax.adam(1e-2), min_size=1), remat=remat)
    np.testing.assert_allclose(found, alone, rtol=MESH_LOSS_RELATIVE["float32"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_each_device_computes_its_rows(axis, accumulate, alone):
    """Of every part, with accumulation: not one part after another on each."""
    tx, mesh = optax.adam(1e-2), make_mesh(**{axis: 4})

    def flops(mesh):
        step, arguments = begun(mesh, tx, accumulate)
        return step.lower(*arguments).compile().cost_analysis()["flops"]

    # What does not depend on rows, decoding weights and the optimizer, is the rest.
    assert flops(mesh) < 0.4 * flops(None)
    found = losses(mesh, tx, accumulate=accumulate)
    np.testing.assert_allclose(found, alone, rtol=MESH_LOSS_RELATIVE["float32"])


class Batches:
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
    trained = [fit(adapted(m), Batches(), config) for m in (None, mesh)]
    for one, other in zip(
        *(jax.tree.leaves(split_trainable(m)[0]) for m in trained), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=1e-2, atol=1e-5)


def test_rows_that_do_not_divide():
    config = dataclasses.replace(SMALL, batch_size=8, accumulate=4)
    words = r"batch_size=8 with accumulate=4 is 2 rows .* multiple of the 4 parts"
    with pytest.raises(ValueError, match=words):
        fit(adapted(make_mesh(data=4)), Batches(), config)
