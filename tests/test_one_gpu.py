"""What JAX is told to see; that it sees one GPU of two is in tests/gpu/test_mesh.py."""

import jax
import pytest
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES as VISIBLE

import qlora_jax as ql
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
