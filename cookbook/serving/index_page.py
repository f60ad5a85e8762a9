"""The page at /: base models, training clients, queues and checkpoints as one owner may see them. It runs no script."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from cookbook.charts import TEMPLATES, document, short
from cookbook.progress import duration
from cookbook.serving.meter import KINDS
from cookbook.serving.server import Run, Server
from cookbook.serving.store import Checkpoint
from core import SamplingClient

REFRESH_SECONDS = 10
NUM_CHECKPOINTS = 20  # the newest ones
LITTLE_ROOM = 2 << 30  # bytes
COUNTED = ("waiting", "running", "done", "mean wait", "mean time", "tokens", "steps", "rank", "context", "size", "parameters")


def index_page(server: Server, owner: str, url: str) -> str:
    """The whole document; `url` is where the reader reached the server."""
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "serve.css"))
    refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">\n'
    return document("cook serve", "\n".join(_Page(server, owner, url).parts()), styles=style, head=refresh)


@dataclass(frozen=True)
class _Page:
    server: Server
    owner: str
    url: str

    def parts(self) -> Iterable[str]:
        checkpoints = self.server.store.checkpoints("owner = ?", self.owner)
        yield self._header()
        yield from self._notices()
        yield self._tiles()
        yield _section("Base models", self._models())
        yield _section("Training clients", self._clients())
        yield _section("Queues", self._queues())
        yield _section("Checkpoints", self._checkpoints(checkpoints))
        yield _section("How to use them", self._examples(checkpoints))

    def _header(self) -> str:
        stopped = [name for name, client in self.server.base.items() if not client.engine.alive]
        state = '<span class="state failed">stopped</span>' if stopped else '<span class="state running">serving</span>'
        about = [f"up {duration(time.time() - self.server.started)}", time.strftime("%Y-%m-%d %H:%M:%S")]
        if self.server.needs_key:
            about.insert(0, f"as {self.owner} sees it")
        links = "".join(
            f'<p class="command"><span>{whose}</span><code>{escape(self.url + path)}</code></p>'
            for path, whose in (("", "tinker"), ("/v1", "openai"), ("/metrics", "Prometheus"))
        )
        return f'<header><h1>cook serve {state}</h1><p class="about">{escape(" · ".join(about))}</p>{links}</header>'

    def _notices(self) -> Iterable[str]:
        for name, client in self.server.base.items():
            if not client.engine.alive:
                yield _notice("bad", f"The engine of {name} has stopped. Nothing is done any more: start the server again.")
        free = shutil.disk_usage(self.server.store.directory).free
        if free < LITTLE_ROOM:
            yield _notice("warn", f"The disk of the store has {_bytes(free)} left; a save that does not fit fails.")

    def _tiles(self) -> str:
        server, owner = self.server, self.owner
        figures = server.meter.figures(owner)
        sampled = sum(figures.get(("cook_sampled_tokens_total", name), 0) for name in server.models)
        totals = server.store.totals(owner).values()
        tiles = [
            ("training clients", str(sum(run.owner == owner for run in server.runs.values())), ""),
            ("sessions", str(server.num_sessions(owner)), ""),
            ("operations waiting", str(server.promises.waiting(owner)), ""),
            ("trained tokens", short(figures.get(("cook_trained_tokens_total", ""), 0)), "since the start"),
            ("sampled tokens", short(sampled), "since the start"),
            ("checkpoints", str(sum(number for number, _ in totals)), _bytes(sum(size for _, size in totals))),
        ]
        cells = (
            f'<div class="tile"><span>{name}</span><b>{value}<small>{small}</small></b></div>' for name, value, small in tiles
        )
        return f'<div class="tiles">{"".join(cells)}</div>'

    def _models(self) -> str:
        rows = [_model_cells(name, client) for name, client in self.server.base.items()]
        return _table(("model", "context", "parameters", "kept as", "key-value cache"), rows)

    def _clients(self) -> str:
        runs = [run for run in self.server.runs.values() if run.owner == self.owner]
        if not runs:
            return '<p class="about">None is loaded.</p>'
        seen = {row["id"]: row for row in self.server.store.rows("SELECT id, seen, lora FROM runs WHERE owner = ?", self.owner)}
        runs.sort(key=lambda run: -seen[run.id]["seen"])
        rows = [self._client_cells(run, seen[run.id]["seen"], json.loads(seen[run.id]["lora"])["rank"]) for run in runs]
        return _table(("training client", "owner", "model", "rank", "steps", "tokens", "waiting", "last used"), rows)

    def _client_cells(self, run: Run, seen: float, rank: int) -> list[str]:
        steps = str(run.trainer.adapter.step) if run.trainer is not None else "opening"
        waiting = self.server.promises.waiting_of(run.id)
        about = [run.owner, run.base_model, str(rank), steps, short(run.trained_tokens), str(waiting), _ago(seen)]
        return [_code(run.id), *map(escape, about)]

    def _queues(self) -> str:
        """Of this owner; others' waiting is told as a number, since one waits behind them."""
        meter, figures, rows = self.server.meter, self.server.meter.figures(self.owner), []
        for kind in KINDS:
            waiting, running = meter.under_way(kind, self.owner)
            others = meter.under_way(kind)[0] - waiting
            done = figures.get(("cook_operation_seconds_count", kind), 0)
            if not (waiting or running or others or done):
                continue
            sums = [figures.get((f"cook_{what}_seconds_sum", kind), 0) for what in ("queue", "operation")]
            means = [_seconds(total / done) if done else "" for total in sums]
            behind = f"{waiting} <small>and {others} of others</small>" if others else str(waiting)
            rows.append([_code(kind), behind, str(running), f"{done:,.0f}", *means])
        head = ("operation", "waiting", "running", "done", "mean wait", "mean time")
        return _table(head, rows) if rows else '<p class="about">Nothing was asked for yet.</p>'

    def _checkpoints(self, checkpoints: Sequence[Checkpoint]) -> str:
        if not checkpoints:
            return '<p class="about">None yet.</p>'
        rows = []
        for one in checkpoints[:NUM_CHECKPOINTS]:
            kept = [f"{_span(one.expires - time.time())} more"] if one.expires is not None else []
            kept += ["public"] if one.public else []
            rows.append([_code(one.uri), _ago(one.created), _bytes(one.size), ", ".join(kept)])
        more = len(checkpoints) - len(rows)
        told = f'<p class="about">and {more:,} older ones: <code>tinker checkpoint list</code></p>' if more else ""
        return _table(("path", "saved", "size", "kept"), rows) + told

    def _examples(self, checkpoints: Sequence[Checkpoint]) -> str:
        first = next(iter(self.server.base))
        sampled = next((one.uri for one in checkpoints if one.kind == "sampler_weights"), None)
        trained = next((one.uri for one in checkpoints if one.kind == "weights"), None)
        base, url, key = _literal(first), _literal(self.url), '"tml-..."'
        openai = (
            f"import openai\n\nclient = openai.OpenAI(base_url={_literal(self.url + '/v1')}, api_key={key})\n"
            f'ask = [{{"role": "user", "content": "Name a colour."}}]\n'
            f"reply = client.chat.completions.create(model={_literal(sampled or trained or first)}, messages=ask)\n"
            "print(reply.choices[0].message.content)"
        )
        wanted = f"model_path={_literal(sampled or trained or '')}" if sampled or trained else f"base_model={base}"
        going_on = (
            f"trainer = service.create_training_client_from_state_with_optimizer({_literal(trained)})"
            if trained
            else f"trainer = service.create_lora_training_client({base}, rank=32)"
        )
        tinker = (
            f"import tinker\n\nservice = tinker.ServiceClient(base_url={url}, api_key={key})\n"
            f"sampler = service.create_sampling_client({wanted})\n{going_on}"
        )
        return "".join(
            f"<h3>{whose}</h3><pre>{escape(code)}</pre>"
            for whose, code in (("With the openai client", openai), ("With the tinker client", tinker))
        )


def _model_cells(name: str, client: SamplingClient) -> list[str]:
    engine, cache = client.engine, client.engine.sampler.cache
    used, kept = (100 * number / cache.max_tokens for number in (cache.in_use, cache.kept))
    told = f"{cache.in_use:,} of {cache.max_tokens:,} tokens in use"
    bar = f'<div class="room"><i style="width:{used:.1f}%"></i><u style="width:{kept:.1f}%"></u></div>'
    kept_as = f"{str(engine.dtype).removeprefix('torch.')} on {engine.device}"
    numbers = [f"{engine.decoder.max_length:,}", short(float(f"{engine.decoder.num_parameters:.3g}"))]
    return [_code(name), *numbers, escape(kept_as), f"{bar}<small>{told}</small>"]


def _section(title: str, html: str) -> str:
    return f"<section><h2>{title}</h2>{html}</section>"


def _notice(kind: str, text: str) -> str:
    return f'<p class="notice {kind}">{escape(text)}</p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    kinds = [' class="num"' if name in COUNTED else "" for name in head]
    titles = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(head, kinds, strict=True))
    lines = (
        "".join(f'<td{kind} data-of="{name}">{cell}</td>' for name, kind, cell in zip(head, kinds, row, strict=True))
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _literal(text: str) -> str:
    """As Python writes it."""
    return json.dumps(text, ensure_ascii=False)


def _ago(when: float) -> str:
    return f"{_span(time.time() - when)} ago"


def _span(seconds: float) -> str:
    """The largest unit: 50 s, 12 min, 3 h, 9 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _seconds(value: float) -> str:
    return f"{value:,.1f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _bytes(number: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"
