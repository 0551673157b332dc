"""Rows of the kernel table for few rows of x, and for quantize and dequantize.

Registered with `benchmarks.kernels`, which runs them: `--only decoding`, `--only
quantize`.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import registry
from pallas_kernels import matvec, quantize_kernel
from qlora_jax.quant import dequantize, quantize

# k, n of Llama layers
SHAPES = [
    (4096, 14336),
    (14336, 4096),
    (4096, 4096),
    (8192, 28672),
    (28672, 8192),
    (5120, 13824),
]
ROWS = [1, 2, 4, 8, 16, 32]
CACHE_BYTES = 240e6  # four times an H200's L2: no weight is still there
CALLS = 32  # in one program, at most one for each pair of x and weight


def _weights(k: int, n: int) -> list:
    copies = int(np.clip(CACHE_BYTES // (k * n / 2), 3, 32))
    make = jax.jit(lambda key: quantize(jax.random.normal(key, (k, n))))
    return [make(key) for key in jax.random.split(jax.random.key(0), copies)]


def _error(y, x, weight) -> float:
    exact = dequantize(weight, jnp.float32)
    with jax.enable_x64(True):
        exact, x, y = (a.astype(jnp.float64) for a in (exact, x, y))
        expected = x @ exact
        error = jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
    return float(error)


@registry.register("decoding")
def decoding(options: registry.Options) -> Iterator[registry.Row]:
    """Few rows of x: the streaming kernel, with `--tune` the first tiles that fit."""
    for k, n in SHAPES[:1] if options.quick else SHAPES:
        weights = _weights(k, n)
        spec, packed = weights[0].spec, [w.packed for w in weights]
        bf16_weights = [dequantize(w, jnp.bfloat16).T for w in weights[:8]]
        for m in ROWS:
            x = jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16)
            # Different activations, or the products of one weight would be merged.
            xs = [x * (1 + i) for i in range(4)]
            bf16 = registry.seconds(
                lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
                xs,
                bf16_weights,
                calls=min(CALLS, len(xs) * len(bf16_weights)),
            )
            read = weights[0].nbytes + 2 * m * (k + n)
            floor = max(2 * m * k * n / options.flops, read / options.bandwidth)
            for tile in _tiles(m, n, k, packed[0], spec, options.tune):
                way = functools.partial(_multiply, spec, tile)
                calls = min(CALLS, len(xs) * len(packed))
                taken = registry.seconds(way, xs, packed, calls=calls)
                yield registry.Row(
                    op="matmul",
                    format="nf4",
                    m=m,
                    k=k,
                    n=n,
                    implementation="matvec" if tile is None else f"matvec {tile}",
                    us=taken * 1e6,
                    bf16_us=bf16 * 1e6,
                    ratio=bf16 / taken,
                    error=_error(jax.jit(way)(x, packed[0]), x, weights[0]),
                    floor_us=floor * 1e6,
                )


def _multiply(spec, tile, x, packed):
    return matvec.matmul(x, packed, spec, tile=tile)


def _quantize(spec, _, w):
    return quantize_kernel.quantize(w, spec)


def _dequantize(spec, _, packed):
    return quantize_kernel.dequantize(packed, spec, jnp.bfloat16)


def _tiles(m, n, k, packed, spec, tune) -> list:
    """The default alone, or the dozen candidates before the least likely ones."""
    if not tune:
        return [None]
    fitting = []
    for tile in matvec.candidate_tiles(m, n, k):
        try:
            matvec.make_plan(m, jnp.bfloat16, packed, spec, tile)
        except NotImplementedError:
            continue
        fitting.append(tile)
    return fitting[:12]


@registry.register("quantize")
def quantizing(options: registry.Options) -> Iterator[registry.Row]:
    """Quantize (codes and float32 scales) and dequantize, bfloat16 on one side."""
    for k, n in SHAPES[:1] if options.quick else SHAPES:
        weights = _weights(k, n)[:4]
        spec, packed = weights[0].spec, [w.packed for w in weights]
        single = dataclasses.replace(spec, nested_codebook=None)
        full = [dequantize(w, jnp.bfloat16).T for w in weights]
        ways = {
            "quantize": (functools.partial(_quantize, single), full, 2.5625),
            "dequantize": (
                functools.partial(_dequantize, spec),
                packed,
                2 + weights[0].nbytes / (n * k),
            ),
        }
        for op, (way, inputs, bytes_each) in ways.items():
            taken = registry.seconds(way, [jnp.zeros(())], inputs, calls=len(inputs))
            floor = n * k * bytes_each / options.bandwidth
            yield registry.Row(
                op=op,
                format="nf4",
                m=0,
                k=k,
                n=n,
                implementation="kernel",
                us=taken * 1e6,
                bf16_us=None,
                ratio=floor / taken,
                error=None,
                floor_us=floor * 1e6,
            )
