"""Checkpoints of arrays in pinned host memory, which a GPU's step donates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qlora_jax as ql
from qlora_jax.checkpoint import Checkpoints

pytestmark = pytest.mark.gpu


def test_what_was_saved_can_be_donated(tmp_path):
    tx = ql.paged(optax.adam(0.1), min_size=1)
    params = jax.device_put({"w": jnp.ones((256, 256))}, jax.devices()[0])
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state)
    assert state[0].mu["w"].sharding.memory_kind == "pinned_host"
    expected = jax.tree.map(np.array, params)
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(1, [params, state], {})
    params, state = step(params, state)  # while the checkpoint is being written
    checkpoints.wait()
    saved = checkpoints.restore([params, state]).tree
    np.testing.assert_array_equal(saved[0]["w"], expected["w"])
    assert saved[1][0].mu["w"].sharding.memory_kind == "pinned_host"
    jax.block_until_ready(step(*saved))
