"""What came of a sweep: a table on the screen, best first, sweep.json, and sweep.html with the jobs' curves over each other."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from cookbook import records
from cookbook.charts import colour_class, figure, legend_of, line_chart, page
from cookbook.divergence import has_diverged
from cookbook.progress import duration
from cookbook.run_reader import PastRun, falls, read_run, runs_in
from cookbook.sweep import out_of, short

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"failed": "red", "diverged": "red", "not begun": "yellow", "killed": "magenta", "interrupted": "yellow"}
LEADING = ("train/nll", "dpo/loss", "env/all/reward")  # charts that come first, then evaluations


@dataclass(frozen=True)
class Ended:
    """A job after its end."""

    run: PastRun
    varied: str  # "learning_rate=1e-4 lora.rank=8"
    state: str  # of the run, or diverged
    value: float | None  # of the metric

    @property
    def steps(self) -> int:
        return int((self.run.result or {}).get("steps", 0))

    @property
    def seconds(self) -> float:
        return float((self.run.result or {}).get("seconds", 0.0))


def summarise(directory: Path, values: list[tuple[Path, list[str]]], metric: str | None, console: Console) -> list[Ended]:
    """Print the table, and write sweep.json and sweep.html into the sweep's directory. The jobs, best first."""
    varied = {path: " ".join(words) for path, words in values}
    runs = [read_run(path) for path in runs_in(directory)]
    name = metric or next((found[0] for run in runs if (found := run.best_metric)), None)
    falling = name is not None and falls(name)
    jobs = [_ended(run, varied.get(run.directory, run.directory.name), name) for run in runs]
    jobs.sort(key=lambda job: _order(job, falling))
    begun = {job.run.directory for job in jobs}
    missing = [(path, words) for path, words in values if path not in begun]
    record = {
        "metric": name,
        "better": "lower" if falling else "higher",
        "jobs": [
            {"run": str(job.run.directory.relative_to(directory)), "varied": job.varied, "state": job.state,
             "value": job.value, "steps": job.steps, "seconds": job.seconds} for job in jobs
        ] + [{"run": path.name, "varied": " ".join(words), "state": _lost(path)} for path, words in missing],
    }  # fmt: skip
    _print(console, directory, name, jobs, missing)
    try:
        records.replace(directory / "sweep.json", json.dumps(records.strict(record), indent=1) + "\n")
        records.replace(directory / "sweep.html", sweep_page(directory.name, name, jobs, missing))
    except OSError as error:  # the disk is full, say, which ended the jobs too
        console.print(f"not written: {directory}: {error.strerror}", highlight=False, markup=False, soft_wrap=True)
    return jobs


def _ended(run: PastRun, varied: str, metric: str | None) -> Ended:
    rows = run.metrics()
    values = [row[metric] for row in rows if metric in row] if metric else []
    state = "diverged" if has_diverged(rows) else run.state
    return Ended(run, varied, state, values[-1] if values else None)


def _order(job: Ended, falling: bool) -> tuple[int, float]:
    """Completed ones first, by value; what diverged or failed last."""
    rank = {"completed": 0, "interrupted": 1, "running": 1, "killed": 2, "diverged": 3, "failed": 4}[job.state]
    value = math.inf if job.value is None or not math.isfinite(job.value) else job.value if falling else -job.value
    return rank, value


def _print(
    console: Console, directory: Path, metric: str | None, jobs: list[Ended], missing: list[tuple[Path, list[str]]]
) -> None:
    from rich.table import Table

    table = Table("job", "varied", "state", metric or "", "steps", "time", box=None, pad_edge=False)
    for job in jobs:
        value = "-" if job.value is None else f"{job.value:.4f}"
        number = job.run.directory.name.partition("_")[0]
        table.add_row(number, job.varied, job.state, value, str(job.steps), duration(job.seconds), style=STYLES.get(job.state))
    for path, words in missing:
        table.add_row(path.name.partition("_")[0], " ".join(words), state := _lost(path), "-", "0", "-", style=STYLES[state])
    console.print()
    console.print(table)
    console.print(f"\nsweep       {short(directory)}", highlight=False)
    console.print(f"curves      {short(directory / 'sweep.html')}", highlight=False)
    if jobs and jobs[0].state == "completed":
        console.print(f"best        {short(jobs[0].run.directory)}", highlight=False, soft_wrap=True)
    for path in (path for path, _ in missing if _lost(path) == "failed"):
        last = out_of(path).read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        console.print(f"failed      {path.name}: {last[-1]}", highlight=False, markup=False, soft_wrap=True)
    if stopped := [job.run for job in jobs if job.state in ("interrupted", "killed")]:
        console.print(f"resume      cook resume {short(stopped[0].directory)}", highlight=False, markup=False, soft_wrap=True)


def _lost(path: Path) -> str:
    """The state of a job that left no run: it failed before, or was never begun."""
    return "failed" if out_of(path).exists() else "not begun"


def sweep_page(title: str, metric: str | None, jobs: list[Ended], missing: list[tuple[Path, list[str]]]) -> str:
    """A page that opens from disk: the table, whose jobs lead to their reports, and a chart for each metric that jobs share."""
    names = [_name(job.run.directory, job.varied) for job in jobs]
    colours = {name: index for index, name in enumerate(names)}
    rows = {name: job.run.metrics() for name, job in zip(names, jobs, strict=True)}
    charts = []
    for key in _charted(rows, metric):
        series = {name: [(row.get("progress/step", 0.0), row[key]) for row in rows[name] if key in row] for name in names}
        charts.append(line_chart(series, key, legend=False, colours=colours))
    lines = [
        _line(_linked(name, job.run.directory), colour_class(colours[name]), job.state,
              "-" if job.value is None else figure(job.value), str(job.steps), duration(job.seconds))
        for name, job in zip(names, jobs, strict=True)
    ]  # fmt: skip
    lines += [_line(escape(_name(path, " ".join(words))), "", _lost(path), "-", "0", "-") for path, words in missing]
    numbers = "".join(f'<th class="num">{escape(title)}</th>' for title in (metric or "value", "steps", "time"))
    body = (
        f"<h1>{escape(title)}</h1>\n<table><tr><th>job</th><th>state</th>{numbers}</tr>{''.join(lines)}</table>\n"
        f'{legend_of(names, colours)}\n<div class="charts">{"".join(charts)}</div>'
    )
    return page(title, body)


def _line(job: str, colour: str, state: str, *numbers: str) -> str:
    cells = "".join(f'<td class="num">{number}</td>' for number in numbers)
    return f'<tr><td class="{colour}">{job}</td><td>{state}</td>{cells}</tr>'


def _name(path: Path, varied: str) -> str:
    return f"{path.name.partition('_')[0]}: {varied}"


def _linked(name: str, run: Path) -> str:
    """A link to the run's own page, where it has one."""
    if not (run / "report.html").is_file():
        return escape(name)
    return f'<a href="{quote(run.name)}/report.html">{escape(name)}</a>'


def _charted(rows: dict[str, list[dict[str, float]]], metric: str | None) -> list[str]:
    keys = {key for job in rows.values() for row in job for key in row}
    first = [key for key in (metric, *LEADING) if key in keys]
    others = sorted(key for key in keys if key.startswith(("eval/", "optim/grad_norm", "optim/lr", "dpo/margin")))
    return [str(key) for key in dict.fromkeys([*first, *others])]
