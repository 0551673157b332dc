"""A model whose sizes divide over the devices of a mesh."""

import jax.numpy as jnp
from flax import nnx

from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.quant import quantize

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
)


def model(quantized=True):
    made = Llama(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    for name in CONFIG.linear_shapes() if quantized else ():
        weight = getattr(made.layers, name)[...]
        setattr(made.layers, name, nnx.Param(quantize(weight)))
    return made
