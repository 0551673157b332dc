"""What leaving out steps without a finite gradient costs, see `ql.skip_nonfinite`.

    python -m benchmarks.nonfinite --model PATH

Times a step of each method of `benchmarks/quality.py` with it and without, in turns, on
a batch of 16 x 512. Prints a table, writes benchmarks/results/nonfinite.json.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np

import qlora_jax as ql
from benchmarks.quality import METHODS, Method, Trainer, load

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass
class Timed:
    """A compiled step with what it is called on."""

    step: Any
    arrays: tuple[Any, Any, Any]
    batch: Any

    def milliseconds(self, steps: int) -> float:
        """Returns the time of a step, the mean of so many in a row."""
        trainable, state, frozen = self.arrays
        jax.block_until_ready((trainable, state))
        began = time.perf_counter()
        for _ in range(steps):
            trainable, state, _ = self.step(trainable, state, frozen, self.batch)
        jax.block_until_ready((trainable, state))
        self.arrays = (trainable, state, frozen)
        return (time.perf_counter() - began) / steps * 1e3


def prepared(
    method: Method, base: Any, guarded: bool, shape: tuple[int, int], rank: int
) -> Timed:
    """Compiles a step with the guard or without."""
    size = {"batch_size": shape[0], "seq_len": shape[1]}
    trainer = Trainer(method, base, **size, rank=rank, guarded=guarded)
    trainer.compile()
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, base.config.vocab_size, shape, np.int32),
        "loss_mask": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }
    return Timed(trainer.step, trainer.start(0, 1e-5, 1000), jax.device_put(batch))


def compare(pair: tuple[Timed, Timed], *, turns: int = 5, steps: int = 10) -> dict:
    """Times a step without and with the guard in turns; medians, milliseconds."""
    for one in pair:
        one.milliseconds(2)
    found = [[one.milliseconds(steps) for one in pair] for _ in range(turns)]
    without, guarded = map(statistics.median, zip(*found, strict=True))
    ratios = [b / a for a, b in found]
    return {
        "without_ms": without,
        "guarded_ms": guarded,
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


def write(rows: list[dict], shape: tuple[int, int]) -> pathlib.Path:
    """Writes `benchmarks/results/nonfinite.json`."""
    document = {
        "machine": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "batch": list(shape),
        "rows": rows,
    }
    path = RESULTS / "nonfinite.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def line(row: dict) -> str:
    """A row of the printed table."""
    return (
        f"{row['method']:<10} {row['without_ms']:>8.2f} ms {row['guarded_ms']:>8.2f} ms"
        f"  x {row['ratio']:.3f} ({row['ratio_least']:.3f} to {row['ratio_most']:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times skip_nonfinite.")
    add = parser.add_argument
    add("--model", default="SmolLM2-135M-Instruct", help="folder, .gguf or name")
    add("--batch", type=int, default=16)
    add("--seq", type=int, default=512)
    add("--rank", type=int, default=64)
    names = [method.name for method in METHODS]
    add("--methods", nargs="+", default=names, choices=names)
    arguments = parser.parse_args()
    methods = [method for method in METHODS if method.name in arguments.methods]
    shape, path = (arguments.batch, arguments.seq), ql.find_model(arguments.model)
    bases = load(path, methods)
    with concurrent.futures.ThreadPoolExecutor(2 * len(methods)) as pool:
        pairs = {
            method.name: [
                pool.submit(
                    prepared,
                    *(method, bases[method.quantize], guarded, shape, arguments.rank),
                )
                for guarded in (False, True)
            ]
            for method in methods
        }
    rows = []
    for name, pair in pairs.items():
        without, guarded = (future.result() for future in pair)
        rows.append({"method": name, **compare((without, guarded))})
        print(line(rows[-1]), flush=True)
    print(write(rows, shape))


if __name__ == "__main__":
    main()
