"""The charts of a report: which metrics there are, in what order and under which heading, one run or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from cookbook.charts import MAX_POINTS, Points, line_chart

GROUPS = {  # first part of a metric's name -> heading, in the order of a page
    "eval": "Evaluation", "train": "Training", "dpo": "Preferences", "env": "Rewards and turns", "group": "Groups",
    "sampling": "Sampling", "kl": "Distance between policies", "ratio": "Importance ratios", "optim": "Optimizer",
}  # fmt: skip
FOLDED = {"perf": "Speed and memory", "time": "Seconds", "progress": "Progress"}  # last, and closed until one asks
HEADLINES = ("nll", "loss", "reward", "correct", "accuracy", "margin")  # last part of what a run is about
TRAINED = ("train/{}", "dpo/{}", "env/all/{}")  # where training has these
ALL_POINTS = 45_000  # of a page, so that it stays small whatever was logged

Rows = Sequence[Mapping[str, float]]


def points_of(rows: Rows, metric: str) -> Points:
    return [(row["progress/step"], row[metric]) for row in rows if metric in row and "progress/step" in row]


def metric_groups(metrics: Sequence[str]) -> dict[str, list[str]]:
    """First part of the name -> names, known groups first; metrics without a slash are a group ""."""
    found: dict[str, list[str]] = {}
    for metric in metrics:
        if metric != "progress/step":
            found.setdefault(metric.partition("/")[0] if "/" in metric else "", []).append(metric)
    known = [*GROUPS, *sorted(set(found) - {*GROUPS, *FOLDED}), *FOLDED]
    return {group: found[group] for group in known if group in found}


def headline_charts(rows: Rows) -> str:
    """What was trained on and what was held out, in one chart for each thing that both measure."""
    metrics = _metrics([rows])
    charts = []
    for last in HEADLINES:
        names = [form.format(last) for form in TRAINED if form.format(last) in metrics]
        names += [name for name in metrics if name.startswith("eval/") and name.rpartition("/")[2] == last]
        if names:
            charts.append(line_chart({name: points_of(rows, name) for name in names}, last, smooth=True, legend=True))
    return f'<div class="charts large">{"".join(charts[:4])}</div>' if charts else ""


def all_charts(runs: Mapping[str, Rows]) -> str:
    """A chart per metric under its heading; of several runs, each has its colour in all of them."""
    metrics = _metrics(list(runs.values()))
    alone = len(runs) == 1
    colours = {name: index for index, name in enumerate(runs)}
    lines = sum(metric in row_names for row_names in map(_names, runs.values()) for metric in metrics)
    room = max(40, min(MAX_POINTS, ALL_POINTS // max(1, lines)))
    sections = []
    for group, members in metric_groups(metrics).items():
        charts = "".join(
            line_chart(
                {name: points for name, rows in runs.items() if (points := points_of(rows, metric))},
                metric, smooth=group not in ("eval", "progress") and metric != "optim/lr", legend=False,
                colours=colours, max_points=room,
            )
            for metric in members
        )  # fmt: skip
        heading = escape(GROUPS.get(group) or FOLDED.get(group) or group or "Other")
        if group in FOLDED or (alone and len(sections) > 12):
            sections.append(f'<details><summary>{heading}</summary><div class="charts">{charts}</div></details>')
        else:
            sections.append(f'<h3>{heading}</h3><div class="charts">{charts}</div>')
    return "\n".join(sections)


def _metrics(tables: Sequence[Rows]) -> list[str]:
    """Every name in the order of its first row."""
    return list(dict.fromkeys(name for rows in tables for name in _names(rows)))


def _names(rows: Rows) -> dict[str, None]:
    return dict.fromkeys(name for row in rows for name in row)
