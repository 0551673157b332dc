"""Adapters put on trees and modules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.lora import (
    Frozen,
    LoRAParam,
    LoraTensor,
    add_lora,
    join_trainable,
    split_trainable,
)
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.quant import QuantizedTensor
from tests.lora.models import HIDDEN, LAYERS, Model, tokens
from tests.lora.trees import run_tree, tree

pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(7)


@pytest.mark.optimized
def test_a_tree_gets_adapters_on_its_quantized_weights():
    params = tree()
    adapted = add_lora(params, rank=4, alpha=8, dropout=0.1, key=KEY)
    up = adapted["layers"]["up"]
    assert isinstance(up, LoraTensor) and up.w is params["layers"]["up"]
    assert (up.rank, up.alpha, up.dropout, up.scale) == (4, 8.0, 0.1, 2.0)
    assert up.a.shape == (3, 64, 4) and up.b.shape == (3, 4, 96)
    assert up.a.dtype == up.b.dtype == jnp.float32
    assert not up.b.any() and len({float(a.sum()) for a in up.a}) == 3
    assert adapted["embed"] is params["embed"]
    assert isinstance(params["layers"]["up"], QuantizedTensor)  # stayed as it was
    x = jax.random.normal(KEY, (5, 64))
    np.testing.assert_array_equal(run_tree(adapted, x), run_tree(params, x))


def test_initial_values_depend_on_key_and_path_only():
    one = add_lora(tree(), rank=4, targets="up", key=KEY)["layers"]["up"]
    both = add_lora(tree(), rank=4, key=KEY)["layers"]
    np.testing.assert_array_equal(one.a, both["up"].a)
    assert not np.array_equal(both["up"].a[:, :4, :4], both["down"].a[:, :4, :4])


@pytest.mark.parametrize(
    "targets, wanted",
    [
        (None, {"up", "down"}),
        ("up", {"up"}),
        (["up", "layers/down"], {"up", "down"}),
        (r"layers/(up|down)$", {"up", "down"}),
        (lambda path, w: w.shape[-1] == 64 and "layers" in path, {"down"}),
    ],
)
def test_targets(targets, wanted):
    adapted = add_lora(tree(), rank=4, targets=targets, key=KEY)
    layers = adapted["layers"].items()
    assert {name for name, w in layers if isinstance(w, LoraTensor)} == wanted


def test_rank_and_alpha_by_pattern():
    adapted = add_lora(
        tree(),
        rank=4,
        alpha=8,
        rank_pattern={"up": 2},
        alpha_pattern={"down": 32.0},
        rslora=True,
        key=KEY,
    )["layers"]
    assert (adapted["up"].rank, adapted["up"].scale) == (2, 8 / 2**0.5)
    assert (adapted["down"].rank, adapted["down"].scale) == (4, 16.0)


def test_wrong_targets():
    params = tree()
    fit = "embed, layers/down, layers/up"
    with pytest.raises(ValueError, match=f"targets 'gate' is found in .*: {fit}"):
        add_lora(params, rank=4, targets="gate", key=KEY)
    with pytest.raises(ValueError, match=r"targets 'up' and 'u\.' are both found in"):
        add_lora(params, rank=4, targets=["up", "u."], key=KEY)
    with pytest.raises(ValueError, match=r"targets '\(' is no regular expression"):
        add_lora(params, rank=4, targets="(", key=KEY)
    with pytest.raises(ValueError, match=f"chose no weight of: {fit}"):
        add_lora(params, rank=4, targets=lambda path, w: False, key=KEY)
    with pytest.raises(ValueError, match=f"the model has none. Name some of: {fit}"):
        add_lora(tree(format=None), rank=4, key=KEY)
    with pytest.raises(ValueError, match=r"needs \[\*stack, in, out\]. .*: w"):
        add_lora(
            {"v": jnp.ones(3), "w": jnp.ones((3, 3))},
            rank=1,
            targets=lambda path, w: path == "v",
            key=KEY,
        )
    with pytest.raises(ValueError, match="rank_pattern 'gate' is found in"):
        add_lora(params, rank=4, rank_pattern={"gate": 2}, key=KEY)


def test_wrong_ranks_and_rates():
    with pytest.raises(
        ValueError, match=r"rank=65 of 'layers/down' must be from 1 to 64.*3, 96, 64"
    ):
        add_lora(tree(), rank=65, key=KEY)
    with pytest.raises(ValueError, match="rank=0 of 'layers/down'"):
        add_lora(tree(), rank=0, key=KEY)
    with pytest.raises(ValueError, match=r"dropout=1.0 must be in \[0, 1\)"):
        add_lora(tree(), rank=4, dropout=1.0, key=KEY)
    adapted = add_lora(tree(), rank=4, key=KEY)
    with pytest.raises(ValueError, match="'layers/down' has an adapter already"):
        add_lora(adapted, rank=4, key=KEY)
    with pytest.raises(ValueError, match="holds no adapter: call add_lora first"):
        split_trainable(tree())
    trainable, _ = split_trainable(adapted)
    with pytest.raises(ValueError, match=r"not of one model: .* QuantizedTensor"):
        join_trainable(trainable, tree())


@pytest.mark.optimized
@pytest.mark.parametrize("format", [None, "nf4"])
def test_a_module_gets_adapters(format):
    model = Model(format=format)
    adapted = add_lora(model, rank=4, dropout=0.1, key=KEY)
    up = adapted.layers.up_proj
    assert isinstance(up, LoraTensor) and isinstance(adapted, Model)
    assert isinstance(up.w, Frozen) and isinstance(up.a, LoRAParam)
    assert up.a.get_value().shape == (LAYERS, HIDDEN, 4)
    assert isinstance(model.layers.up_proj, nnx.Param)  # stayed as it was
    assert isinstance(adapted.lm_head, nnx.Param) and adapted.embed is model.embed
    same = jax.tree.map(
        lambda x, y: x is y, up.w.get_value(), model.layers.up_proj.get_value()
    )
    assert all(jax.tree.leaves(same))  # no base weight is copied
    np.testing.assert_array_equal(adapted(tokens()), model(tokens()))
    assert "rank=4" in repr(up)


def test_llama():
    config = LlamaConfig(64, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2)
    config = dataclasses.replace(config, qkv_bias=True)
    model = Llama(config, rngs=nnx.Rngs(0))
    adapted = add_lora(model, rank=4, dropout=0.1, key=KEY)
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    found = {n for n, v in vars(adapted.layers).items() if isinstance(v, LoraTensor)}
    assert found == set(names)
    trainable, frozen = split_trainable(adapted)

    def loss(t, key):
        return (
            join_trainable(t, frozen, key=key).hidden(tokens(), remat="full") ** 2
        ).mean()

    grads = jax.jit(jax.grad(loss))(trainable, KEY)
    assert len(jax.tree.leaves(grads)) == 14
    # b is zero, so only b moves at first.
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(leaf.any()) == ("'b'" in jax.tree_util.keystr(path)), path
