"""What projections read, from its parts: the gate's arithmetic without a kernel."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.models.inputs import Gated
from tests.pallas_kernels.test_gate_kernel import arrays, assert_follows_the_rule


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_gate_is_rounded_once_backward_and_forward(recomputed, dtype):
    """So that it is the same with the kernel, and under every policy."""
    given = arrays(4096, jnp.dtype(dtype))

    def backward(gate, up, d):
        gradients, whole = Gated(gate, up, recomputed).pull_with_whole(d)
        return gradients.gate, gradients.up, whole

    results = jax.jit(backward)(*map(jnp.asarray, given))
    assert_follows_the_rule(results, given)
    gate, up, _ = map(jnp.asarray, given)
    forward = jax.jit(lambda gate, up: Gated(gate, up, recomputed).whole())(gate, up)
    assert_follows_the_rule((*results[:2], forward), given)
