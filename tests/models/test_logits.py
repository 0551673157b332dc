import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.logits import float32_logits
from tests import tolerances

pytestmark = pytest.mark.unoptimized


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [0, 1])
def test_logits_and_their_gradients(axis, dtype):
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(shape) for shape in [(2, 5, 8), (8, 12), (2, 5, 12)])
    expected = x @ w, g @ w.T, np.einsum("btd,btv->dv", x, g)
    weight = jnp.array(w if axis == 0 else w.T, dtype)
    head = lambda x, w: float32_logits(x, w, axis)
    logits, vjp = jax.vjp(head, jnp.array(x, dtype), weight)
    dx, dw = vjp(jnp.array(g, jnp.float32))
    assert logits.dtype == jnp.float32 and dx.dtype == dw.dtype == dtype
    found = logits, dx, dw if axis == 0 else dw.T
    for a, b in zip(found, expected, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
        assert error <= 2 * tolerances.MATMUL_RELATIVE[jnp.dtype(dtype).name]
