"""Rows of the kernel table for few rows of x, and for quantize and dequantize.

Registered with `benchmarks.kernels`, which runs them: `--only decoding`, `--only
quantize`.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import held, registry
from pallas_kernels import matvec, quantize_kernel, reference, skinny
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
ROWS = [1, 2, 4, 8, 16, 17, 32, 64, 128]
CACHE_BYTES = 240e6  # four times an H200's L2: no weight is still there
CALLS = 32  # in one program


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
    """Few rows of x, by the kernels for them; with `--tune` the first cuts that fit."""
    shapes = SHAPES[:1] if options.quick else SHAPES
    for k, n in [options.shape] if options.shape else shapes:
        yield from _few_rows(k, n, options)


def _few_rows(k: int, n: int, options: registry.Options) -> Iterator[registry.Row]:
    """All rows of one shape."""
    weights = _weights(k, n)
    spec, packed = weights[0].spec, [w.packed for w in weights]
    bf16_weights = [dequantize(w, jnp.bfloat16).T for w in weights[:8]]
    rows = [m for m in options.rows or ROWS if m <= skinny.MAX_M]
    # One x for all calls: a layer finds its x in the cache.
    xs = {m: jax.random.normal(jax.random.key(m), (m, k), jnp.bfloat16) for m in rows}
    ways = [
        (m, way) for m in rows for way in _ways(m, n, k, packed[0], spec, options.tune)
    ]

    def bf16_program(m):
        return registry.program(_bf16, [xs[m]], bf16_weights, calls=CALLS)

    def our_program(way):
        m, (kernel, cut) = way
        multiply = functools.partial(_multiply, spec, kernel, cut)
        return registry.program(multiply, [xs[m]], packed, calls=CALLS)

    # One by one: cuBLAS refused products that were first run from several threads.
    bf16_runs = {m: bf16_program(m) for m in rows}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = dict(zip(ways, pool.map(our_program, ways), strict=True))
    for (m, (kernel, cut)), run in runs.items():
        read = weights[0].nbytes + 2 * m * (k + n)
        floor = max(2 * m * k * n / options.flops, read / options.bandwidth)
        with registry.alone():
            bf16 = held.seconds(bf16_runs[m], CALLS)
            taken = held.seconds(run, CALLS)
        yield registry.Row(
            op="matmul",
            format="nf4",
            m=m,
            k=k,
            n=n,
            implementation=kernel if cut is None else f"{kernel} {cut}",
            us=taken * 1e6,
            bf16_us=bf16 * 1e6,
            ratio=bf16 / taken,
            error=_error(run()[0], xs[m], weights[0]),
            floor_us=floor * 1e6,
        )


def _bf16(x, w):
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def _multiply(spec, kernel, cut, x, packed):
    if kernel == "skinny":
        return skinny.matmul(x, packed, spec, cut=cut)
    return matvec.matmul(x, packed, spec, tile=cut)


def _quantize(spec, _, w):
    return quantize_kernel.quantize(w, spec)


def _dequantize(spec, _, packed):
    return quantize_kernel.dequantize(packed, spec, jnp.bfloat16)


def _plain_dequantize(spec, _, packed):
    return reference.dequantize(packed, spec, jnp.bfloat16)


def _ways(m, n, k, packed, spec, tune) -> list:
    """Kernels and their cuts: the default, or the dozen likeliest."""
    candidates: dict[str, list] = {"matvec": [None], "skinny": [None]}
    if tune:
        slices = matvec.candidate_slices(m, n, k) if m <= matvec.SLICES_MAX_M else []
        candidates["matvec"] = [*slices, *matvec.candidate_tiles(m, n, k)]
        candidates["skinny"] = skinny.candidate_cuts(m)
    plans = {"matvec": matvec.make_plan, "skinny": skinny.make_plan}
    found = []
    for kernel, cuts in candidates.items():
        fitting = []
        for cut in cuts:
            try:
                plans[kernel](m, jnp.bfloat16, packed, spec, cut)
            except NotImplementedError:
                continue
            fitting.append((kernel, cut))
        found += fitting[:12]
    return found


@registry.register("quantize")
def quantizing(options: registry.Options) -> Iterator[registry.Row]:
    """Quantize, its scales in float32 or quantized too, and dequantize; bfloat16."""
    for k, n in SHAPES[:1] if options.quick else SHAPES:
        weights = _weights(k, n)[:4]
        spec, packed = weights[0].spec, [w.packed for w in weights]
        single = dataclasses.replace(spec, nested_codebook=None)
        full = [dequantize(w, jnp.bfloat16).T for w in weights]
        packed_bytes = 2 + weights[0].nbytes / (n * k)
        ways = {
            ("quantize", "kernel"): (_quantize, single, full, 2.5625),
            ("quantize", "kernel, double"): (_quantize, spec, full, packed_bytes),
            ("dequantize", "kernel"): (_dequantize, spec, packed, packed_bytes),
            ("dequantize", "xla"): (_plain_dequantize, spec, packed, packed_bytes),
        }
        for (op, name), (function, meaning, inputs, bytes_each) in ways.items():
            way = functools.partial(function, meaning)
            calls = 2 * len(inputs)
            run = registry.program(way, [jnp.zeros(())], inputs, calls=calls)
            taken = held.seconds(run, calls)
            floor = n * k * bytes_each / options.bandwidth
            yield registry.Row(
                op=op,
                format="nf4",
                m=0,
                k=k,
                n=n,
                implementation=name,
                us=taken * 1e6,
                bf16_us=None,
                ratio=floor / taken,
                error=None,
                floor_us=floor * 1e6,
            )
