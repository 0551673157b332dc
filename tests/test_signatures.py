import jax.numpy as jnp
import pytest

import qlora_jax as ql
from tests.conftest import SIGNATURES_ARE_CHECKED


@pytest.mark.skipif(
    not SIGNATURES_ARE_CHECKED, reason="beartype or jaxtyping is not installed"
)
def test_shapes_and_types_are_checked():
    import jaxtyping

    absmax = jnp.ones(1)
    with pytest.raises(jaxtyping.TypeCheckError, match="codes"):
        ql.quant.dequantize_blockwise(
            jnp.zeros(64, jnp.int32), absmax, "int8", block_size=64
        )
