import dataclasses

import numpy as np
import pytest

from qlora_jax.models import LlamaConfig

SMALL = LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_layers": 0}, "num_layers=0 must be a positive integer"),
        ({"hidden_size": 32.0}, "hidden_size=32.0 must be a positive integer"),
        ({"head_dim": -8}, "head_dim=-8 must be positive, or 0"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of self.num_kv_heads=3"),
        (
            {"hidden_size": 30, "head_dim": 0},
            "hidden_size=30 is no multiple of self.num_heads=4: give head_dim",
        ),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


def test_shapes_of_the_weights():
    wide = dataclasses.replace(SMALL, head_dim=16)
    shapes = {
        "q_proj": (32, 64), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (64, 32),
        "gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32),
    }  # fmt: skip
    assert wide.linear_shapes() == shapes
    assert SMALL.head_dim == 8 and SMALL.linear_shapes()["q_proj"] == (32, 32)


def test_weights_with_a_bias():
    assert SMALL.biased() == ()
    qkv = dataclasses.replace(SMALL, qkv_bias=True)
    assert qkv.biased() == ("q_proj", "k_proj", "v_proj")
    rest = dataclasses.replace(SMALL, o_bias=True, mlp_bias=True)
    assert rest.biased() == ("o_proj", "gate_proj", "up_proj", "down_proj")


def test_frequencies_are_powers_of_theta():
    expected = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(SMALL.rope_frequencies(), expected, rtol=1e-6)
    assert SMALL.rope_frequencies().dtype == np.float32
