"""Models of well-known shapes with random 4-bit weights, made on the device.

Speed and memory do not depend on what the weights are, so none is downloaded.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from qlora_jax import Llama, LlamaConfig, QuantizedTensor
from qlora_jax.interop.build import weight_shardings
from qlora_jax.quant import quantize


def _llama(hidden, intermediate, layers, heads, kv_heads, vocab=32000) -> LlamaConfig:
    theta = 10_000.0 if vocab == 32000 else 500_000.0
    return LlamaConfig(
        vocab, hidden, intermediate, layers, heads, kv_heads, rope_theta=theta
    )


SHAPES = {
    "LLaMA-7B": _llama(4096, 11008, 32, 32, 32),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128_256),
    "LLaMA-13B": _llama(5120, 13824, 40, 40, 40),
    "LLaMA-33B": _llama(6656, 17920, 60, 52, 52),
    "LLaMA-65B": _llama(8192, 22016, 80, 64, 64),
    "Llama-3-70B": _llama(8192, 28672, 80, 64, 8, 128_256),
}


def random_quantized(key: jax.Array, shape: tuple[int, int, int]) -> QuantizedTensor:
    """A stack [layers, in, out] of NF4 weights of deviation about 1 / sqrt(in)."""
    layers, k, n = shape
    # What one tiny weight tells of all: its static fields.
    like = quantize(jnp.zeros((k, 64), jnp.bfloat16))
    blocks = n * k // like.block_size
    # NF4 codes drawn evenly have a deviation of half their scale.
    absmax = 2.0 * k**-0.5

    def codes_and_scales(key):
        first, second = jax.random.split(key)
        codes = jax.random.bits(first, (n, k // 2), jnp.uint8)
        return codes, jax.random.bits(second, (n, k // like.block_size), jnp.uint8)

    # A layer after the other: the words that bytes are cut from are large.
    codes, scales = jax.lax.map(codes_and_scales, jax.random.split(key, layers))
    return QuantizedTensor(
        codes=codes,
        absmax=scales,
        nested_absmax=jnp.full((layers, -(-blocks // 256)), 0.2 * absmax),
        offset=jnp.full((layers,), absmax, jnp.float32),
        layer=None,
        format=like.format,
        nested_format=like.nested_format,
        in_features=k,
        out_features=n,
        block_size=like.block_size,
        dtype=like.dtype,
    )


def random_model(config: LlamaConfig, seed: int = 0) -> Llama:
    """A Llama whose linear weights are in NF4, the rest in bfloat16."""
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    key = jax.random.key(seed)
    make = jax.jit(random_quantized, static_argnums=1)
    for i, (name, shape) in enumerate(config.linear_shapes().items()):
        weight = make(jax.random.fold_in(key, i), (config.num_layers, *shape))
        setattr(model.layers, name, nnx.Param(weight))

    def fill(path, variable):
        value = variable.get_value()
        if not isinstance(value, jax.ShapeDtypeStruct):
            return variable
        if "norm" in str(path[-1]):
            return variable.replace(jnp.ones(value.shape, value.dtype))
        own = jax.random.fold_in(key, hash_of(path))
        return variable.replace(_normal(own, value.shape, value.dtype))

    graph, state = nnx.split(model)
    return nnx.merge(graph, nnx.map_state(fill, state))


def spread(model: Llama, mesh: Mesh) -> Llama:
    """The model with each weight in its parts, as `load_model(mesh=)` puts them."""
    model = nnx.merge(*nnx.split(model))
    for holder, stack in ((model, 0), (model.layers, 1)):
        for name, variable in vars(holder).items():
            if isinstance(variable, nnx.Param):
                value = variable.get_value()
                where = weight_shardings(mesh, name, value, stack)
                setattr(holder, name, nnx.Param(jax.device_put(value, where)))
    return model


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, int], dtype) -> jax.Array:
    """Normal numbers of deviation 0.02, a part of the rows at a time."""
    parts = math.gcd(shape[0], 64)

    def rows(key):
        return jax.random.normal(key, (shape[0] // parts, shape[1]), dtype) * 0.02

    return jax.lax.map(rows, jax.random.split(key, parts)).reshape(shape)


def hash_of(path) -> int:
    """A number of a path that is the same in every process."""
    return sum(ord(c) * 31**i for i, c in enumerate(str(path))) % 2**31
