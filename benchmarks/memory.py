"""The least memory that finetuning takes: one row of 512 tokens, everything recomputed.

    python -m benchmarks.memory                  every model
    python -m benchmarks.memory --only 65B       models whose name has that in it
    python -m benchmarks.memory --plan           what is counted, nothing run

Adapters of rank 64 on all linear layers, the state of Adam paged. "standard" has
float32 adapters and gradients, "lean" bfloat16 ones with float32 masters in the paged
state. Each row is a process of its own that runs a few steps, prints the peak of the
device's allocator, and is run again with the allocator capped a little above that.
Writes benchmarks/results/memory.json.
"""

import argparse
import dataclasses

from benchmarks import finetune
from benchmarks.models import SHAPES
from qlora_jax.plan import plan_memory
from qlora_jax.train import TrainConfig

# What is aimed at, GB: standard, lean.
AIMS = {
    "LLaMA-7B": (5.7, None),
    "Llama-3-8B": (7.6, None),
    "LLaMA-13B": (10.0, None),
    "LLaMA-33B": (22.5, 21.0),
    "LLaMA-65B": (43.0, 40.0),
    "Llama-3-70B": (48.0, 44.0),
}
TRAIN = TrainConfig(rank=64, dropout=0.0, batch_size=1, seq_len=512, chunk_size=128)
# Above the peak, for what an allocator leaves unused between what it hands out.
HEADROOM = 1.02


def cases():
    """Every model, standard, and lean where that is aimed at."""
    for name, aims in AIMS.items():
        for optimizer, aim in zip(("paged", "lean"), aims, strict=True):
            if aim is not None:
                yield (
                    aim,
                    finetune.Case(
                        f"{name}, {'lean' if optimizer == 'lean' else 'standard'}",
                        *(1, 512, "full", optimizer),
                        model=name,
                        chunk_size=TRAIN.chunk_size,
                    ),
                )


def planned_gb(case: finetune.Case) -> float:
    """What `plan_memory` says of a case."""
    lean = case.optimizer == "lean"
    return plan_memory(SHAPES[case.model], TRAIN, lean=lean).device_gb


def main() -> None:
    parser = argparse.ArgumentParser(description="The least memory of finetuning.")
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--plan", action="store_true", help="count, and run nothing")
    arguments = parser.parse_args()
    rows = []
    print(f"{'':<24} {'aim':>6} {'plan':>6} {'peak':>6} {'under a cap of':>14}")
    for aim, case in cases():
        if arguments.only not in case.name:
            continue
        planned = planned_gb(case)
        if arguments.plan:
            print(f"{case.name:<24} {aim:>6.1f} {planned:>6.2f}", flush=True)
            continue
        try:
            row = finetune.in_process(case)
            cap = max(row["peak_gb"] * HEADROOM, aim)
            finetune.in_process(dataclasses.replace(case, steps=1), memory_cap_gb=cap)
        except RuntimeError as error:
            print(f"{case.name:<24} failed\n{error}", flush=True)
            continue
        rows.append(row | {"planned_gb": planned, "aim_gb": aim, "cap_gb": cap})
        print(
            f"{case.name:<24} {aim:>6.1f} {planned:>6.2f} {row['peak_gb']:>6.2f} "
            f"{cap:>14.2f}",
            flush=True,
        )
    if rows:
        print(finetune.write(rows, "memory"))


if __name__ == "__main__":
    main()
