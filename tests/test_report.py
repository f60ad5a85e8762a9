"""report.html: what it tells of runs in every state, and that it works in a real browser."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cookbook import records
from cookbook.cli import main
from cookbook.config import LogConfig
from cookbook.data_log import write_data
from cookbook.report import report
from cookbook.report_reader import reader_sets
from cookbook.run import Run
from cookbook.run_reader import read_run
from core import Datum, ModelInput
from tests.past_runs import logprobs, rl_run, words_of
from tests.small_runs import chat, train, write_rows
from tests.test_run_reader import Config, started

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        installed = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not Path(installed).exists():
            pytest.skip("there is no Chromium on the PATH (apt-get install chromium, or playwright install chromium)")
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # root has none
        launched = playwright.chromium.launch(executable_path=installed, args=sandbox)
        yield launched
        launched.close()


class Opened:
    """A page opened from disk; any request for something else, and any error of its script, is kept."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.absolute().as_uri())

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def close(self) -> None:
        assert self.errors == [] and len(self.requests) == 1, (self.errors, self.requests)
        self.page.close()


def test_a_run_of_5000_steps_opens_at_once_and_is_small(here: Path, browser: Any) -> None:
    run = rl_run(here / "runs/long", 5000, file_every=500)
    started = time.process_time()
    file = report(["long"], None)
    assert file.resolve() == run / "report.html" and file.stat().st_size < 5e6
    assert time.process_time() - started < 5
    opened = Opened(browser, file)
    loaded = opened.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < loaded < 2000
    assert opened.page.locator("figure.chart").count() > 25
    opened.close()


def test_the_reader_shows_best_and_worst_and_colours_tokens(here: Path, browser: Any) -> None:
    opened = Opened(browser, report([str(rl_run(here / "runs/a", 40))], None))
    page = opened.page
    assert (
        opened.text(".attempt:nth-child(1) b") == "best: reward 1"
        and opened.text(".attempt:nth-child(2) b") == "worst: reward 0"
    )
    kinds = [page.locator("[aria-label='colour of tokens'] option").nth(i).inner_text() for i in range(3)]
    assert kinds == ["Trained tokens", "Logprobs", "Advantages"]

    def colours() -> set[str]:
        return set(
            page.locator(".attempt .t").evaluate_all("nodes => nodes.map(node => getComputedStyle(node).backgroundColor)")
        )

    trained = colours()
    page.locator("[aria-label='colour of tokens']").select_option("logprob")
    assert len(trained) == 1 and len(colours()) > 5
    page.locator("[aria-label='colour of tokens']").select_option("advantage")
    assert len(colours()) == 2  # of the one that was better, and the one that was worse
    assert "probability" in page.locator(".t").first.get_attribute("title")
    page.locator(".chip").nth(3).click()
    assert page.locator(".attempt").count() == 3
    page.locator("[placeholder='find text']").fill("no attempt says this")
    assert opened.text(".empty") == "Nothing here has that text."
    page.locator("[aria-label='what to read']").select_option(label="evaluation, before the first step")
    page.locator("[placeholder='find text']").fill("")
    assert "What is" in opened.text(".prompt")
    opened.close()


def test_the_values_under_the_pointer_are_those_of_the_metrics(here: Path, browser: Any) -> None:
    run = rl_run(here / "runs/a", 40)
    rows = {row["progress/step"]: row for row in records.read_rows(run / "metrics.jsonl")}
    opened = Opened(browser, report(["a"], None), color_scheme="dark")
    chart = opened.page.locator("#curves figure.chart:has(figcaption:text-is('env/all/reward')) svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    step, value = re.findall(r"[\d.]+", opened.text(".tip"))
    assert float(value) == pytest.approx(rows[int(step)]["env/all/reward"], rel=1e-3)
    light, dark = ["rgb(251, 251, 250)", "rgb(20, 22, 25)"]
    background = "getComputedStyle(document.body).backgroundColor"
    assert opened.page.evaluate(background) == dark
    opened.page.emulate_media(color_scheme="light")
    assert opened.page.evaluate(background) == light
    opened.close()


def test_several_runs_are_overlaid_and_their_settings_compared(here: Path, browser: Any, capsys: Any) -> None:
    for job, rate in enumerate((1e-4, 2e-4, 4e-4)):
        rl_run(here / f"runs/grid/{job}", 20, seed=job, rate=rate)
    assert main(["report", "grid", "--to", "all.html"]) == 0 and capsys.readouterr().out == "all.html\n"
    opened = Opened(browser, here / "all.html")
    settings = opened.text("table.settings")
    assert "learning_rate\t0.0001\t0.0002\t0.0004" in settings and "group_size" not in settings
    reward = opened.page.locator("figure.chart:has(figcaption:text-is('env/all/reward'))")
    assert reward.locator("path.line").count() == 3
    opened.page.locator(".key", has_text="grid/1").click()
    assert reward.locator("path.line:visible").count() == 2
    opened.close()


def test_the_settings_of_a_sweep_are_a_line_for_each_run(here: Path, browser: Any) -> None:
    for job in range(4):
        rl_run(here / f"runs/grid/{job}_a-long-name-that-would-leave-no-room_learning_rate={job}e-4", 3, rate=job * 1e-4)
    opened = Opened(browser, report(["grid"], here / "all.html"))
    lines = [line.split("\t") for line in opened.text("table.settings").splitlines()]
    assert lines[0] == ["run", "learning_rate"] and [line[1] for line in lines[1:]] == ["0", "0.0001", "0.0002", "0.0003"]
    heights = opened.page.locator("table.settings tr").evaluate_all("rows => rows.map(row => row.clientHeight)")
    assert max(heights) < 60  # no cell is squeezed to a column of letters
    opened.close()


def test_what_a_model_wrote_is_text_and_never_markup(here: Path, browser: Any) -> None:
    run = rl_run(here / "runs/a", 1)
    evil = "</script><script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
    rows = records.read_rows(run / "rollouts/000001.jsonl")
    for row in rows:
        row["messages"][0]["content"] = row["turns"][0]["texts"][0] = row["tag"] = evil
    records.write_rows(run / "rollouts/000001.jsonl", rows)
    records.append_row(run / "metrics.jsonl", {"progress/step": 2, f"env/{evil}": 1.0})
    opened = Opened(browser, report(["a"], None))
    assert evil in opened.text(".prompt") and opened.page.title() == "a" and opened.page.locator("img").count() == 0
    opened.close()


# What is told of a run, read from the file itself.


def page_of(name: str) -> str:
    return report([name], None).read_text()


def test_settings_show_what_differs_from_the_defaults(here: Path) -> None:
    rl_run(here / "runs/a", 5)
    table = page_of("a").partition('<table class="settings">')[2].partition("</table>")[0]
    rows = re.findall(r"<code>(.*?)</code></td><td><code>(.*?)</code></td><td class=\"default\"><code>(.*?)</code>", table)
    assert rows == [
        ("steps", "5", "100"), ("group_size", "8", "16"), ("learning_rate", "0.0002", "null"), ("env.digits", "2", "1"),
    ]  # fmt: skip


def test_a_killed_torn_and_gappy_run_says_so_and_shows_the_rest(here: Path) -> None:
    run = rl_run(here / "runs/a", 30)
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:5], "{torn", *lines[9:20], '{"progress/step": 2']))
    (run / "rollouts/000020.jsonl").write_text('{"problem": 1}\nnonsense\n')
    page = page_of("a")
    assert 'class="state killed"' in page
    assert "Killed: it left no result. cook resume a goes on from the start: there is no checkpoint." in page
    assert "metrics.jsonl has no row for steps 5 to 8." in page
    assert "metrics.jsonl:6 is not a JSON object" in page and "<figcaption>env/all/reward</figcaption>" in page


def test_a_run_of_an_older_version_and_one_that_just_began_have_a_page(here: Path) -> None:
    old = rl_run(here / "runs/old", 3)
    shutil.rmtree(old / "rollouts")
    (old / "rollouts").mkdir()
    records.write_rows(old / "rollouts/000001.jsonl", [{"reward": 1.0, "messages": [{"role": "assistant", "content": "4"}]}])
    (old / "run.json").write_text("{}")
    page = page_of("old")
    assert "run.json has no recipe" in page and "defaults are not known" in page and '"head":"reward 1"' in page
    (here / "runs/new").mkdir()
    (here / "runs/new/config.yaml").write_text("steps: 3\n")
    assert "No step has been logged yet." in page_of("new")


def test_a_place_that_cannot_be_written_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rl_run(here / "runs/a", 3)
    for to, reason in (("no/such/place.html", "No such file or directory"), (".", "is a directory; give a file")):
        assert main(["report", "a", "--to", to]) == 2
        assert reason in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["runs"]


# The reader's data.


def data_run(directory: Path) -> Path:
    rl_run(directory, 1)
    shutil.rmtree(directory / "rollouts")
    tokens, texts_of = words_of("What is two and two? It is four. <end>")
    weights = torch.tensor([0.0] * 4 + [1.0] * 4)
    data = [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": torch.tensor(tokens[1:]), "weights": weights})] * 3
    for step, mean in ((0, -2.0), (60, -0.5)):
        write_data(directory, step, "held_out", data, logprobs(data, mean), texts_of)
    sides = [{"pair": 0, "side": "chosen"}, {"pair": 0, "side": "rejected"}]
    write_data(directory, 60, "pairs", data[:2], logprobs(data, -1.0), texts_of, sides)
    for step, reply in ((0, "five"), (60, "four")):
        rows = [{"prompt": "two and two?", "reply": reply, "expected": "four"}]
        records.write_rows(directory / f"rollouts/samples-{step:06d}.jsonl", rows)
    return directory


def test_held_out_rows_are_shown_before_and_after(here: Path) -> None:
    data_run(here / "runs/a")
    sets = {each["label"]: each["items"] for each in reader_sets(read_run("a"))}
    row = sets["held-out rows, step 60"][0]
    assert row["note"] == "9 tokens, 4 trained"
    before, after = row["attempts"]
    assert (before["head"], after["head"]) == ("before", "after")
    assert float(before["sub"].split()[2]) < float(after["sub"].split()[2]) < 0
    tokens = after["parts"][0][1]
    assert "".join(tokens["t"]) == "What is two and two? It is four. <end>" and tokens["m"] == [0] * 5 + [1] * 4
    assert tokens["l"][:5] == [None] * 5 and all(lp < 0 for lp in tokens["l"][5:])
    (pair,) = sets["pairs, step 60"]
    assert [attempt["head"] for attempt in pair["attempts"]] == ["chosen", "rejected"]
    (answer,) = sets["answers, step 60"]
    assert [(a["head"], a["parts"][0][1]) for a in answer["attempts"]] == [
        ("before", "five"),
        ("now", "four"),
        ("expected", "four"),
    ]


def test_what_is_too_long_for_a_page_is_cut_with_the_most_telling_kept(here: Path) -> None:
    run = rl_run(here / "runs/a", 1)
    rows = records.read_rows(run / "rollouts/000001.jsonl")
    rows = [{**row, "problem": 100 * copy + row["problem"]} for copy in range(3) for row in rows]
    for row in rows:
        row["reward"], row["messages"][0]["content"] = float(row["problem"] == 7 and row["attempt"] == 0), "x" * 20_000
        row["turns"][0]["texts"], row["turns"][0]["logprobs"] = ["a"] * 2000, [-0.5] * 2000
    records.write_rows(run / "rollouts/000001.jsonl", rows)
    first = reader_sets(read_run("a"))[0]
    assert first["items"][0]["title"] == "problem 7" and 1 < len(first["items"]) < 24 and len(json.dumps(first)) < 400_000
    assert "[... 1200 tokens ...]" in json.dumps(first) and "characters ...]" in json.dumps(first)


# What cook eval measured.


def measured(run: Path, name: str, time: str, value: float, *words: str, **more: object) -> None:
    """A file as `cook eval` leaves it."""
    figure = {"value": value, "low": value - 0.1, "high": value + 0.1, "num_items": 64, **more}
    record = {
        "policy": "a", "step": 40, "against": "base" if more else None, "words": list(words), "problems": 64, "samples": 1,
        "temperature": None, "max_tokens": None, "seed": 0, "time": time, "figures": {name: figure},
    }  # fmt: skip
    (run / "evals").mkdir(exist_ok=True)
    (run / "evals" / f"{time.replace(':', '')}.json").write_text(json.dumps(record))


def test_what_cook_eval_measured_is_on_the_page_the_newest_first(here: Path, browser: Any) -> None:
    run = rl_run(here / "runs/a", 40)
    base = {"value": 0.5, "low": 0.4, "high": 0.6, "num_items": 64}
    gain = {"value": 0.31, "low": 0.2, "high": 0.42, "higher": 20, "lower": 0, "equal": 44}
    measured(run, "arithmetic/reward", "2026-11-28T10:00:00+0000", 0.7)
    measured(run, "gsm8k/correct", "2026-11-28T11:00:00+0000", 0.81, "env=gsm8k", against=base, difference=gain)
    (run / "evals/torn.json").write_text('{"figures": {"arith')
    opened = Opened(browser, report(["a"], None))
    first, second = opened.page.locator("table.measured tr").all()[1:]
    cells = ["2026-11-28 11:00", "step 40", "gsm8k/correct\nenv=gsm8k", "0.81 (0.71..0.91)", "base", "0.5"]
    assert first.locator("td").all_inner_texts() == [*cells, "+0.31 (+0.2..+0.42)", "64"]
    assert second.locator("td").nth(3).inner_text() == "0.7 (0.6..0.8)"
    assert "evals/torn.json cannot be read as an evaluation: left out" in opened.text(".notice.warn")
    opened.page.locator("nav a", has_text="Measured afterwards").click()
    assert opened.page.locator("table.measured").is_visible()
    opened.close()


def test_runs_measured_in_the_same_words_share_a_row(here: Path, browser: Any) -> None:
    for job, value in enumerate((0.5, 0.625)):
        run = rl_run(here / f"runs/grid/{job}", 5, seed=job)
        measured(run, "gsm8k/correct", "2026-11-28T10:00:00+0000", 0.1, "env=gsm8k")
        measured(run, "gsm8k/correct", "2026-11-28T11:00:00+0000", value, "env=gsm8k")
    measured(run, "gsm8k/correct", "2026-11-28T12:00:00+0000", 0.25, "env=gsm8k", "env.split=test")
    opened = Opened(browser, report(["grid"], None))
    rows = [row.locator("td").all_inner_texts() for row in opened.page.locator("table.measured tr").all()[1:]]
    assert rows == [
        ["gsm8k/correct\nenv=gsm8k", "0.5 (0.4..0.6)", "0.625 (0.53..0.72)"],
        ["gsm8k/correct\nenv=gsm8k env.split=test", "", "0.25 (0.15..0.35)"],
    ]
    opened.close()


def test_an_evaluation_of_a_run_is_in_its_next_report(here: Path, one_thread: None) -> None:
    assert train(here / "run", write_rows(here / "rows.jsonl", map(chat, range(40))), steps=2) == 0
    assert 'class="measured"' not in page_of("run")
    assert main(["eval", "run", "--against", "base"]) == 0
    table = page_of("run").partition('<table class="measured">')[2].partition("</table>")[0]
    assert "<td>step 2</td><td>held_out/nll</td>" in table and "<td>base</td>" in table


# Runs that write their own.


def test_a_recipe_leaves_a_report_with_its_answers_and_rows(here: Path, one_thread: None) -> None:
    data = write_rows(here / "rows.jsonl", map(chat, range(40)))
    assert train(here / "run", data, steps=4, eval_every=0, eval_prompts=2) == 0
    page = (here / "run/report.html").read_text()
    assert 'class="state completed"' in page and "<figcaption>eval/held_out/nll</figcaption>" in page
    kinds = {each["label"].split(",")[0] for each in reader_sets(read_run(here / "run"))}
    assert kinds == {"answers", "held-out rows", "training rows"}
    row = next(each for each in reader_sets(read_run(here / "run")) if each["kind"] == "held_out")["items"][0]
    before, after = (float(attempt["sub"].split()[2]) for attempt in row["attempts"])
    assert before < after < 0  # it learned


def test_a_run_under_way_has_a_report_since_its_checkpoint_and_no_report_can_fail_it(here: Path) -> None:
    with started(here / "runs/a") as run:
        page = (run.dir / "report.html").read_text()
        assert 'class="state running"' in page and "Going on." in page and "cook report a looks again" in page
        (run.dir / "report.html").unlink()
        (run.dir / "report.html").mkdir()
    assert read_run("a").state == "completed"
    log = (run.dir / "console.log").read_text()
    assert "report.html could not be written (UsageError: " in log and "cook report tries again" in log
    with Run(Config(str(here / "runs/b"), log=LogConfig(report=False)), "sft/chat", console=Console(file=io.StringIO())) as run:
        run.log(1, {"train/nll": 1.0})
    assert not (run.dir / "report.html").exists()
