"""A run to read: a page of text with its curves, made from what the folder holds."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from qlora_jax import atomic

Line = dict[str, Any]

# Of the last line: what is shown, and how.
_SHOWN = {
    "eval_loss_before": ("Held-out loss before", "{:.4f}"),
    "eval_loss": ("Held-out loss after", "{:.4f}"),
    "perplexity": ("Perplexity after", "{:.2f}"),
    "mmlu": ("MMLU after", "{:.1%}"),
    "best_eval_loss": ("Lowest held-out loss while training", "{:.4f}"),
    "best_step": ("Steps until then", "{}"),
    "skipped": ("Steps skipped (no finite gradient)", "{}"),
    "seconds": ("Seconds", "{:,.0f}"),
    "tokens_per_s_median": ("Tokens a second, median of the steps", "{:,}"),
    "peak_rss_gb": ("Peak memory of the process, GB", "{:.2f}"),
    "peak_device_gb": ("Peak memory of the device, GB", "{:.2f}"),
}


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """Writes `report.md`, `loss.png` and `curves.png` into the folder of a run.

    Needs `matplotlib`.

    Args:
        folder: with `metrics.jsonl` and, if they are to be shown, `config.yaml`,
            `data.json` and `environment.json`.
    """
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    plot_loss(lines, folder / "loss.png")
    plot_curves(lines, folder / "curves.png")
    path = folder / "report.md"
    atomic.write(path, "\n".join(_page(folder, lines)) + "\n")
    return path


def plot_loss(lines: Sequence[Line], path: pathlib.Path) -> None:
    """Draws the loss over the steps into a PNG file; needs `matplotlib`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a token")
    axes.plot(*_series(lines, "loss"), label="training")
    if _series(lines, "eval_loss")[0]:
        axes.plot(*_series(lines, "eval_loss"), "o--", label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_curves(lines: Sequence[Line], path: pathlib.Path) -> None:
    """Draws learning rate, gradient norm and throughput; needs `matplotlib`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    names = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_s": "tokens a second",
    }
    for place, (name, label) in enumerate(names.items(), 1):
        axes = figure.add_subplot(1, 3, place, xlabel="step", title=label)
        axes.plot(*_series(lines, name))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _page(folder: pathlib.Path, lines: Sequence[Line]) -> list[str]:
    last = lines[-1]
    page = [f"# {folder.name}", ""]
    page += ["| | |", "|---|---|", f"| Steps | {last['step']} |"]
    for name, (label, form) in _SHOWN.items():
        if last.get(name) is not None:
            page.append(f"| {label} | {form.format(last[name])} |")
    page += ["", "![Loss](loss.png)", "", "![Curves](curves.png)", ""]
    # The last line repeats the numbers of the last evaluation.
    evaluations = {x["step"]: x for x in lines if "eval_loss" in x}
    if len(evaluations) > 2:
        page += _evaluations(list(evaluations.values()))
    sampled = [x["samples"] for x in lines if x.get("samples")]
    if sampled:
        page += _samples(sampled[0], sampled[-1])
    for title, name, language in (
        ("Settings", "config.yaml", "yaml"),
        ("Data", "data.json", "json"),
        ("Environment", "environment.json", "json"),
    ):
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8").strip()
            page += [f"## {title}", "", f"```{language}", text, "```", ""]
    return page


def _evaluations(lines: Sequence[Line]) -> list[str]:
    names = [n for n in ("eval_loss", "perplexity", "mmlu") if n in lines[-1]]
    page = ["## Evaluations", "", f"| step | {' | '.join(names)} |"]
    page += ["|---" * (len(names) + 1) + "|"]
    for line in lines:
        values = [f"{line[n]:.4f}" if line.get(n) is not None else "" for n in names]
        page.append(f"| {line['step']} | {' | '.join(values)} |")
    return [*page, ""]


def _samples(before: Sequence[Line], after: Sequence[Line]) -> list[str]:
    """Answers before and after; texts are indented, so that nothing in them counts."""
    page = ["## Samples", ""]
    for first, last in zip(before, after, strict=False):
        for title, text in (
            ("Prompt", first["prompt"]),
            ("Before", first["answer"]),
            ("After", last["answer"]),
            ("Wanted", first.get("wanted")),
        ):
            if text is not None:
                page += [f"**{title}**", "", *_indented(text), ""]
        page += ["---", ""]
    return page


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.split("\n")] if text else ["    (nothing)"]
