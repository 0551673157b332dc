"""The table of `benchmarks/quality.py`: means over seeds, and their spread.

python -m benchmarks.quality_table                 of benchmarks/results/quality.json
python -m benchmarks.quality_table FILE FILE ...   writes that file from several
"""

import json
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence

PATH = pathlib.Path(__file__).parent / "results" / "quality.json"

_HEADER = """\
| task | method | seeds | loss before | loss after | right before | right after | GB |
|---|---|---|---|---|---|---|---|"""


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the standard deviation of a sample; NaN of one value."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    return statistics.mean(values), statistics.stdev(values)


def standard_error(share: float, count: int) -> float:
    """Returns how far a share of so many independent answers is off, typically."""
    return math.sqrt(share * (1 - share) / count)


def table(rows: Sequence[dict]) -> str:
    """Returns a line for each task and method, in Markdown.

    Args:
        rows: a dict for each task, method and seed, as in the JSON.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    lines = [_HEADER]
    for task in dict.fromkeys(task for task, _ in groups):
        for (name, method), own in groups.items():
            if name == task:
                lines.append(_line(task, method, own))
    return "\n".join(lines)


def _line(task: str, method: str, rows: Sequence[dict]) -> str:
    def values(name: str, scale: float = 1) -> list[float]:
        return [scale * row[name] for row in rows]

    cells = [
        task,
        method,
        str(len(rows)),
        f"{statistics.mean(values('loss_before')):.4f}",
        _mean_and_spread(values("loss_after"), 4),
        f"{statistics.mean(values('accuracy_before', 100)):.1f} %",
        f"{_mean_and_spread(values('accuracy_after', 100), 1)} %",
        f"{max(values('step_gb')):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    mean, deviation = spread(values)
    if math.isnan(deviation):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def merged(documents: Sequence[dict]) -> dict:
    """Returns one document of those of several processes.

    Raises:
        ValueError: if they differ in more than their rows.
    """
    lists = ("rows", "sweep")
    settings = [{k: v for k, v in d.items() if k not in lists} for d in documents]
    for one in settings[1:]:
        if one != settings[0]:
            raise ValueError(
                f"The runs differ: {settings[0]} and {one}. Give those of one machine "
                "and the same settings."
            )
    together = {name: [row for d in documents for row in d[name]] for name in lists}
    return settings[0] | together


if __name__ == "__main__":
    if len(sys.argv) > 1:
        found = [json.loads(pathlib.Path(path).read_text()) for path in sys.argv[1:]]
        PATH.write_text(json.dumps(merged(found), indent=1) + "\n")
    print(table(json.loads(PATH.read_text())["rows"]))
