"""Times the kernels against bfloat16 through cuBLAS, in one run on one GPU.

    python -m benchmarks.kernels            every shape, chosen configurations
    python -m benchmarks.kernels --quick    one shape
    python -m benchmarks.kernels --tune     every configuration of the large matmuls

prints a table and writes benchmarks/results/kernels.json (kernels-tune.json). Further
benchmarks register themselves in benchmarks/kernels_*.py.
"""

import argparse
import dataclasses
import importlib
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import registry
from pallas_kernels import matmul_sm90, quantized_matmul, quantized_matmul_dx
from qlora_jax.quant import dequantize, quantize

# k, n of Llama layers
SHAPES = [(4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672), (5120, 13824)]
ROWS = [128, 256, 512, 1024, 2048, 8192]
CACHE_BYTES = 120e6  # weights are rotated until they exceed this: twice an H200's L2
CONFIGS = [
    matmul_sm90.Config(tile_m=tile_m, stages=stages, permuted=permuted, cluster=cluster)
    for tile_m, stages in ((256, 4), (192, 4), (128, 6), (64, 8))
    for permuted in (4, 2, 1, 0)
    for cluster in (1, 2)
] + [matmul_sm90.Config(raster_width=width, permuted=0) for width in (4, 16)]


@dataclasses.dataclass
class Problem:
    """Weights and activations of one shape, one of the ops, made once."""

    op: str
    m: int
    k: int
    n: int

    def __post_init__(self):
        copies = min(int(CACHE_BYTES // (self.k * self.n / 2)) + 2, 32)
        keys = jax.random.split(jax.random.key(0), copies + 1)
        make = jax.jit(lambda key: quantize(jax.random.normal(key, (self.k, self.n))))
        self.weights = [make(key) for key in keys[1:]]
        self.spec = self.weights[0].spec
        self.forward = self.op == "matmul"
        width = self.k if self.forward else self.n
        self.x = jax.random.normal(keys[0], (self.m, width), jnp.bfloat16)
        self.flops = 2 * self.m * self.k * self.n

    def seconds(self, f, weights) -> float:
        """Time of `f(x, weight)`."""
        calls = int(np.clip(4e-3 / (self.flops / 700e12 + 5e-6), 4, 48))
        return registry.seconds(f, [self.x], weights, calls=calls)

    def bf16_seconds(self) -> float:
        """Time of the product with the weight in bfloat16, as cuBLAS likes it."""
        contract = ((1,), (0 if self.forward else 1,))
        return self.seconds(
            lambda x, w: lax.dot_general(x, w, (contract, ((), ()))),
            [dequantize(w, jnp.bfloat16) for w in self.weights],
        )

    def error(self, f) -> float:
        """Relative error of the first rows against float64."""
        w = self.weights[0]
        y = jax.jit(f)(self.x, w.packed)[:16]
        exact = dequantize(w, jnp.float32)
        with jax.enable_x64(True):
            exact, x, y = (a.astype(jnp.float64) for a in (exact, self.x[:16], y))
            expected = x @ (exact if self.forward else exact.T)
            error = jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
        return float(error)


@registry.register("matmul")
def large_matmuls(options: registry.Options) -> Iterator[registry.Row]:
    """Forward and backward of many rows: the Hopper kernel and the plain form."""
    shapes = SHAPES[1:2] if options.quick else SHAPES
    rows = [512, 2048] if options.quick or options.tune else ROWS
    for k, n in shapes:
        for m in rows:
            for op in ("matmul", "matmul_dx"):
                yield from _products(Problem(op, m, k, n), options)


def _products(problem: Problem, options: registry.Options) -> Iterator[registry.Row]:
    kernel = matmul_sm90.matmul if problem.forward else matmul_sm90.matmul_dx
    public = quantized_matmul if problem.forward else quantized_matmul_dx
    spec = problem.spec
    ways = {
        "sm90": lambda x, p: kernel(x, p, spec),
        "xla": lambda x, p: public(x, p, spec, implementation="xla"),
    }
    if options.tune:
        ways = {
            f"sm90 {config}": lambda x, p, c=config: kernel(x, p, spec, config=c)
            for config in CONFIGS
        }
    bf16 = problem.bf16_seconds()
    packed = [w.packed for w in problem.weights]
    read = problem.weights[0].nbytes + 2 * problem.m * (problem.k + problem.n)
    floor = max(problem.flops / options.flops, read / options.bandwidth)
    for name, way in ways.items():
        taken = problem.seconds(way, packed)
        yield registry.Row(
            op=problem.op,
            format="nf4",
            m=problem.m,
            k=problem.k,
            n=problem.n,
            implementation=name,
            us=taken * 1e6,
            bf16_us=bf16 * 1e6,
            ratio=bf16 / taken,
            error=None if options.tune else problem.error(way),
            floor_us=floor * 1e6,
        )


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, operations a second of a large product."""
    source = jax.random.normal(jax.random.key(0), (2**30,), jnp.bfloat16)
    add = [jnp.bfloat16(i) for i in range(4)]
    copy = registry.seconds(lambda x, c: x + c, [source], add, calls=4)
    square = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    product = registry.seconds(lambda x, w: x @ w, [square], [square], calls=8)
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the kernels.")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--tune", action="store_true", help="every configuration")
    parser.add_argument("--only", help="the benchmark of this name alone")
    parser.add_argument("--limit", type=float, help="start nothing after so many s")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"The kernels need a GPU, not {jax.default_backend()!r}.")
    for path in sorted(pathlib.Path(__file__).parent.glob("kernels_*.py")):
        importlib.import_module(f"benchmarks.{path.stem}")

    start = time.monotonic()
    bandwidth, flops = ceilings()
    options = registry.Options(arguments.quick, arguments.tune, bandwidth, flops)
    print(f"copies {bandwidth / 1e12:.2f} TB/s, bfloat16 {flops / 1e12:.0f} TFLOP/s")
    print(registry.HEADER, flush=True)
    rows = []
    name = "kernels-tune" if arguments.tune else "kernels"
    for benchmark_name, benchmark in registry.BENCHMARKS.items():
        if arguments.only not in (None, benchmark_name):
            continue
        for row in benchmark(options):
            rows.append(row)
            print(registry.line(row), flush=True)
            if arguments.limit and time.monotonic() - start > arguments.limit:
                break
    print(registry.write(rows, name))


if __name__ == "__main__":
    main()
