"""The least memory that finetuning takes: one row of 512 tokens, everything recomputed.

    python -m benchmarks.memory                  every model
    python -m benchmarks.memory --only 65B       models whose name has that in it
    python -m benchmarks.memory --plan           what is counted, nothing run

Adapters of rank 64 on all linear layers, the state of Adam paged. "standard" has
float32 adapters and gradients, "lean" bfloat16 ones with float32 masters in the paged
state; "offload" leaves what layers start from in the backward on the host. Each row is
a process of its own whose allocator may have as much as is aimed at and not a byte
more; it runs a few steps and tells the allocator's peak. A row that does not fit runs
again without that limit, so that its peak is known. Nothing is timed, so rows run side
by side as far as the device has room (--room). Writes benchmarks/results/memory.json.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Iterator

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
# Lean, and what layers start from in the backward on the host too, GB.
AIMS_OFFLOADED = {"Llama-3-70B": 44.0}
TRAIN = TrainConfig(rank=64, dropout=0.0, batch_size=1, seq_len=512, chunk_size=128)
STEPS = 3
# Beside what the allocator hands out: the CUDA context and what libraries take.
OUTSIDE_GB = 1.5


def cases():
    """Every model, standard, and lean where that is aimed at."""
    for name, (standard, lean) in AIMS.items():
        yield standard, _case(name, "standard", "paged")
        if lean is not None:
            yield lean, _case(name, "lean", "lean")
    for name, aim in AIMS_OFFLOADED.items():
        yield aim, _case(name, "lean, offload", "lean", remat="offload")


def _case(model: str, title: str, optimizer: str, remat: str = "full") -> finetune.Case:
    return finetune.Case(
        f"{model}, {title}",
        *(1, 512, remat, optimizer),
        model=model,
        chunk_size=TRAIN.chunk_size,
        steps=STEPS,
        tune=False,
    )


def planned_gb(case: finetune.Case) -> float:
    """What `plan_memory` says of a case."""
    train = dataclasses.replace(TRAIN, remat=case.remat)
    lean = case.optimizer == "lean"
    return plan_memory(SHAPES[case.model], train, lean=lean).device_gb


class Room:
    """The memory of the device, shared by rows that run side by side.

    Args:
        gb: as much as all of them may have.
    """

    def __init__(self, gb: float):
        self._free, self._change = gb, threading.Condition()

    @contextlib.contextmanager
    def of(self, gb: float) -> Iterator[None]:
        """Waits until so much is free, and holds it."""
        with self._change:
            self._change.wait_for(lambda: self._free >= gb)
            self._free -= gb
        try:
            yield
        finally:
            with self._change:
                self._free += gb
                self._change.notify_all()


def measure(case: finetune.Case, aim: float, room: Room) -> dict:
    """Runs a case held to its aim, and without a limit if it does not fit."""
    row: dict = {"planned_gb": planned_gb(case), "aim_gb": aim}
    try:
        with room.of(aim + OUTSIDE_GB):
            held = finetune.in_process(case, memory_cap_gb=aim)
        return row | held | {"fits": True}
    except RuntimeError as error:
        lines = str(error).splitlines()
        refused = [line for line in lines if "RESOURCE_EXHAUSTED" in line]
        if not refused:
            raise
    with room.of(1.2 * aim + OUTSIDE_GB):
        without = finetune.in_process(case)
    return row | without | {"fits": False, "refused": refused[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description="The least memory of finetuning.")
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--plan", action="store_true", help="count, and run nothing")
    parser.add_argument("--room", type=float, help="GB; default: 0.9 of the device's")
    arguments = parser.parse_args()
    chosen = [(aim, case) for aim, case in cases() if arguments.only in case.name]
    print(f"{'':<26} {'aim':>6} {'plan':>6} {'peak':>6}  under the aim as a cap")
    if arguments.plan:
        for aim, case in chosen:
            print(f"{case.name:<26} {aim:>6.1f} {planned_gb(case):>6.2f}")
        return
    finetune.total_gb()  # asked once, not by every row
    room = Room(arguments.room or 0.9 * finetune.total_gb())
    rows, path = [], None
    with concurrent.futures.ThreadPoolExecutor(len(chosen)) as pool:
        runs = {pool.submit(measure, case, aim, room): case for aim, case in chosen}
        for run in concurrent.futures.as_completed(runs):
            name = runs[run].name
            try:
                row = run.result()
            except RuntimeError as error:
                print(f"{name:<26} failed\n{str(error)[-2000:]}", flush=True)
                continue
            rows.append(row)
            rows.sort(key=lambda row: row["aim_gb"])
            path = finetune.write(rows, "memory")  # what is there, should it be stopped
            print(
                f"{name:<26} {row['aim_gb']:>6.1f} {row['planned_gb']:>6.2f} "
                f"{row['peak_gb']:>6.2f}  {'ran' if row['fits'] else 'did not fit'}",
                flush=True,
            )
    if rows:
        print(path)


if __name__ == "__main__":
    main()
