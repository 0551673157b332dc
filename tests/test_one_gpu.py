"""What JAX is told to see; that it sees one GPU of two is in tests/gpu/test_mesh.py."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES as VISIBLE

import qlora_jax as ql
from qlora_jax import one_gpu, sharding
from qlora_jax.cli.main import main


@pytest.fixture(autouse=True)
def nobody_has_chosen(monkeypatch):
    monkeypatch.delenv("JAX_CUDA_VISIBLE_DEVICES", raising=False)
    before = VISIBLE.value
    jax.config.update("jax_cuda_visible_devices", "all")
    yield
    jax.config.update("jax_cuda_visible_devices", before)


def test_the_first_of_the_visible():
    ql.use_one_gpu()
    assert VISIBLE.value == "0"


def test_who_has_chosen_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_CUDA_VISIBLE_DEVICES", "all")
    ql.use_one_gpu()
    assert VISIBLE.value == "all"


def test_commands_take_one():
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert VISIBLE.value == "0"


def test_a_model_on_one_of_several_is_told_of(monkeypatch):
    alone = {"w": jnp.zeros(8), "n": 3}
    mesh = sharding.make_mesh(data=jax.device_count())
    spread = jax.device_put(jnp.zeros(8), sharding.batch_sharding(mesh))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_gpu.warn_of_others(alone)  # no GPU
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        one_gpu.warn_of_others(spread)
        monkeypatch.setattr(jax, "device_count", lambda: 1)
        one_gpu.warn_of_others(alone)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.warns(UserWarning, match=r"one GPU and JAX sees 4.*use_one_gpu\(\)"):
        one_gpu.warn_of_others(alone)
