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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs some

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import held, registry
from pallas_kernels import quantized_matmul
from qlora_jax.quant import dequantize, quantize

K, N = 4096, 14336
ROWS = [1, 4, 16, 64, 256, 512, 2048, 8192]
COPIES = 8  # 235 MB of codes, four times an H200's L2


def bitsandbytes_seconds() -> dict[int, tuple[float, float]]:
    """Times of a call by rows: Linear4bit's, and a bfloat16 linear layer's."""
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

    def graph_seconds(calls) -> float:
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(4):
                graph.replay()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / (4 * len(calls)))
        return statistics.median(times)

    layers = [quantized() for _ in range(COPIES)]
    dense = [
        torch.randn(N, K, dtype=torch.bfloat16, device="cuda") for _ in range(COPIES)
    ]
    found = {}
    with torch.no_grad():
        for m in ROWS:
            x = torch.randn(m, K, dtype=torch.bfloat16, device="cuda")
            linear = torch.nn.functional.linear
            found[m] = (
                graph_seconds([functools.partial(layer, x) for layer in layers]),
                graph_seconds([functools.partial(linear, x, w) for w in dense]),
            )
    del layers, dense
    torch.cuda.empty_cache()
    return found


def _seconds(op, m, x, weights) -> float:
    """The time of a call; of few rows on a device that does not wait for the host."""
    if m > 64:
        return registry.seconds(op, x, weights, calls=COPIES)
    program = registry.program(op, x, weights, calls=COPIES)
    return held.seconds(program, COPIES)


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

    theirs = bitsandbytes_seconds()
    make = jax.jit(lambda key: quantize(jax.random.normal(key, (K, N))))
    weights = [make(key) for key in jax.random.split(jax.random.key(0), COPIES)]
    dense = [jax.jit(lambda w: dequantize(w, jnp.bfloat16).T)(w) for w in weights]
    spec, packed = weights[0].spec, [w.packed for w in weights]
    rows = []
    print(f"{'m':>5} {'us':>9} {'bitsandbytes us':>16} {'ratio':>6} {'bf16 us':>9}")
    for m in ROWS:
        x = [jax.random.normal(jax.random.key(m), (m, K), jnp.bfloat16)]
        ours = _seconds(lambda x, p: quantized_matmul(x, p, spec), m, x, packed)
        bf16 = _seconds(
            lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))), m, x, dense
        )
        peer, peer_bf16 = theirs[m]
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
