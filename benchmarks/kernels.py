"""Times the kernels against bfloat16 through cuBLAS, in one run on one GPU.

    python -m benchmarks.kernels            every shape, chosen configurations
    python -m benchmarks.kernels --quick    one shape
    python -m benchmarks.kernels --tune     every configuration of the large matmuls

prints a table and writes benchmarks/results/kernels.json (kernels-tune.json). Further
benchmarks register themselves in benchmarks/kernels_*.py.
"""

import argparse
import concurrent.futures
import functools
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

# What is measured against is cuBLAS, which XLA would not always choose.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import registry
from pallas_kernels import matmul_sm90, quantized_matmul, quantized_matmul_dx
from qlora_jax.quant import dequantize, quantize

# k, n of Llama layers
SHAPES = [(4096, 14336), (8192, 28672), (5120, 13824), (4096, 4096), (14336, 4096)]
ROWS = [128, 256, 512, 1024, 2048, 4096, 8192]
CACHE_BYTES = 120e6  # weights are rotated until they exceed this: twice an H200's L2
OPS = {
    "matmul": (quantized_matmul, matmul_sm90.matmul),
    "matmul_dx": (quantized_matmul_dx, matmul_sm90.matmul_dx),
}


@functools.cache
def _weights(k: int, n: int) -> list:
    """Random weights, enough of them that none is in the cache when it is its turn."""
    copies = min(int(CACHE_BYTES // (k * n / 2)) + 2, 32)
    make = jax.jit(lambda key: quantize(jax.random.normal(key, (k, n))))
    return [make(key) for key in jax.random.split(jax.random.key(0), copies)]


@functools.cache
def _exact(k: int, n: int) -> list:
    """The same weights in bfloat16."""
    decode = jax.jit(lambda w: dequantize(w, jnp.bfloat16))
    return [decode(w) for w in _weights(k, n)]


@functools.cache
def _decoded(k: int, n: int) -> np.ndarray:
    """The first of them in float64, on the host."""
    return np.asarray(dequantize(_weights(k, n)[0], jnp.float32), np.float64)


class Problem:
    """One of the ops at one shape, and the programs that are to be compared."""

    def __init__(self, op: str, m: int, k: int, n: int):
        self.op, self.m, self.k, self.n = op, m, k, n
        self.weights = _weights(k, n)
        self.spec = self.weights[0].spec
        self.forward = op == "matmul"
        width = k if self.forward else n
        self.x = jax.random.normal(jax.random.key(m), (m, width), jnp.bfloat16)
        self.flops = 2 * m * k * n
        self.calls = int(np.clip(3e-3 / (self.flops / 700e12 + 5e-6), 3, 48))
        self.programs: dict[str, Callable[[], list]] = {}

    def ways(self, options: registry.Options) -> dict[str, Callable]:
        """What is timed, by name."""
        public, kernel = OPS[self.op]
        spec = self.spec
        names = ["sm90", "two_pass", "xla"]
        if self.m >= 2048:  # what the Ampere kernel is for
            names.append("sm80")
        ways = {
            name: lambda x, p, name=name: public(x, p, spec, implementation=name)
            for name in names
            if name in (options.implementations or names)
        }
        if not options.tune:
            return ways
        configs = [c for c in matmul_sm90.candidates() if c.tile_m < 2 * self.m]
        return {
            f"sm90 {config}": lambda x, p, c=config: kernel(x, p, spec, config=c)
            for config in configs
        } | {name: way for name, way in ways.items() if name == "two_pass"}

    def compile(self, name: str, way: Callable) -> None:
        """Makes a program of a way."""
        packed = [w.packed for w in self.weights]
        self.programs[name] = registry.program(way, [self.x], packed, calls=self.calls)

    def bf16(self) -> Callable[[], list]:
        """The program with the weight in bfloat16, as cuBLAS likes it."""
        contract = ((1,), (0 if self.forward else 1,))
        return registry.program(
            lambda x, w: lax.dot_general(x, w, (contract, ((), ()))),
            [self.x],
            _exact(self.k, self.n),
            calls=self.calls,
        )

    @functools.cached_property
    def expected(self) -> np.ndarray:
        """The first rows in float64."""
        exact = _decoded(self.k, self.n)
        x = np.asarray(self.x[:16], np.float64)
        return x @ (exact if self.forward else exact.T)

    def error(self, y) -> float:
        """Relative error of the first rows."""
        difference = np.asarray(y[:16], np.float64) - self.expected
        return float(np.linalg.norm(difference) / np.linalg.norm(self.expected))

    def floor(self, options: registry.Options) -> float:
        """Seconds that the arithmetic, or the bytes, must take."""
        read = self.weights[0].nbytes + 2 * self.m * (self.k + self.n)
        return max(self.flops / options.flops, read / options.bandwidth)


@registry.register("matmul")
def large_matmuls(options: registry.Options) -> Iterator[registry.Row]:
    """Forward and backward of many rows: every implementation, or configuration."""
    shapes = SHAPES[:1] if options.quick else SHAPES
    shapes = [options.shape] if options.shape else shapes
    rows = options.rows or ([512, 2048] if options.quick else ROWS)
    for k, n in shapes:
        problems = [Problem(op, m, k, n) for m in rows for op in OPS]
        yield from _one_shape(problems, options)


def _one_shape(
    problems: list[Problem], options: registry.Options
) -> Iterator[registry.Row]:
    # Kernels take seconds to compile: side by side, and before anything is measured.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [
            pool.submit(problem.compile, name, way)
            for problem in problems
            for name, way in problem.ways(options).items()
        ]
        for one in compiled:
            one.result()
    for problem in problems:
        problem.expected  # noqa: B018  takes as long on the host
    for problem in problems:
        with registry.alone():
            rows = list(_measure(problem, options))
        yield from rows


def _measure(problem: Problem, options: registry.Options) -> Iterator[registry.Row]:
    bf16, programs = problem.bf16(), problem.programs
    times = registry.compare(
        [bf16, *programs.values()], calls=problem.calls, repeats=options.repeats
    )
    for (name, run), (taken, exact) in zip(programs.items(), times, strict=True):
        yield registry.Row(
            op=problem.op,
            format="nf4",
            m=problem.m,
            k=problem.k,
            n=problem.n,
            implementation=name,
            us=taken * 1e6,
            bf16_us=exact * 1e6,
            ratio=exact / taken,
            error=problem.error(run()[0]),
            floor_us=problem.floor(options) * 1e6,
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
    parser.add_argument("--shape", help="one shape, as 4096x14336: k and n")
    parser.add_argument("--rows", help="of x: 512,2048")
    parser.add_argument("--implementations", help="of the matmuls: sm90,two_pass")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--only", help="the benchmark of this name alone")
    parser.add_argument("--limit", type=float, help="start nothing after so many s")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        sys.exit(f"The kernels need a GPU, not {jax.default_backend()!r}.")
    for path in sorted(pathlib.Path(__file__).parent.glob("kernels_*.py")):
        importlib.import_module(f"benchmarks.{path.stem}")

    start = time.monotonic()
    with registry.alone():  # another shape's may be under way
        bandwidth, flops = ceilings()
    shape = rows = None
    if arguments.shape:
        k, n = map(int, arguments.shape.split("x"))
        shape = k, n
    if arguments.rows:
        rows = tuple(map(int, arguments.rows.split(",")))
    names = arguments.implementations
    options = registry.Options(
        arguments.quick,
        shape,
        rows,
        arguments.tune,
        bandwidth,
        flops,
        tuple(names.split(",")) if names else None,
        arguments.repeats,
    )
    print(f"copies {bandwidth / 1e12:.2f} TB/s, bfloat16 {flops / 1e12:.0f} TFLOP/s")
    print(registry.HEADER, flush=True)
    path, name = None, "kernels-tune" if arguments.tune else "kernels"
    for benchmark_name, benchmark in registry.BENCHMARKS.items():
        if arguments.only not in (None, benchmark_name):
            continue
        for row in benchmark(options):
            print(registry.line(row), flush=True)
            path = registry.write([row], name)  # what is there, should it be stopped
            if arguments.limit and time.monotonic() - start > arguments.limit:
                break
    if path:
        print(path)


if __name__ == "__main__":
    main()
