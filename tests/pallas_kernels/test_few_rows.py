"""What the kernels for few and for tens of rows share."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import few_rows
from tests.pallas_kernels.test_matvec import NESTED, make_weight


@pytest.mark.parametrize(
    "m, dtype, change, message",
    [
        (5, jnp.bfloat16, {}, "m=5 rows of x must be 1 to 4"),
        (0, jnp.bfloat16, {}, "m=0 rows of x must be 1 to 4"),
        (1, jnp.float32, {}, "float32.* of x must be bfloat16 or float16"),
        (1, jnp.float16, {"k": 96}, "k=96 must be a multiple of 64"),
        (1, jnp.float16, {"codebook": NESTED}, "codes of 8 bits must have 4"),
    ],
)
def test_what_neither_can_is_said(m, dtype, change, message):
    spec = dataclasses.replace(make_weight(16, 64)[1], **change)
    with pytest.raises(NotImplementedError, match=message):
        few_rows.check(m, 4, dtype, spec)


def test_operands_are_those_that_the_weight_has():
    x, table = jnp.ones((1, 64)), jnp.ones(3)
    plain, _ = make_weight(16, 64, nested=False)
    assert [*few_rows.operands(x, plain)] == ["x", "codes", "absmax"]
    packed, _ = make_weight(16, 64, layers=2)
    packed = dataclasses.replace(packed, layer=np.int32(1))
    found = few_rows.operands(x, packed, table=table)
    names = "x", "codes", "absmax", "table", "nested_absmax", "offset", "layer"
    assert tuple(found) == names
    assert found["layer"].shape == (1,) and found["offset"].shape == (2,)
