"""Initial values of adapters beside a model that fills the device."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.lora import initial

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_lean_values_are_drawn_without_the_float32_ones_in_memory(init):
    layers, n_in, rank, n_out = shape = (4, 8192, 64, 1024)
    lowered = initial._drawn.lower(
        jax.random.key(0), init, shape, jnp.dtype(jnp.bfloat16)
    )
    memory = lowered.compile().memory_analysis()
    both = 2 * layers * rank * (n_in + n_out)
    assert both <= memory.output_size_in_bytes < 1.01 * both
    assert memory.temp_size_in_bytes < 0.01 * both
