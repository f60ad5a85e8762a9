"""report.html of a run, and `cook report`: one file that opens from disk, without a network. Several runs are compared."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from cookbook.charts import TEMPLATES, figure, page, short
from cookbook.curves import all_charts, headline_charts
from cookbook.errors import UsageError
from cookbook.progress import duration
from cookbook.report_evals import evals_of, past_evals
from cookbook.report_reader import reader_sets
from cookbook.run_list import RunLine, line_of
from cookbook.run_reader import RUNS, PastRun, read_run, runs_in
from cookbook.settings import changed, settings_of, shown

FILE = "report.html"
LOG_LINES = 60  # of console.log, the last ones
TILES = {
    "progress/tokens": "tokens",
    "progress/episodes": "episodes",
    "perf/train_tokens_per_second": "trained tokens/s",
    "perf/sample_tokens_per_second": "sampled tokens/s",
    "perf/peak_memory_gb": "GB of memory, peak",
}
MISSING = 3  # ranges of steps that are named

Rows = Sequence[Mapping[str, float]]


def report(names: Sequence[str], to: Path | None) -> Path:
    """The page of one run, or of several side by side; a sweep stands for its runs. Returns where it lies."""
    runs = [run for name in names for run in _named(name)]
    if len(runs) == 1:
        return write_report(runs[0], to)
    from cookbook.report_compare import comparison

    file = to or (RUNS if RUNS.is_dir() else Path()) / "comparison.html"
    return _write(file, comparison(runs))


def write_report(run: PastRun, to: Path | None = None) -> Path:
    """RUN/report.html, or `to`."""
    return _write(to or run.directory / FILE, run_page(run))


def _named(name: str) -> list[PastRun]:
    for directory in (Path(name), RUNS / name):
        if not (directory / "config.yaml").is_file() and (jobs := runs_in(directory)):
            return [read_run(job) for job in jobs]
    return [read_run(name)]


def _write(file: Path, text: str) -> Path:
    """Aside, then renamed: a browser never reads half a page, and two writers do not mix."""
    if file.is_dir():
        raise UsageError(f"--to {file} is a directory; give a file, such as {file / FILE}")
    aside = file.with_name(f".{file.name}.{os.getpid()}.aside")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"cannot write {file}: {error.strerror}; give another place with --to FILE") from error
    return file


class AutoReport:
    """The page of a run under way. It never fails the run, and takes at most a fiftieth of its time."""

    def __init__(self, directory: Path, note: Callable[[str], None]) -> None:
        self._directory, self._note = directory, note
        self._due = 0.0  # by time.monotonic()

    def at_checkpoint(self) -> None:
        if time.monotonic() >= self._due:
            self.at_end()

    def at_end(self) -> None:
        started = time.monotonic()
        try:
            write_report(read_run(self._directory))
        except Exception as error:  # the page shows the run, it is not the run
            self._note(f"{FILE} could not be written ({type(error).__name__}: {error}); cook report tries again")
        ended = time.monotonic()
        self._due = ended + 50 * (ended - started)


def run_page(run: PastRun) -> str:
    """The whole document of one run."""
    rows, sets, line = run.metrics(), reader_sets(run), line_of(run)
    settings = _settings(run)
    sections = {
        "measured": ("Measured afterwards", evals_of(run)),
        "reader": ("What it read and wrote", _reader(sets) if sets else ""),
        "curves": ("All curves", all_charts({run.name: rows}) if rows else ""),
        "settings": ("Settings", settings),
        "record": ("Record", _record(run)),
    }
    there = {key: pair for key, pair in sections.items() if pair[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in there.items())
    body = [header(run, line), *_notices(run, line, rows), _tiles(rows, line), f"<nav>{links}</nav>", headline_charts(rows)]
    body.append(_evaluations(rows))
    body += [f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, (title, html) in there.items()]
    return page(run.name, "\n".join(filter(None, body)), styles=_template("report.css"), scripts=_template("report.js"))


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def header(run: PastRun, line: RunLine) -> str:
    command = " ".join([_command(run), *map(_quoted, run.overrides)])
    model = run.config.get("model")
    about = [
        line.recipe,
        str(model.get("name", "")) if isinstance(model, dict) else "",
        (line.started or "")[:16].replace("T", " "),
    ]
    return (
        f'<header><h1>{escape(run.name)} <span class="state {line.state}">{line.state}</span></h1>'
        f'<p class="about">{" · ".join(escape(part) for part in about if part)}</p>'
        f'<p class="command"><code>{escape(command)}</code></p></header>'
    )


def _command(run: PastRun) -> str:
    from cookbook.compose import DEFAULT_RECIPE

    kind, _, file = run.recipe.partition("/")
    if not run.recipe or run.recipe.endswith(".py"):
        return f"cook run {run.recipe}".strip()
    named = any(word.startswith("recipe=") for word in run.overrides)
    return f"cook {kind}" if named or DEFAULT_RECIPE.get(kind) == file else f"cook {kind} recipe={file}"


def _quoted(word: str) -> str:
    return word if all(c.isalnum() or c in "=._-/:+~@,%" for c in word) else "'" + word.replace("'", "'\\''") + "'"


def _notices(run: PastRun, line: RunLine, rows: Rows) -> list[str]:
    """What a person should know before reading: how it ended, what is missing, what cannot be read."""
    now, newest = time.strftime("%Y-%m-%d %H:%M:%S"), run.newest
    after = f"after step {newest['step']}, its newest checkpoint" if newest else "from the start: there is no checkpoint"
    notices: list[tuple[str, str]] = []
    if line.state == "running":
        notices.append(("calm", f"Going on. This is how it stood on {now}; cook report {run.name} looks again."))
    elif line.state == "killed":
        notices.append(("warn", f"Killed: it left no result. cook resume {run.name} goes on {after}."))
    elif line.state == "interrupted":
        notices.append(("warn", f"Stopped after step {line.steps}. cook resume {run.name} goes on {after}."))
    elif line.state == "failed":
        notices.append(("bad", f"Failed after step {line.steps}: {(run.result or {}).get('error', 'no reason was left')}"))
    if gaps := _gaps(rows):
        notices.append(("warn", f"metrics.jsonl has no row for {gaps}."))
    problems = [*run.unreadable, *run.rows("metrics.jsonl")[1], *run.rows("checkpoints.jsonl")[1], *past_evals(run)[1]]
    notices += [("warn", problem) for problem in problems[:5]]
    if not rows:
        notices.append(("calm", "No step has been logged yet."))
    return [f'<p class="notice {kind}">{escape(text)}</p>' for kind, text in notices]


def _gaps(rows: Rows) -> str:
    steps = sorted({int(row["progress/step"]) for row in rows if "progress/step" in row} | {0})
    gaps = [(a + 1, b - 1) for a, b in itertools.pairwise(steps) if b > a + 1]
    named = [f"step {first}" if first == last else f"steps {first} to {last}" for first, last in gaps[:MISSING]]
    return ", ".join(named) + (f" and {len(gaps) - MISSING} more ranges" if len(gaps) > MISSING else "")


def _tiles(rows: Rows, line: RunLine) -> str:
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    tiles = []
    if line.value is not None:
        metric = (line.metric or "").removeprefix("eval/")
        was = f"<small>from {figure(line.before)}</small>" if line.before is not None else ""
        tiles.append((metric, figure(line.value) + was))
    done = last.get("progress/done_frac")
    of = f"<small>of {round(line.steps / done)}</small>" if done and 0 < done < 1 else ""
    tiles.append(("steps", f"{line.steps:,}{of}"))
    if line.seconds is not None:
        tiles.append(("time", duration(line.seconds)))
    for metric, name in TILES.items():
        if metric in last:
            values = sorted(row[metric] for row in rows if metric in row)
            value = values[len(values) // 2] if "per_second" in metric else values[-1]
            tiles.append((name, short(float(f"{value:.3g}")) if value >= 100 else f"{value:.3g}"))
    cells = (f'<div class="tile"><span>{escape(name)}</span><b>{value}</b></div>' for name, value in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _evaluations(rows: Rows) -> str:
    """Every eval/* before the first step and at its newest."""
    first = next((row for row in rows if row.get("progress/step") == 0), {})
    last = {key: (value, row) for row in rows for key, value in row.items() if key.startswith("eval/")}
    lines = []
    for key, (value, row) in last.items():
        before = first.get(key)
        change = f"{(value - before) / abs(before):+.0%}" if before else ""
        cells = (figure(before) if before is not None else "", figure(value), change, figure(row.get("progress/step", 0)))
        lines.append(f"<tr><td>{escape(key.removeprefix('eval/'))}</td>" + "".join(map(_number_cell, cells)) + "</tr>")
    if not lines:
        return ""
    head = "".join(f'<th class="num">{name}</th>' for name in ("before", "newest", "change", "at step"))
    return f'<div class="scroll"><table class="evals"><tr><th>evaluation</th>{head}</tr>{"".join(lines)}</table></div>'


def _number_cell(text: str) -> str:
    return f'<td class="num">{escape(text)}</td>'


def _reader(sets: list[dict]) -> str:
    """The data, for report.js to show; `<` is written so that no text in it can end the script."""
    data = json.dumps(sets, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<script type="application/json" id="reader-data">{data}</script><div id="reader-view" class="reader"></div>'
        "<noscript>Reading rollouts and data needs JavaScript.</noscript>"
    )


def _settings(run: PastRun) -> str:
    settings, differ = settings_of(run), changed(run)
    rows = [
        f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(shown(value))}</code></td>"
        f'<td class="default"><code>{escape(shown(default))}</code></td></tr>'
        for key, (value, default) in differ.items()
    ]
    table = f"<tr><th>key</th><th>value</th><th>default of the recipe</th></tr>{''.join(rows)}"
    told = f'<div class="scroll"><table class="settings">{table}</table></div>' if rows else ""
    if not told:
        told = "<p>The recipe's defaults are not known here, so nothing is marked as changed.</p>" if settings else ""
    every = "\n".join(f"{key}={shown(value)}" for key, value in settings.items())
    return (
        f"{told}<details><summary>All {len(settings)} settings</summary><pre>{escape(every)}</pre></details>"
        if settings
        else ""
    )


def _record(run: PastRun) -> str:
    best = run.best
    checkpoints = [
        f"<tr>{_number_cell(str(row['step']))}<td>{'best' if best and row['step'] == best['step'] else ''}</td>"
        f"<td><code>{escape(str(row.get('path') or row['uri']))}</code></td></tr>"
        for row in run.checkpoints
    ]
    head = '<tr><th class="num">step</th><th></th><th>checkpoint</th></tr>'
    html = f'<div class="scroll"><table>{head}{"".join(checkpoints)}</table></div>' if checkpoints else "<p>No checkpoint.</p>"
    git = run.run.get("git") or {}
    facts = {"directory": str(run.directory), **{str(k): str(v) for k, v in (run.run.get("versions") or {}).items()}}
    if git.get("revision"):
        facts["git revision"] = f"{git['revision']}{' with changes (code.diff)' if git.get('dirty') else ''}"
    facts |= {f"resumed {i}": str(session.get("started", "")) for i, session in enumerate(run.run.get("resumed", []), start=1)}
    lines = "".join(f"<tr><td>{escape(key)}</td><td><code>{escape(value)}</code></td></tr>" for key, value in facts.items())
    html += f'<details><summary>Versions and directory</summary><div class="scroll"><table>{lines}</table></div></details>'
    if log := _log_tail(run):
        is_open = " open" if run.state == "failed" else ""
        html += f"<details{is_open}><summary>End of console.log</summary><pre>{escape(log)}</pre></details>"
    return html


def _log_tail(run: PastRun) -> str:
    try:
        with (run.directory / "console.log").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 100_000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-LOG_LINES:])
    except OSError:
        return ""
