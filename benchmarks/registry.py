"""What the kernel benchmarks share: rows, the table, the JSON, honest timing.

A benchmark is a generator of rows, registered by name:

    @registry.register("matvec")
    def matvec(options: registry.Options) -> Iterator[registry.Row]:
        ...

`benchmarks/kernels.py` runs all of `benchmarks/kernels*.py`.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asks for.

    Attributes:
        quick: fewer shapes.
        shape: this k and n alone, if not None.
        rows: these rows of x alone, if not None.
        tune: try every configuration, not the chosen one alone.
        bandwidth: of a large copy on this device, bytes read and written a second.
        flops: of a large bfloat16 product on this device, a second.
        implementations: of the large matmuls, these alone, if not None.
        repeats: how often each is timed, next to cuBLAS.
    """

    quick: bool
    shape: tuple[int, int] | None
    rows: tuple[int, ...] | None
    tune: bool
    bandwidth: float
    flops: float
    implementations: tuple[str, ...] | None = None
    repeats: int = 5


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


def program(
    op: Callable, activations: Sequence[jax.Array], weights: Sequence, *, calls: int
) -> Callable[[], list]:
    """Compiles `calls` calls of `op(x, w)` into one program, and runs it once.

    So the host is not in the way, and each call takes the next weight: with enough of
    them none is in the cache. Every call has arguments of its own, or the compiler
    would do equal calls once. `op` is traced once, so that a kernel is compiled once.
    """
    op = jax.jit(op)
    pairs = len(activations) * len(weights)
    arguments = [
        (activations[i % pairs // len(weights)], weights[i % len(weights)])
        for i in range(calls)
    ]
    run = jax.jit(lambda arguments: [op(x, w) for x, w in arguments])
    jax.block_until_ready(run(arguments))
    return lambda: run(arguments)


def burst(run: Callable[[], list], times: int) -> float:
    """Seconds of so many runs of a program, one after the other."""
    start = time.perf_counter()
    out = None
    for _ in range(times):
        out = run()
    jax.block_until_ready(out)
    return time.perf_counter() - start


def seconds(
    op: Callable,
    activations: Sequence[jax.Array],
    weights: Sequence,
    *,
    calls: int,
    repeats: int = 5,
) -> float:
    """The median time of a call of `op(x, w)`; see `program`."""
    run = program(op, activations, weights, calls=calls)
    # Enough runs at once that starting the first one does not count.
    times = max(2, round(4e-3 / burst(run, 1)))
    return statistics.median(burst(run, times) / times / calls for _ in range(repeats))


def compare(
    runs: Sequence[Callable[[], list]], *, calls: int, repeats: int = 5
) -> list[tuple[float, float]]:
    """Median times of a call of each program, and of the first one next to it.

    A GPU gets slower as it gets warmer, so each is timed right after the first one.
    """
    times = [[] for _ in runs[1:]]
    for _ in range(repeats):
        for run, own in zip(runs[1:], times, strict=True):
            pair = burst(run, 2), burst(runs[0], 2)
            own.append([x / 2 / calls for x in pair])
    return [
        (statistics.median(a), statistics.median(b))
        for a, b in (zip(*own, strict=True) for own in times)
    ]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keeps other benchmarks of this machine from measuring at the same time.

    Compiling takes longer than measuring: several shapes, each a process, may compile
    side by side.
    """
    path = pathlib.Path(tempfile.gettempdir()) / "kernel-benchmark.lock"
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    """Writes `benchmarks/results/<name>.json`.

    Rows of the same day, device and jax that were not measured again are kept.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {
        "machine": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    new = [dataclasses.asdict(row) for row in rows]
    with alone():
        kept = []
        if path.exists():
            old = json.loads(path.read_text())
            if all(old[key] == value for key, value in document.items()):
                measured = set(map(_key, new))
                kept = [row for row in old["rows"] if _key(row) not in measured]
        every = sorted(kept + new, key=_key)
        path.write_text(json.dumps(document | {"rows": every}, indent=1) + "\n")
    return path


def _key(row: dict) -> tuple:
    names = ("op", "format", "k", "n", "m", "implementation")
    return tuple(row[name] for name in names)
