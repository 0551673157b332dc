import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.quant import QuantizedTensor, quantize_tree


def tree():
    return {
        "embed": jnp.ones((64, 64)),
        "layers": {"q_proj": jnp.ones((2, 64, 64)), "down_proj": jnp.ones((64, 64))},
        "norm": jnp.ones(64),
    }


def test_first_rule_decides():
    out = quantize_tree(
        tree(),
        {
            "embed|norm": None,
            "down_proj": {"format": "int8", "block_size": 32, "double_quant": False},
            "_proj$": "nf4",
        },
    )
    assert isinstance(out["embed"], jnp.ndarray)
    assert out["layers"]["q_proj"].format.name == "nf4"
    assert out["layers"]["q_proj"].shape == (2, 64, 64)
    down = out["layers"]["down_proj"]
    assert (down.format.name, down.block_size, down.nested_absmax) == ("int8", 32, None)


def test_leaves_without_a_rule_stay():
    params = tree()
    out = quantize_tree(params, {"q_proj": "nf4"})
    assert out["norm"] is params["norm"]


def test_nnx_module():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (64, 8)))
            self.scale = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            return (x @ self.first[...]) * self.scale[...]

    model = Model(nnx.Rngs(0))
    quantized = quantize_tree(model, {"first": "nf4"})
    assert isinstance(quantized, Model)
    assert isinstance(quantized.first.get_value(), QuantizedTensor)
    x = jnp.ones((2, 64))
    # NF4 rounds each of the 64 terms of a sum by 0.1 of its size, at random.
    error = np.abs(quantized(x) - model(x)).max()
    assert 0 < error < 3


def test_rule_that_finds_nothing():
    with pytest.raises(ValueError, match=r"No leaf is decided by \['k_proj'\]. The pa"):
        quantize_tree(tree(), {"k_proj": "nf4"})


def test_rule_hidden_by_an_earlier_one():
    with pytest.raises(ValueError, match="'q_proj' is found only where an earlier rul"):
        quantize_tree(tree(), {"_proj": "nf4", "q_proj": "int8"})


def test_leaf_that_cannot_be_quantized():
    with pytest.raises(
        ValueError, match=r"norm \(rule 'norm'\): A weight has at least"
    ):
        quantize_tree(tree(), {"norm": "nf4"})


def test_twice():
    once = quantize_tree(tree(), {"q_proj": "nf4"})
    with pytest.raises(ValueError, match=r"layers/q_proj is quantized already"):
        quantize_tree(once, {"q_proj": "nf4"})


def test_unknown_format():
    with pytest.raises(ValueError, match="Unknown format 'nf5'"):
        quantize_tree(tree(), {"q_proj": "nf5"})
