"""A small model of the form that adapters are put on: NNX, layers scanned."""

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.quant import quantize

HIDDEN, INNER, LAYERS, VOCAB = 64, 128, 3, 32


class Layer(nnx.Module):
    """Weights of all layers, stacked; called on one slice of them."""

    def __init__(self, key, format=None):
        keys = iter(jax.random.split(key, 8))

        def weight(n_in, n_out):
            w = jax.random.normal(next(keys), (LAYERS, n_in, n_out)) / n_in**0.5
            return nnx.Param(w if format is None else quantize(w, format))

        self.norm = nnx.Param(jnp.ones((LAYERS, HIDDEN)))
        self.q_proj = weight(HIDDEN, HIDDEN)
        self.up_proj = weight(HIDDEN, INNER)
        self.down_proj = weight(INNER, HIDDEN)

    def __call__(self, x):
        x = x * self.norm[...]
        x = x + jnp.tanh(x @ self.q_proj)
        return x + jnp.tanh(x @ self.up_proj) @ self.down_proj


class Model(nnx.Module):
    def __init__(self, key=None, *, format=None, remat=False):
        key = jax.random.key(0) if key is None else key
        keys = jax.random.split(key, 3)
        self.embed = nnx.Param(jax.random.normal(keys[0], (VOCAB, HIDDEN)))
        self.layers = Layer(keys[1], format)
        self.lm_head = nnx.Param(jax.random.normal(keys[2], (HIDDEN, VOCAB)) / 8)
        self.remat = remat

    def __call__(self, tokens):
        graphdef, state = nnx.split(self.layers)

        def body(x, state):
            return nnx.merge(graphdef, state)(x), None

        body = jax.checkpoint(body) if self.remat else body
        x, _ = jax.lax.scan(body, self.embed[...][tokens], state)
        return x @ self.lm_head


def tokens():
    return jnp.arange(24).reshape(4, 6) * 5 % VOCAB
