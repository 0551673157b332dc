"""A QLoRA model in bfloat16 and the plain float32 model that it stands for."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.lora import add_lora, join_trainable, split_trainable
from qlora_jax.models import Llama
from qlora_jax.quant import dequantize, quantize
from qlora_jax.train import next_token_loss


def models(config, rank, embedding=1):
    """Both split: adapters (the same float32 arrays) and the rest.

    Embeddings are multiplied by a number: large ones keep tokens apart from each other.
    Where they are alike, the gradient of attention is a difference of equal numbers.
    """
    low = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    low.embed = nnx.Param(low.embed[...] * embedding)
    high = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    for name in ("embed", "lm_head", "norm"):
        value = getattr(low, name)[...].astype(jnp.float32)
        setattr(high, name, nnx.Param(value))
    for name in config.linear_shapes():
        weight = jax.jit(quantize)(getattr(low.layers, name)[...])
        setattr(low.layers, name, nnx.Param(weight))
        exact = jax.vmap(lambda w: dequantize(w, jnp.float32))(weight)
        setattr(high.layers, name, nnx.Param(exact))
    adapt = functools.partial(add_lora, rank=rank, alpha=rank, key=jax.random.key(1))
    (trainable, frozen), (_, exact) = (split_trainable(adapt(m)) for m in (low, high))
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    # So that both factors of an adapter have gradients.
    moved = [
        x + 0.02 * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return treedef.unflatten(moved), frozen, exact


def gradient(trainable, frozen, batch, *, compiler_options=None, **options):
    """The loss and its gradient with respect to the adapters."""

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def f(trainable, frozen):
        return jax.value_and_grad(
            lambda t: next_token_loss(join_trainable(t, frozen), batch, **options)
        )(trainable)

    return f(trainable, frozen)


def cosines(a, b):
    """The cosine of each pair of leaves, by path."""

    def cosine(x, y):
        x, y = (v.astype(jnp.float32).reshape(-1) for v in (x, y))
        return float(x @ y / (jnp.linalg.norm(x) * jnp.linalg.norm(y)))

    both = zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True)
    return {jax.tree_util.keystr(path): cosine(x, y) for (path, x), y in both}
