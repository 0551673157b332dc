"""How fast rows become batches: a table, and JSON.

    python benchmarks/data.py [--model FOLDER] [--data FILE] [--rows 100000]

Writes a file of so many rows (those of `--data` over and over, each with its number in
it; without, questions on Python's standard library), then times reading and tokenizing
it, opening it from the cache, laying it out with packing, and making batches.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import tempfile
import time
from importlib.metadata import version

import qlora_jax as ql

RESULTS = pathlib.Path(__file__).parent / "results"


def write_rows(path: pathlib.Path, data: str | None, count: int) -> None:
    if data is None:
        train, _ = ql.data.stdlib_conversations()
        found = train
    else:
        found = ql.data.read_conversations(data)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            question, *rest = found[i % len(found)].messages
            numbered = {**question, "content": f"{i}. {question['content']}"}
            file.write(json.dumps({"messages": [numbered, *rest]}) + "\n")


def timed(function):
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the data pipeline.")
    add = parser.add_argument
    add("--model", default="SmolLM2-135M-Instruct", help="whose tokenizer")
    add("--data", help="rows to multiply; default: Python's documentation")
    add("--rows", type=int, default=100_000)
    add("--seq-len", type=int, default=512)
    add("--batch-size", type=int, default=16)
    add("--batches", type=int, default=500)
    add("--out", default=str(RESULTS / "data.json"))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    tokenizer = ql.load_tokenizer(args.model)
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        file = folder / "rows.jsonl"
        write_rows(file, args.data, args.rows)

        def prepare(**options):
            return ql.data.prepare(
                file,
                tokenizer,
                seq_len=args.seq_len,
                batch_size=args.batch_size,
                cache_dir=folder / "cache",
                **options,
            )

        cpu = time.process_time()
        plain, first_s = timed(prepare)
        cpu_s = time.process_time() - cpu
        grouped, reload_s = timed(lambda: prepare(group_by_length=True))
        _, again_s = timed(prepare)
        packed, packed_s = timed(lambda: prepare(packing=True))
        rates = {}
        for name, data in {
            "padded": plain,
            "grouped by length": grouped,
            "packed": packed,
        }.items():
            batches = iter(data.train)
            next(batches)
            _, seconds = timed(lambda b=batches: [next(b) for _ in range(args.batches)])
            rates[name] = args.batches / seconds
        size = file.stat().st_size
    finally:
        shutil.rmtree(folder)
    tokens = plain.statistics.tokens
    numbers = {
        "rows": args.rows,
        "megabytes": round(size / 1e6, 1),
        "tokens": tokens,
        "tokenize_s": round(first_s, 2),
        "tokenize_cpu_s": round(cpu_s, 2),  # of all cores together
        "rows_per_s": round(args.rows / first_s),
        "tokens_per_s": round(tokens / first_s),
        "seconds_for_100k_rows": round(first_s * 1e5 / args.rows, 2),
        "cached_s": round(again_s, 2),
        "cached_grouped_s": round(reload_s, 2),
        "cached_packed_s": round(packed_s, 2),
        "padding": {
            "padded": round(plain.statistics.padding, 4),
            "grouped by length": round(grouped.statistics.padding, 4),
            "packed": round(packed.statistics.padding, 4),
        },
        "batches_per_s": {name: round(rate) for name, rate in rates.items()},
    }
    for name, value in numbers.items():
        print(f"{name:24} {value}")
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_before": round(load, 2),  # of other processes, in cores
        "versions": {n: version(n) for n in ("tokenizers", "grain", "numpy", "jinja2")},
        "python": platform.python_version(),
        "model": args.model,
        "data": pathlib.Path(args.data).name if args.data else "stdlib",
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
        **numbers,
    }
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {out}")


if __name__ == "__main__":
    main()
