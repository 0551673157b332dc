"""Rows of a batch with adapters of their own: in one forward, or one by one.

    python -m benchmarks.adapters                 both shapes, ranks 16 and 64
    python -m benchmarks.adapters --shape 1024x1024 --limit 60

Times one NF4 layer, bfloat16, on rows x tokens activations whose rows are dealt out
among adapters: the base alone; with adapters in bfloat16, masked and gathered (see
qlora_jax/lora/low_rank.py); with float32 masters, in the form that is chosen; and one
adapter's rows after the other's, within one program, so that the host's part does not
count. Prints a table and writes benchmarks/results/adapters.json. Needs the core
dependencies.
"""

import argparse
import concurrent.futures
import datetime
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import registry
from qlora_jax.lora import LoraTensor
from qlora_jax.lora.low_rank import gathered, masked, prefers_masked
from qlora_jax.quant import quantize

RESULTS = pathlib.Path(__file__).parent / "results"
SHAPES = [(4096, 14336), (4096, 4096)]
RANKS = (16, 64)
# rows, tokens of a row, adapters
CASES = [(8, 1, 4), (32, 1, 16), (64, 1, 64), (8, 512, 4), (32, 128, 8)]
CACHE_BYTES = 120e6  # bases are rotated until they exceed this: twice an H200's L2


def base(x, w):
    return x @ w[0]


def in_form(form):
    def run(x, w):
        base, a, b, ids = w
        return x @ base + form(x, a, b, ids)

    return run


def chosen(x, w):
    base, a, b, ids = w
    return x @ LoraTensor(base, a, b, ids=ids, alpha=a.shape[-1])


@jax.jit
def alone(x, base, a, b):
    return x @ LoraTensor(base, a, b, alpha=a.shape[-1])


def one_by_one(x, w):
    """Rows dealt out in turn, as `ids` says, which adapters group."""
    base, a, b, _ = w
    several, out = len(a), []
    for i in range(several):
        out.append(alone(x[i::several], base, a[i], b[i]))
    return jnp.stack(out, 1).reshape(*x.shape[:-1], -1)


FORMS = {
    "base": base,
    "masked": in_form(masked),
    "gathered": in_form(gathered),
    "float32": chosen,
    "one by one": one_by_one,
}


class Case:
    """One batch on one layer, and its programs by name."""

    def __init__(self, bases, rank, rows, tokens, several):
        k, n = bases[0].shape
        self.about = {"k": k, "n": n, "rank": rank, "rows": rows, "tokens": tokens}
        self.about["adapters"] = several
        key = jax.random.key(rows)
        self.x = jax.random.normal(key, (rows, tokens, k), jnp.bfloat16)
        ids = jnp.arange(rows, dtype=jnp.int32) % several

        def drawn(key, width, height):
            numbers = jax.random.normal(key, (several, width, height), jnp.bfloat16)
            return numbers / width**0.5

        # Each base has adapters of its own, as layers have.
        self.weights = []
        for i, w in enumerate(bases):
            keys = jax.random.split(jax.random.fold_in(key, i))
            a, b = drawn(keys[0], k, rank), drawn(keys[1], rank, n)
            self.weights.append((w, a, b, ids))
        self.calls = int(np.clip(3e-3 / (2 * rows * tokens * k * n / 7e14), 2, 24))
        self.programs = {}

    def compile(self, name):
        """Makes the program of a form."""
        weights, calls = self.weights, self.calls
        if name == "float32":
            weights = [
                (w, a.astype(jnp.float32), b.astype(jnp.float32), ids)
                for w, a, b, ids in weights
            ]
        if name == "one by one":
            calls = max(2, calls // self.about["adapters"])
        program = registry.program(FORMS[name], [self.x], weights, calls=calls)
        self.programs[name] = program, calls

    def row(self):
        """Measures all; what they compute must agree."""
        row = dict(self.about)
        sizes = [row[name] for name in ("rows", "tokens", "adapters", "rank")]
        row["chosen"] = "masked" if prefers_masked(*sizes) else "gathered"
        for name in FORMS:
            run, calls = self.programs[name]
            taken = [registry.burst(run, 4) / 4 / calls for _ in range(7)]
            row[name] = float(np.median(taken)) * 1e6
        y = {name: self.programs[name][0]()[0].astype(jnp.float32) for name in FORMS}
        exact, size = y["masked"], jnp.linalg.norm(y["masked"])
        errors = [jnp.linalg.norm(y[n] - exact) / size for n in FORMS if n != "base"]
        row["largest_difference"] = float(jnp.stack(errors).max())
        return row


def bases(shape):
    copies = min(int(CACHE_BYTES // (shape[0] * shape[1] / 2)) + 2, 8)
    make = jax.jit(lambda key: quantize(jax.random.normal(key, shape, jnp.bfloat16)))
    return [make(key) for key in jax.random.split(jax.random.key(0), copies)]


def write(rows):
    document = {
        "machine": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "adapters.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Times adapters chosen by row.")
    parser.add_argument("--shape", help="one shape, as 4096x14336: in and out")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--limit", type=float, help="start nothing after so many s")
    args = parser.parse_args()
    start = time.monotonic()
    shapes = [tuple(map(int, args.shape.split("x")))] if args.shape else SHAPES
    rows = []
    print(
        "| layer | rank | rows x tokens | adapters | "
        + " | ".join(FORMS)
        + " | chosen |"
    )
    print("|" + "---|" * 10)
    for shape, rank in itertools.product(shapes, args.ranks):
        if args.limit and time.monotonic() - start > args.limit:
            break
        every = [Case(bases(shape), rank, *case) for case in CASES]
        # Kernels take seconds to compile: side by side, before anything is measured.
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            waiting = [
                pool.submit(case.compile, name) for case in every for name in FORMS
            ]
            for one in waiting:
                one.result()
        with registry.alone():
            for case in every:
                row = case.row()
                rows.append(row)
                cells = [f"{row['k']} x {row['n']}", str(row["rank"])]
                cells += [f"{row['rows']} x {row['tokens']}", str(row["adapters"])]
                cells += [f"{row[name]:.1f}" for name in FORMS]
                cells.append(row["chosen"])
                print("| " + " | ".join(cells) + " |", flush=True)
        write(rows)


if __name__ == "__main__":
    main()
