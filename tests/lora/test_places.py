"""Paths of weights, and replacing them, in trees and in modules of odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.lora import LoraTensor, add_lora, join_trainable, split_trainable
from qlora_jax.lora.places import listed, named_weights, replace_weights
from qlora_jax.quant import quantize, quantize_tree

KEY = jax.random.key(0)


class Nested(nnx.Module):
    """Weights in a list of modules, in a list of Params and in a dict."""

    def __init__(self):
        self.blocks = nnx.List([Block(), Block()])
        self.heads = nnx.List([nnx.Param(jnp.ones((8, 4))) for _ in range(2)])
        self.table = nnx.Dict(one=nnx.Param(jnp.ones((8, 4))))
        self.count = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        for block in self.blocks:
            x = x @ block.w_proj
        return x @ self.heads[0] + x @ self.heads[1] + x @ self.table["one"]


class Block(nnx.Module):
    def __init__(self):
        self.w_proj = nnx.Param(jnp.eye(8))


def test_paths_of_a_tree_are_those_of_quantize_tree():
    tree = {"a": [jnp.ones((64, 64)), quantize(jnp.ones((64, 64)))], "n": 3}
    assert list(named_weights(tree)) == ["a/0", "a/1"]
    assert quantize_tree({"a": tree["a"][:1]}, {"a/0": "nf4"})
    assert replace_weights(tree, {"a/1": None})["a"][1] is None


def test_a_module_of_lists_and_dicts():
    model = Nested()
    paths = ["blocks/0/w_proj", "blocks/1/w_proj", "heads/0", "heads/1", "table/one"]
    assert sorted(named_weights(model)) == paths
    targets = "blocks/.|heads/1|table"
    adapted = add_lora(model, rank=2, targets=targets, key=KEY)
    found = {p for p, w in named_weights(adapted).items() if isinstance(w, LoraTensor)}
    assert found == set(paths) - {"heads/0"}
    x = jnp.ones((3, 8))
    np.testing.assert_array_equal(adapted(x), model(x))
    trainable, frozen = split_trainable(adapted)
    assert len(jax.tree.leaves(trainable)) == 8
    moved = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    gradients = jax.grad(lambda t: join_trainable(t, frozen)(x).sum())(moved)
    assert all(bool(leaf.any()) for leaf in jax.tree.leaves(gradients))


def test_metadata_of_the_variable_is_kept():
    model = Block()
    model.w_proj = nnx.Param(jnp.eye(8), note="mine")
    adapted = add_lora(model, rank=2, key=KEY)
    assert adapted.w_proj.w.get_metadata()["note"] == "mine"


def test_long_lists_are_cut():
    assert listed([str(i) for i in range(14)]).endswith("10, 11 and 2 more")
    assert listed([]) == "none"


def test_numpy_arrays_are_arrays():
    tree = {"embed": np.ones((8, 4), np.float32), "w_proj": np.ones((8, 8), np.float32)}
    adapted = add_lora(tree, rank=2, key=KEY)
    assert isinstance(adapted["embed"], np.ndarray)
    x = np.ones((3, 8), np.float32)
    np.testing.assert_array_equal(x @ adapted["w_proj"], x @ tree["w_proj"])
