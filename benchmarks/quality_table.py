"""The table of `benchmarks/quality.py`: means over seeds, and their spread.

python -m benchmarks.quality_table prints that of benchmarks/results/quality.json.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Sequence

PATH = pathlib.Path(__file__).parent / "results" / "quality.json"

_HEADER = """\
| task | method | seeds | loss before | loss after | right before | right after | \
tokens/s | GB |
|---|---|---|---|---|---|---|---|---|"""


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
        f"{statistics.mean(values('tokens_per_s')):,.0f}",
        f"{max(values('step_gb')):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    mean, deviation = spread(values)
    if math.isnan(deviation):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    print(table(json.loads(PATH.read_text())["rows"]))
