"""Side by side with bitsandbytes: a linear layer in NF4, double-quantized.

    python -m benchmarks.kernels_bitsandbytes

times, in one run on one GPU, `bitsandbytes.nn.Linear4bit` in a CUDA graph,
`quantized_matmul` in a jitted program, and for each the same product with a bfloat16
weight in its own framework. Every call takes another weight, so that none is in the
cache. Prints a table and writes benchmarks/results/kernels-bitsandbytes.json.
"""

import datetime
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some
# Large products by cuBLAS on both sides, as `step_options` asks for in training.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
)

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import held, registry
from pallas_kernels import quantized_matmul
from qlora_jax.quant import dequantize, quantize

K, N = 4096, 14336
ROWS = [1, 4, 16, 64, 256, 512, 2048, 8192]
COPIES = 8  # 235 MB of codes, four times an H200's L2
REPLAYS, REPEATS = 4, 5  # of a program at a time, of a measurement


Timer = Callable[[], float]  # seconds of a call


def torch_timers() -> dict[int, tuple[Timer, Timer]]:
    """By rows: of Linear4bit, and of a bfloat16 linear layer, each in a CUDA graph."""
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    def quantized():
        weight = torch.randn(N, K, dtype=torch.bfloat16) * 0.02
        layer = bnb.nn.Linear4bit(
            K,
            N,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
        )
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        return layer.cuda()

    def timer(calls) -> Timer:
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()

        def seconds() -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(REPLAYS):
                graph.replay()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / (REPLAYS * len(calls))

        return seconds

    layers = [quantized() for _ in range(COPIES)]
    dense = [
        torch.randn(N, K, dtype=torch.bfloat16, device="cuda") for _ in range(COPIES)
    ]
    timers = {}
    with torch.no_grad():
        for m in ROWS:
            x = torch.randn(m, K, dtype=torch.bfloat16, device="cuda")
            linear = torch.nn.functional.linear
            timers[m] = (
                timer([functools.partial(layer, x) for layer in layers]),
                timer([functools.partial(linear, x, w) for w in dense]),
            )
    return timers


def jax_timer(op, m, weights) -> Timer:
    """Of few rows on a device that does not wait for the host."""
    x = [jax.random.normal(jax.random.key(m), (m, K), jnp.bfloat16)]
    program = registry.program(op, x, weights, calls=COPIES)
    if m > 64:
        return lambda: registry.burst(program, REPLAYS) / (REPLAYS * COPIES)
    return lambda: held.seconds(program, COPIES)


def main() -> None:
    for name in ("torch", "bitsandbytes"):
        if importlib.util.find_spec(name) is None:
            sys.exit(
                f"Skipped: {name} is not installed, and there is nothing beside it."
            )
    if jax.default_backend() != "gpu":
        sys.exit(f"Skipped: it needs a GPU, not {jax.default_backend()!r}.")
    import bitsandbytes  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    theirs = torch_timers()
    make = jax.jit(lambda key: quantize(jax.random.normal(key, (K, N))))
    weights = [make(key) for key in jax.random.split(jax.random.key(0), COPIES)]
    dense = [jax.jit(lambda w: dequantize(w, jnp.bfloat16).T)(w) for w in weights]
    spec, packed = weights[0].spec, [w.packed for w in weights]
    rows = []
    print(f"{'m':>5} {'us':>9} {'bitsandbytes us':>16} {'ratio':>6} {'bf16 us':>9}")
    for m in ROWS:
        timers = (
            jax_timer(lambda x, p: quantized_matmul(x, p, spec), m, packed),
            theirs[m][0],
            jax_timer(
                lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))), m, dense
            ),
            theirs[m][1],
        )
        # In turn: a GPU gets slower as it gets warmer.
        turns = [[timer() for timer in timers] for _ in range(REPEATS)]
        ours, peer, bf16, peer_bf16 = map(statistics.median, zip(*turns, strict=True))
        row = {
            "m": m,
            "k": K,
            "n": N,
            "us": ours * 1e6,
            "bitsandbytes_us": peer * 1e6,
            "ratio": peer / ours,
            "bf16_us": bf16 * 1e6,
            "torch_bf16_us": peer_bf16 * 1e6,
        }
        rows.append(row)
        print(
            f"{m:>5} {ours * 1e6:>9.1f} {peer * 1e6:>16.1f} {peer / ours:>6.2f} "
            f"{bf16 * 1e6:>9.1f}",
            flush=True,
        )
    document = {
        "machine": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "date": datetime.date.today().isoformat(),
        "format": "nf4, double-quantized",
        "rows": rows,
    }
    registry.RESULTS.mkdir(exist_ok=True)
    path = registry.RESULTS / "kernels-bitsandbytes.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
