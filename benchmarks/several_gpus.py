"""Times the QLoRA step on all GPUs of a host, beside one of them.

    python -m benchmarks.several_gpus              every row
    python -m benchmarks.several_gpus --layers 4   a trial: fewer layers

Llama-3-8B, random NF4 weights, adapters of rank 64 on all linear layers, everything
recomputed, layers in a loop. Rows of the batch over all GPUs ("data"), parts of the
weights too ("fsdp"), or tensor parallel ("model"). Each row is a process of its own.
Prints a table, writes benchmarks/results/several_gpus.json.
"""

import argparse
import dataclasses
import functools
import json
import os
from typing import Any

from benchmarks.finetune import (
    PEAK_FLOPS,
    flops_a_token,
    optimizer,
    row_of,
    timed,
    write,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: of the row: an axis of the mesh, or "one" GPU.
        rows_per_gpu: of the batch; of tensor parallel, rows of all.
        seq: tokens of a row.
        layers: how many; None for those of the model.
        steps: of the timed region.
    """

    name: str
    rows_per_gpu: int = 4
    seq: int = 2048
    layers: int | None = None
    steps: int = 5


CASES = [Case("one"), Case("data"), Case("fsdp"), Case("model")]
RANK = 64


def measure(case: Case) -> dict:
    """Runs one case in this process."""
    import time

    import jax

    import qlora_jax as ql
    from benchmarks import models
    from qlora_jax import sharding
    from qlora_jax.train import committed, next_token_loss_sum, step_options

    if case.name == "one":
        ql.use_one_gpu()
    devices = jax.devices()
    config = models.SHAPES["Llama-3-8B"]
    if case.layers:
        config = dataclasses.replace(config, num_layers=case.layers)
    rows = case.rows_per_gpu * (len(devices) if case.name in ("data", "fsdp") else 1)
    shape = (rows, case.seq)
    batch = {
        "tokens": jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    }
    model, rows_on = models.random_model(config), None
    if case.name != "one":
        sizes: dict[str, Any] = {case.name: len(devices)}
        mesh = sharding.make_mesh(**sizes)
        model = models.spread(model, mesh)
        rows_on = sharding.batch_sharding(mesh)
        batch = jax.device_put(batch, rows_on)
    tx, dtype = optimizer("adamw")
    model = ql.add_lora(model, rank=RANK, alpha=16, key=jax.random.key(0), dtype=dtype)
    trainable, frozen = committed(ql.split_trainable(model))
    del model
    state, batch = committed(tx.init(trainable)), committed(batch)
    step = ql.make_train_step(
        tx,
        loss_sum=functools.partial(
            next_token_loss_sum, remat="full", chunk_size=1024, rows=rows_on
        ),
        compiler_options=step_options(case.rows_per_gpu * case.seq, tune=False),
        shardings=jax.tree.map(lambda leaf: leaf.sharding, trainable),
    )
    start = time.perf_counter()
    compiled = step.lower(trainable, state, frozen, batch).compile()
    compile_s = time.perf_counter() - start
    _, losses, seconds = timed(
        compiled, trainable, state, frozen, batch, steps=case.steps
    )
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in devices]
    tokens_per_s = rows * case.seq / seconds
    flops = flops_a_token(config, RANK, case.seq) * tokens_per_s
    peak_flops = PEAK_FLOPS.get(devices[0].device_kind, float("nan")) * len(devices)
    return {
        **dataclasses.asdict(case),
        "gpus": len(devices),
        "batch": rows,
        "tokens_per_s": tokens_per_s,
        "step_ms": seconds * 1e3,
        "peak_gb": max(peaks) / 1e9,  # the first also made the model
        "peak_gb_of_others": max(peaks[1:], default=0) / 1e9,
        "compile_s": compile_s,
        "mfu": flops / peak_flops,
        "losses": losses,
        "machine": devices[0].device_kind,
        "jax": jax.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the step on several GPUs.")
    parser.add_argument("--layers", type=int, help="a trial with so many layers")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return
    rows: list[dict] = []
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    print("        GPUs  batch  tokens/s  of one      ms     GB  others   MFU  compile")
    for case in CASES:
        case = dataclasses.replace(case, layers=arguments.layers)
        try:
            row = row_of("benchmarks.several_gpus", case, environment)
        except RuntimeError as error:
            print(f"{case.name}: failed\n{error}", flush=True)
            continue
        rows.append(row)
        print(
            f"{row['name']:<8}{row['gpus']:>4}  {row['batch']:>5}  "
            f"{row['tokens_per_s']:>8,.0f}  "
            f"{row['tokens_per_s'] / rows[0]['tokens_per_s']:>6.2f}  "
            f"{row['step_ms']:>6.0f}  {row['peak_gb']:>5.2f}  "
            f"{row['peak_gb_of_others']:>6.2f}  {row['mfu']:>4.2f}  "
            f"{row['compile_s']:>6.0f}s",
            flush=True,
        )
        if not arguments.layers:
            write(rows, "several_gpus")


if __name__ == "__main__":
    main()
