"""The Ampere kernels on a GPU, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul_sm80, tuning
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


@pytest.mark.parametrize("op", ["matmul", "matmul_dx"])
@pytest.mark.parametrize("available", [166912, 101376], ids=["as 8.0", "as 8.6"])
@pytest.mark.parametrize("m, n, k", [(2048, 4096, 4096), (300, 1000, 1088)])
def test_equals_the_product_in_the_shared_memory_of_others(
    monkeypatch, op, available, m, n, k
):
    monkeypatch.setattr(tuning, "shared_memory", lambda: available)
    packed, spec = make_weight(n, k)
    side = k if op == "matmul" else n
    x = np.random.default_rng(m).normal(size=(m, side)).astype(jnp.bfloat16)
    function = getattr(matmul_sm80, op)
    run = jax.jit(lambda x, p: function(x, p, spec))
    y = run(jnp.asarray(x), jax.tree.map(jnp.asarray, packed))
    weight = decoded(packed, spec)
    expected = x[-50:].astype(np.float64) @ (weight.T if op == "matmul" else weight)
    assert relative_error(y[-50:], expected) <= MATMUL_RELATIVE["bfloat16"]
    again = run(jnp.asarray(x), jax.tree.map(jnp.asarray, packed))
    assert jnp.array_equal(y, again)
