"""The backward of the gate on the GPU: its numbers, and that it takes no memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gate_kernel import gate_backward
from tests.pallas_kernels.test_gate_kernel import arrays, by_rule
from tests.tolerances import ROUNDED_ONCE_RELATIVE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("size", [8, 8 * 1000, 2048 * 1408, 2**24 + 8 * 77])
def test_each_result_is_the_rule_rounded(size, dtype):
    given = arrays(size, dtype)
    found = jax.jit(gate_backward)(*map(jnp.asarray, given))
    least = max(float(jnp.finfo(dtype).smallest_normal), 1e-36)
    relative = ROUNDED_ONCE_RELATIVE[jnp.dtype(dtype).name]
    for one, expected in zip(found, by_rule(*given), strict=True):
        one = np.asarray(one).astype(np.float64)
        np.testing.assert_allclose(one, expected, rtol=relative, atol=least)


def test_results_take_the_place_of_operands():
    x = jax.ShapeDtypeStruct((2048, 14336), jnp.bfloat16)
    given = jax.jit(gate_backward, donate_argnums=(0, 1, 2)).lower(x, x, x).compile()
    memory = given.memory_analysis()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 1000
