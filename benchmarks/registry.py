"""What the kernel benchmarks share: rows, the table, the JSON, honest timing.

A benchmark is a generator of rows, registered by name:

    @registry.register("matvec")
    def matvec(options: registry.Options) -> Iterator[registry.Row]:
        ...

`benchmarks/kernels.py` runs all of `benchmarks/kernels*.py`.
"""

import dataclasses
import datetime
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        quick: fewer shapes.
        tune: try every configuration, not the chosen one alone.
        bandwidth: of a large copy on this device, bytes read and written a second.
        flops: of a large bfloat16 product on this device, a second.
    """

    quick: bool
    tune: bool
    bandwidth: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        op: "matmul", "matmul_dx", "quantize" or "dequantize".
        format: of the weight.
        m: rows of the activation; 0 where there is none.
        k: input features.
        n: output features.
        implementation: which one, and its configuration if it is not the chosen one.
        us: microseconds.
        bf16_us: of the same product with a bfloat16 weight, by cuBLAS, in the same run.
        ratio: `bf16_us / us`; for quantize and dequantize the share of `bandwidth`.
        error: relative error against float64, None if it was not asked for.
        floor_us: what the arithmetic, or the bytes, must take.
    """

    op: str
    format: str
    m: int
    k: int
    n: int
    implementation: str
    us: float
    bf16_us: float | None
    ratio: float
    error: float | None
    floor_us: float


Benchmark = Callable[[Options], Iterator[Row]]
BENCHMARKS: dict[str, Benchmark] = {}


def register(name: str) -> Callable[[Benchmark], Benchmark]:
    """Adds a benchmark under a name."""

    def add(benchmark: Benchmark) -> Benchmark:
        BENCHMARKS[name] = benchmark
        return benchmark

    return add


def seconds(
    op: Callable,
    activations: Sequence[jax.Array],
    weights: Sequence,
    *,
    calls: int,
    repeats: int = 5,
) -> float:
    """The median time of a call of `op(x, w)`.

    All calls of a repeat are one program, so that the host is not in the way, and each
    takes the next weight: with enough of them none is in the cache. `op` is traced
    once, so that a kernel is compiled once.
    """
    op = jax.jit(op)

    @jax.jit
    def program(activations, weights):
        pairs = len(activations) * len(weights)
        return [
            op(
                activations[i % pairs // len(weights)],
                weights[i % len(weights)],
            )
            for i in range(calls)
        ]

    jax.block_until_ready(program(activations, weights))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(activations, weights))
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


HEADER = (
    f"{'op':<10} {'format':<6} {'m':>5} {'k':>6} {'n':>6} {'us':>9} {'bf16':>9} "
    f"{'ratio':>6} {'floor':>6} {'error':>8}  implementation"
)


def line(row: Row) -> str:
    """A row of the printed table; floor is the share of the floor reached."""
    bf16 = "" if row.bf16_us is None else f"{row.bf16_us:.1f}"
    error = "" if row.error is None else f"{row.error:.1e}"
    return (
        f"{row.op:<10} {row.format:<6} {row.m:>5} {row.k:>6} {row.n:>6} "
        f"{row.us:>9.1f} {bf16:>9} {row.ratio:>6.2f} {row.floor_us / row.us:>6.2f} "
        f"{error:>8}  {row.implementation}"
    )


def write(rows: Sequence[Row], name: str) -> pathlib.Path:
    """Writes `benchmarks/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "machine": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
