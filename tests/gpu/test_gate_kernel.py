"""The backward of the gate on the GPU: its numbers, and that it takes no memory."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.gate_kernel import gate_backward
from tests.pallas_kernels.test_gate_kernel import arrays, assert_follows_the_rule

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("size", [16, 8 * 1000, 2048 * 1408, 2**24 + 8 * 77])
def test_each_result_is_the_rule_rounded(size, dtype):
    given = arrays(size, jnp.dtype(dtype))
    assert_follows_the_rule(jax.jit(gate_backward)(*map(jnp.asarray, given)), given)


@pytest.mark.parametrize("way", ["scan", "vmap"])
def test_slices_of_a_stack_are_operands_like_others(way):
    """XLA would read such a slice where it lies, and lose what is written there."""
    given = [x.reshape(3, -1, 128) for x in arrays(3 * 2**20, jnp.dtype(jnp.bfloat16))]
    if way == "vmap":
        f = jax.vmap(gate_backward)
    else:
        f = lambda *stacks: jax.lax.map(lambda xs: gate_backward(*xs), stacks)
    assert_follows_the_rule(jax.jit(f)(*map(jnp.asarray, given)), given)


def test_results_take_the_place_of_operands():
    x = jax.ShapeDtypeStruct((2048, 14336), jnp.bfloat16)
    given = jax.jit(gate_backward, donate_argnums=(0, 1, 2)).lower(x, x, x).compile()
    memory = given.memory_analysis()
    assert memory.alias_size_in_bytes == 3 * 2 * x.size
    assert memory.temp_size_in_bytes < 1000
