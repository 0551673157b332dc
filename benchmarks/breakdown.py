"""Where the time of a step goes: a table and a picture from a profiler's trace.

    python -m benchmarks.finetune --only "none 4x2048" --profile traces
    python -m benchmarks.breakdown traces/none-4x2048 --out docs/performance.png
    python -m benchmarks.breakdown traces/none-4x2048 --top 30   the kernels by name

Kernels are sorted by their names. Products of the base and of adapters have the same
ones, and are told apart by how long they take; what follows the last product is the
optimizer. Of copies to and from the host's memory only what goes on beside no kernel
is counted.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re

# What is found first holds.
KINDS = [
    ("copies with the host", r"memcpy(h2d|d2h)"),
    ("attention", r"sdpa|fmha|compute_dot_do_o|convert_dq|cudnn"),
    ("decoding of weights", r"dequantize"),
    ("fused products", r"packed_matmul|matvec"),
    ("products", r"nvjet|gemm|cutlass|cublas"),
    ("copies", r"memcpy|memset|dynamic_update_slice|wrapped_(slice|concatenate)"),
    ("elementwise", r""),
]


def kernels(folder: pathlib.Path) -> list[tuple[str, float, float]]:
    """Name, start and duration, in microseconds, of what ran on the GPU."""
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    return [
        (event["name"], event["ts"], event["dur"])
        for event in events
        if event.get("ph") == "X"
        and "/device:GPU" in processes.get(event["pid"], "")
        and "Stream" in threads.get((event["pid"], event["tid"]), "")
    ]


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    return next(k for k, words in KINDS if re.search(words, name, re.IGNORECASE))


def top(events: list[tuple[str, float, float]], count: int) -> str:
    """The names that take longest, as lines of a table."""
    taken = collections.defaultdict(list)
    for name, _, microseconds in events:
        taken[name].append(microseconds)
    rows = sorted(taken.items(), key=lambda item: -sum(item[1]))[:count]
    return "\n".join(
        f"{sum(each) / 1e3:9.2f} ms {len(each):6d} x {sum(each) / len(each):9.1f} us  "
        f"{name[:100]}"
        for name, each in rows
    )


def busy(events: list[tuple[str, float, float]]) -> float:
    """Microseconds in which at least one of the events goes on."""
    total, end = 0.0, 0.0
    for _, start, taken in sorted(events, key=lambda event: event[1]):
        total += max(start + taken - max(start, end), 0)
        end = max(end, start + taken)
    return total


def breakdown(
    events: list[tuple[str, float, float]], thin: float
) -> dict[str, tuple[float, int]]:
    """Milliseconds and number of kernels of each kind, and of the gaps between them.

    Args:
        events: name, start and duration of each kernel.
        thin: products that take fewer microseconds are those of adapters.
    """
    found: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    last = max(
        (start for name, start, _ in events if "prod" in kind_of(name)), default=0
    )
    host = [event for event in events if kind_of(event[0]) == KINDS[0][0]]
    rest = [event for event in events if kind_of(event[0]) != KINDS[0][0]]
    for name, start, taken in rest:
        kind = kind_of(name) if start <= last else "optimizer"
        if kind == "products":
            kind = "products of adapters" if taken < thin else "products of the base"
        total, count = found[kind]
        found[kind] = total + taken / 1e3, count + 1
    if host:
        found[KINDS[0][0]] = (busy(events) - busy(rest)) / 1e3, len(host)
    begin = min(start for _, start, _ in events)
    end = max(start + taken for _, start, taken in events)
    found["gaps"] = (end - begin - busy(events)) / 1e3, 0
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def table(parts: dict[str, tuple[float, int]]) -> str:
    """The parts as a table in Markdown."""
    total = sum(time for time, _ in parts.values())
    lines = ["| | ms | share | kernels |", "|---|---|---|---|"]
    for name, (time, count) in parts.items():
        lines.append(f"| {name} | {time:.1f} | {time / total:.0%} | {count or ''} |")
    return "\n".join([*lines, f"| the step | {total:.1f} | | |"])


def draw(parts: dict[str, tuple[float, int]], path: pathlib.Path) -> None:
    """Draws the parts as one bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2), layout="constrained")
    axes = figure.add_subplot(xlabel="milliseconds of a step", yticks=[])
    left = 0.0
    for name, (time, _) in parts.items():
        axes.barh(0, time, left=left, label=f"{name}, {time:.0f}")
        left += time
    axes.set_xlim(0, left)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a step goes.")
    parser.add_argument("trace", type=pathlib.Path, help="the folder of a trace")
    parser.add_argument("--out", type=pathlib.Path, help="a .png to draw")
    parser.add_argument("--thin", type=float, default=90.0, help="microseconds")
    parser.add_argument("--top", type=int, default=0, help="kernels to list by name")
    arguments = parser.parse_args()
    events = kernels(arguments.trace)
    parts = breakdown(events, arguments.thin)
    print(table(parts))
    if arguments.top:
        print(top(events, arguments.top))
    if arguments.out:
        draw(parts, arguments.out)


if __name__ == "__main__":
    main()
