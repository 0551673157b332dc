"""Times the whole QLoRA step, from batch to updated adapters, on one GPU.

    python -m benchmarks.finetune              every row of the table
    python -m benchmarks.finetune --only none  rows whose name has that in it
    python -m benchmarks.finetune --layers 4   a trial: fewer layers

Llama-3-8B, and for what paging costs LLaMA-65B too. Adapters of rank 64 on all linear
layers, weights random. Each row is a process of its
own, so that the peak is that of the row. Prints a table, writes
benchmarks/results/finetune.json.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: of the row.
        batch: rows of a step.
        seq: tokens of a row.
        remat: what the backward recomputes, see `Llama.hidden`.
        unroll: whether layers are compiled one by one.
        optimizer: "adamw", "paged" or "lean" (paged in slices, the masters in the
            state).
        accumulate: in how many parts the rows are computed.
        model: a name in `models.SHAPES`.
        chunk_size: tokens whose logits are in memory at a time.
        steps: of the timed region.
        layers: how many; None for those of the model.
        tune: whether products are tuned, which takes memory, see `step_options`.
        profile: a folder for a trace of one step.
    """

    name: str
    batch: int
    seq: int
    remat: str
    optimizer: str = "adamw"
    unroll: bool = False
    accumulate: int = 1
    model: str = "Llama-3-8B"
    chunk_size: int = 2048
    steps: int = 5
    layers: int | None = None
    tune: bool = True
    profile: str | None = None


CASES = [
    Case("none 4x2048", 4, 2048, "none", unroll=True),
    Case("full 4x2048", 4, 2048, "full", unroll=True, chunk_size=1024),
    Case("offload 4x2048", 4, 2048, "offload", chunk_size=512),
    Case("offload paged 4x2048", 4, 2048, "offload", "paged", chunk_size=512),
    Case("attention 4x2048", 4, 2048, "attention"),
    Case("device 1x512", 1, 512, "none", unroll=True, chunk_size=512, steps=20),
    Case(
        "paged 1x512",
        *(1, 512, "full", "paged"),
        chunk_size=128,
        steps=20,
        tune=False,
    ),
    Case("accumulated 16x2048", 16, 2048, "none", unroll=True, accumulate=4, steps=3),
    Case(
        "accumulated paged 16x2048",
        *(16, 2048, "none", "paged"),
        unroll=True,
        accumulate=4,
        steps=3,
    ),
    Case(
        "65B 16x2048",
        *(16, 2048, "full"),
        accumulate=4,
        model="LLaMA-65B",
        chunk_size=512,
        steps=2,
    ),
    Case(
        "65B paged 16x2048",
        *(16, 2048, "full", "paged"),
        accumulate=4,
        model="LLaMA-65B",
        chunk_size=512,
        steps=2,
    ),
]


def optimizer(name: str):
    """The optimizer of a case, and the type of the adapters that it trains."""
    import jax.numpy as jnp
    import optax

    import qlora_jax as ql

    adamw = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(2e-4, b2=0.999))
    match name:
        case "adamw":
            return adamw, jnp.float32
        case "paged":
            return ql.paged(adamw), jnp.float32
        case "lean":
            return ql.paged(ql.with_master(adamw), slice_leaves=True), jnp.bfloat16
    raise ValueError(f"{name!r} must be adamw, paged or lean.")


def flops_a_token(config, rank: int, seq: int) -> float:
    """What a step must compute for a token, recomputation not counted.

    Two passes over each frozen number (forward, and the gradient of its input), three
    over each trained one, and causal attention: a query sees half of the row.
    """
    frozen = sum(k * n for k, n in config.linear_shapes().values())
    trained = sum(rank * (k + n) for k, n in config.linear_shapes().values())
    attention = config.num_heads * config.head_dim * seq  # q @ k and p @ v, halved
    layers = config.num_layers * (4 * frozen + 6 * trained + 3 * 2 * attention)
    return layers + 4 * config.vocab_size * config.hidden_size


def measure(case: Case) -> dict:
    """Runs one case in this process."""
    import time

    import jax

    import qlora_jax as ql
    from benchmarks import models
    from qlora_jax.train import committed, next_token_loss_sum, step_options

    ql.use_one_gpu()
    device = jax.devices()[0]
    peaks: dict[str, float] = {}

    def peak_after(phase: str) -> None:
        stats = device.memory_stats() or {}
        peaks[phase] = stats.get("peak_bytes_in_use", 0) / 1e9

    config = models.SHAPES[case.model]
    if case.layers:
        config = dataclasses.replace(config, num_layers=case.layers)
    tx, dtype = optimizer(case.optimizer)
    rank = 64
    model = ql.add_lora(
        models.random_model(config),
        rank=rank,
        alpha=16,
        key=jax.random.key(0),
        dtype=dtype,
    )
    trainable, frozen = committed(ql.split_trainable(model))
    del model
    jax.block_until_ready((trainable, frozen))
    peak_after("model")
    state = jax.block_until_ready(committed(tx.init(trainable)))
    peak_after("state")
    loss_sum = functools.partial(
        next_token_loss_sum,
        remat=case.remat,
        unroll=case.unroll,
        chunk_size=case.chunk_size,
    )
    step = ql.make_train_step(
        tx,
        accumulate=case.accumulate,
        loss_sum=loss_sum,
        compiler_options=step_options(
            case.batch * case.seq // case.accumulate,
            remat=case.remat,
            tune=case.tune,
        ),
    )
    shape = (case.batch, case.seq)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    batch = committed({"tokens": tokens})
    start = time.perf_counter()
    compiled = step.lower(trainable, state, frozen, batch).compile()
    compile_s = time.perf_counter() - start
    peak_after("compilation")  # tuning runs products on buffers of its own
    (trainable, state), losses, seconds = timed(
        compiled, trainable, state, frozen, batch, steps=case.steps
    )
    peak_after("steps")
    if case.profile:
        with jax.profiler.trace(case.profile):
            jax.block_until_ready(compiled(trainable, state, frozen, batch))
    tokens_per_s = case.batch * case.seq / seconds
    flops = flops_a_token(config, rank, case.seq) * tokens_per_s
    return {
        **dataclasses.asdict(case),
        "tokens_per_s": tokens_per_s,
        "step_ms": seconds * 1e3,
        "peak_gb": peaks["steps"],
        "peak_gb_after": peaks,
        "limit_gb": (device.memory_stats() or {}).get("bytes_limit", 0) / 1e9,
        "compile_s": compile_s,
        "mfu": flops / PEAK_FLOPS.get(device.device_kind, float("nan")),
        "losses": losses,
        "machine": device.device_kind,
        "jax": jax.__version__,
    }


def timed(
    step: Callable[..., Any],
    trainable: Any,
    state: Any,
    frozen: Any,
    batch: Any,
    *,
    steps: int,
) -> tuple[tuple[Any, Any], list[float], float]:
    """Takes three steps, then those that are timed, of one batch.

    Returns:
        What is trained and the state; the losses of the first three steps and of the
        last; seconds a step.

    Raises:
        ValueError: if the loss did not fall, or is no number.
    """
    import time

    losses, metrics = [], {}
    for _ in range(3):
        trainable, state, metrics = step(trainable, state, frozen, batch)
        losses.append(float(metrics["loss"]))
    start = time.perf_counter()
    for _ in range(steps):
        trainable, state, metrics = step(trainable, state, frozen, batch)
    losses.append(float(metrics["loss"]))  # waits
    seconds = (time.perf_counter() - start) / steps
    if not losses[-1] < losses[0]:
        raise ValueError(f"The loss of a repeated batch did not fall: {losses}.")
    return (trainable, state), losses, seconds


def in_process(case: Case, *, memory_cap_gb: float | None = None) -> dict:
    """Runs one case in a process of its own, under a cap of the device's memory.

    Raises:
        RuntimeError: with the end of its output, if it failed.
    """
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if memory_cap_gb is not None:
        # All at once: pieces of memory that an allocator takes as it grows do not join.
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(memory_cap_gb / total_gb())
    return row_of("benchmarks.finetune", case, environment)


def row_of(module: str, case: Any, environment: Mapping[str, str]) -> dict:
    """Runs `python -m module --case` with a case, and returns the row it prints last.

    Raises:
        RuntimeError: with the end of its output, if it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, "--case", json.dumps(dataclasses.asdict(case))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        # What went wrong may stand above a long trace of calls.
        raise RuntimeError(done.stderr[-20_000:])
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def total_gb() -> float:
    """What a fraction of the first GPU's memory is a fraction of, in 1e9 bytes.

    Asked of the allocator itself: nvidia-smi's figure has in it what no program gets.
    """
    fraction = 0.5
    environment = dict(
        os.environ,
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        XLA_PYTHON_CLIENT_MEM_FRACTION=str(fraction),
    )
    code = "import jax; print(jax.devices()[0].memory_stats()['bytes_limit'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1]) / fraction / 1e9


HEADER = (
    f"{'':<26} {'model':<12} {'remat':<9} {'optimizer':<9} {'tokens/s':>9} "
    f"{'ms':>8} {'GB':>6} {'MFU':>5} {'compile':>7}"
)


def line(row: dict) -> str:
    """A row of the printed table."""
    return (
        f"{row['name']:<26} {row['model']:<12} {row['remat']:<9} "
        f"{row['optimizer']:<9} {row['tokens_per_s']:>9,.0f} {row['step_ms']:>8.1f} "
        f"{row['peak_gb']:>6.2f} {row['mfu']:>5.2f} {row['compile_s']:>6.0f}s"
    )


def write(rows: list[dict], name: str) -> pathlib.Path:
    """Writes `benchmarks/results/<name>.json`.

    Rows of the same day, device and jax that were not measured again are kept.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    where = {
        "machine": rows[0]["machine"],
        "jax": rows[0]["jax"],
        "date": datetime.date.today().isoformat(),
    }
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept = before.pop("rows")
    if before != where:
        kept = []
    names = {row["name"] for row in rows}
    kept = [row for row in kept if row["name"] not in names]
    kept += [{k: v for k, v in row.items() if k not in where} for row in rows]
    path.write_text(json.dumps(where | {"rows": kept}, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the QLoRA step.")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--layers", type=int, help="a trial with so many layers")
    parser.add_argument("--profile", help="write a trace of a step of each row there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return
    rows = []
    print(HEADER, flush=True)
    for case in CASES:
        if arguments.only not in case.name:
            continue
        case = dataclasses.replace(case, layers=arguments.layers)
        if arguments.profile:
            folder = pathlib.Path(arguments.profile) / case.name.replace(" ", "-")
            case = dataclasses.replace(case, profile=str(folder))
        try:
            rows.append(in_process(case))
        except RuntimeError as error:
            print(f"{case.name}: failed\n{error}", flush=True)
            continue
        print(line(rows[-1]), flush=True)
        if not arguments.layers:
            write(rows, "finetune")


if __name__ == "__main__":
    main()
