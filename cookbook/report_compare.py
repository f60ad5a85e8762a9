"""Several runs on one page: how each ended, overlaid curves, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from cookbook.charts import TEMPLATES, colour_class, figure, legend_of, page
from cookbook.curves import all_charts
from cookbook.progress import duration
from cookbook.report_evals import evals_compared
from cookbook.run_list import line_of
from cookbook.run_reader import PastRun
from cookbook.settings import differing, shown


def comparison(runs: Sequence[PastRun]) -> str:
    """The document; runs are told apart by name and colour."""
    named = _names(runs)
    colours = {name: index for index, name in enumerate(named)}
    rows = {name: run.metrics() for name, run in named.items()}
    if measured := evals_compared(named, colours):
        measured = f"<h2>Measured by cook eval</h2>{measured}"
    body = [
        f"<header><h1>{len(named)} runs compared</h1></header>", _outcomes(named, colours), "<h2>Settings that differ</h2>",
        _settings(named, colours), measured, '<h2 id="curves">Curves</h2>',
        f'<div class="sticky">{legend_of(named, colours)}</div>', all_charts(rows),
    ]  # fmt: skip
    problems = [
        f"{name}: {problem}" for name, run in named.items() for problem in (*run.unreadable, *run.rows("metrics.jsonl")[1])
    ]
    body[1:1] = [f'<p class="notice warn">{escape(problem)}</p>' for problem in problems[:8]]
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return page(f"{len(named)} runs compared", "\n".join(body), styles=style)


def _names(runs: Sequence[PastRun]) -> dict[str, PastRun]:
    """Short names where they tell the runs apart (0 and 1 of two sweeps do not); a run given twice counts once."""
    runs = list({run.directory: run for run in runs}.values())
    short = [Path(run.name).name for run in runs]
    clear = [short.count(name) == 1 and not name.isdigit() for name in short]
    return {(name if alone else run.name): run for name, alone, run in zip(short, clear, runs, strict=True)}


def _outcomes(named: dict[str, PastRun], colours: dict[str, int]) -> str:
    lines = []
    for name, run in named.items():
        line = line_of(run)
        values = [
            (line.metric or "").removeprefix("eval/"),
            *("" if v is None else figure(v) for v in (line.before, line.value)),
        ]
        cells = [*values, f"{line.steps:,}", "" if line.seconds is None else duration(line.seconds)]
        numbers = "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells[1:])
        lines.append(
            f'<tr><td><i class="swatch {colour_class(colours[name])}"></i>{escape(name)}</td>'
            f'<td><span class="state {line.state}">{line.state}</span></td><td>{escape(cells[0])}</td>{numbers}</tr>'
        )
    head = "<th>run</th><th>state</th><th>metric</th>"
    head += "".join(f'<th class="num">{title}</th>' for title in ("before", "newest", "steps", "time"))
    return f'<div class="scroll"><table class="outcomes"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _settings(named: dict[str, PastRun], colours: dict[str, int]) -> str:
    rows = differing(named)
    recipes = [run.recipe for run in named.values()]
    if len(set(recipes)) > 1:
        rows = {"recipe": list(recipes), **rows}
    if not rows:
        return "<p>None: they have the same settings.</p>"
    heads = [f'<i class="swatch {colour_class(colours[name])}"></i>{escape(name)}' for name in named]
    keys = [f"<code>{escape(key)}</code>" for key in rows]
    cells = [[f"<code>{escape(shown(value))}</code>" for value in values] for values in rows.values()]
    if len(heads) > max(3, len(keys)):  # a sweep: a line for each run
        heads, keys, cells, corner = keys, heads, [list(column) for column in zip(*cells, strict=True)], "run"
    else:
        corner = "key"
    lines = (
        f"<tr><td>{head}</td>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>"
        for head, line in zip(keys, cells, strict=True)
    )
    titles = "".join(f"<th>{head}</th>" for head in (corner, *heads))
    return f'<div class="scroll"><table class="settings"><tr>{titles}</tr>{"".join(lines)}</table></div>'
