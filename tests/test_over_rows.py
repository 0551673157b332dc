import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.over_rows import over_rows
from tests.tolerances import MATMUL_RELATIVE


@pytest.mark.parametrize("batch", [(48,), (2, 3, 8)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_sums_over_all_rows_in_float32(batch, dtype):
    x, y = (
        jax.random.normal(jax.random.key(seed), (*batch, size), dtype)
        for seed, size in enumerate((5, 7))
    )
    found = over_rows(x, y)
    assert found.shape == (5, 7) and found.dtype == jnp.float32
    wide = [np.asarray(one, np.float64).reshape(48, -1) for one in (x, y)]
    wanted = wide[0].T @ wide[1]
    # The numbers are of `dtype`, their products and sum are not rounded to it.
    relative = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert relative < MATMUL_RELATIVE["float32"]
