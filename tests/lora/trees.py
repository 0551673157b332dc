"""A plain tree of the form that adapters are put on, its weights stacked."""

import jax
import jax.numpy as jnp

from qlora_jax.quant import quantize


def tree(format="nf4"):
    keys = jax.random.split(jax.random.key(0), 3)

    def weight(key, *shape):
        w = jax.random.normal(key, shape) / 8
        return w if format is None else quantize(w, format)

    return {
        "embed": jax.random.normal(keys[0], (32, 64)),
        "layers": {
            "up": weight(keys[1], 3, 64, 96),
            "down": weight(keys[2], 3, 96, 64),
            "up_bias": jnp.zeros((3, 96)),
        },
    }


def run_tree(params, x):
    def body(x, layer):
        hidden = jnp.tanh(x @ layer["up"] + layer["up_bias"])
        return x + hidden @ layer["down"], None

    return jax.lax.scan(body, x, params["layers"])[0]


def perturbed(trainable, seed=0):
    """The trainable part with every leaf moved, so that no b is zero."""
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)
