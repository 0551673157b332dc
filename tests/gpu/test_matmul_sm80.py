"""The Ampere kernels on a GPU, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul_sm80
from tests.pallas_kernels.test_matvec import decoded, make_weight, relative_error
from tests.tolerances import MATMUL_RELATIVE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize(
    "m, n, k, block_size, nested",
    [
        (1, 1024, 4096, 64, True),
        (300, 1000, 1088, 64, True),
        (2048, 1024, 1024, 64, False),
        (129, 576, 1536, 128, True),
    ],
)
def test_equals_the_product(op, m, n, k, block_size, nested, dtype):
    packed, spec = make_weight(n, k, block_size, nested)
    side = k if op == "matmul" else n
    x = np.random.default_rng(m).normal(size=(m, side)).astype(dtype)
    function = getattr(matmul_sm80, op)
    y = jax.jit(lambda x, p: function(x, p, spec))(
        jnp.asarray(x), jax.tree.map(jnp.asarray, packed)
    )
    weight = decoded(packed, spec)
    expected = x.astype(np.float64) @ (weight.T if op == "matmul" else weight)
    assert relative_error(y, expected) <= MATMUL_RELATIVE[np.dtype(dtype).name]
