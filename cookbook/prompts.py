"""Prompts of one's own as problems: rows of a file or hub set, split, ordered and scored by rewards."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.config import DataConfig, JudgeConfig, PromptsConfig
from cookbook.data import HELD_OUT_SHARE, interleave
from cookbook.errors import UsageError
from cookbook.keys import did_you_mean
from cookbook.messages import template_messages
from cookbook.rewards import Prompt, PromptEnv, Reward, load_rewards
from cookbook.row_formats import decoded_messages, rename
from cookbook.row_report import RowReport
from cookbook.rows import ENDINGS, RowProblem
from cookbook.sources import Source, open_sources
from envs.env import Attempts, Problem

if TYPE_CHECKING:
    from rich.console import Console

    from cookbook.environments import Task

ASKING = ("prompt", "question", "problem", "query", "instruction")  # columns that may hold a prompt, the first one wins
NOT_COLUMNS = ("prompt", "prompts", "completion", "completions")  # as in TRL: a reward function gets these otherwise


def prompt_stream(
    data: PromptsConfig,
    split: str,
    seed: int,
    skip: int = 0,
    *,
    reward: str | None,
    rewards: Mapping[str, float],
    judge: JudgeConfig,
    console: Console | None = None,
) -> Iterator[Problem]:
    """Problems `skip`, `skip` + 1, ...: "train" never ends and is reshuffled each epoch, "eval" is what was held out.

    `console` gets a few lines on what was found.
    """
    parts = load_rewards(reward, rewards, judge)
    prompts, report = _prompts_for(parts, data)
    train, held_out = split_prompts(prompts, seed, data.eval_rows)
    if console is not None:
        for line in (*report.lines(), f"{len(train):,} prompts to train on, {len(held_out):,} held out"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if (table := report.table()) is not None:
            console.print(table)
    chosen = _in_order(train, seed) if split == "train" else iter(held_out)
    return (problem(prompt, parts) for prompt in itertools.islice(chosen, skip, None))


def every_prompt(config: Task, say: Callable[[str], None]) -> list[Problem]:
    """All usable prompts in their order, once each, scored if there are rewards; `say` gets a few lines on what was found."""
    has_rewards = config.reward or config.rewards
    parts = load_rewards(config.reward, config.rewards, config.judge) if has_rewards else []
    prompts, report = _prompts_for(parts, config.data)
    for line in report.lines():
        say(line)
    return [problem(prompt, parts) for prompt in prompts]


def _prompts_for(rewards: list[Reward], data: PromptsConfig) -> tuple[list[Prompt], RowReport]:
    report = RowReport()
    prompts = read_prompts(data, report)
    check_columns(rewards, prompts, report.name)
    return prompts, report


def problem(prompt: Prompt, rewards: list[Reward]) -> Problem:
    return Attempts(lambda: PromptEnv(prompt, rewards), tag=prompt.tag)


def read_prompts(data: PromptsConfig, report: RowReport) -> list[Prompt]:
    """All usable rows; the others are told to the report. UsageError when too many are bad or none is good."""
    sources = open_sources(_as_data_config(data))
    report.name = sources[0].name if len(sources) == 1 else "mixture of " + ", ".join(source.name for source in sources)
    mixed = len(sources) > 1
    streams: list[Any] = [_usable(source, source.name if mixed else "", report) for source in sources]
    prompts: Any = interleave(streams, [source.weight for source in sources])  # whatever is in the streams
    found = list(itertools.islice(prompts, data.limit))
    report.refuse_bad(data.max_bad)
    return found


def check_columns(rewards: list[Reward], prompts: list[Prompt], name: str) -> None:
    """UsageError when a reward function asks for a column that the first row has not."""
    known = list(prompts[0].columns)
    for reward in rewards:
        if missing := next((column for column in reward.wants if column not in known), None):
            raise UsageError(
                f"reward {reward.name} asks for {missing!r}, no column of {name}{did_you_mean(missing, known)};"
                f" beside the prompt it has {', '.join(known) or 'none'}"
            )


def split_prompts(prompts: list[Prompt], seed: int, eval_rows: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out): the last `eval_rows` of the seed-shuffled rows, at most a fifth; repeated prompts stay."""
    order = list(range(len(prompts)))
    random.Random(f"held out {seed}").shuffle(order)
    asked = [repr(prompt.messages) for prompt in prompts]
    times = Counter(asked)
    wanted = min(eval_rows, int(HELD_OUT_SHARE * len(prompts)))
    held = set(itertools.islice((i for i in reversed(order) if times[asked[i]] == 1), wanted))
    return [prompt for i, prompt in enumerate(prompts) if i not in held], [prompts[i] for i in order if i in held]


def _in_order(prompts: list[Prompt], seed: int) -> Iterator[Prompt]:
    for epoch in itertools.count():
        order = list(range(len(prompts)))
        random.Random(f"prompts {seed} {epoch}").shuffle(order)
        yield from (prompts[i] for i in order)


def _as_data_config(data: PromptsConfig) -> DataConfig:
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    if values["name"] is None and data.path is not None:
        values["name"] = "file" if Path(data.path).suffix.lower() in ENDINGS else data.path.rsplit("/", 1)[-1]
    return DataConfig(**values)


def _usable(source: Source, tag: str, report: RowReport) -> Iterator[Prompt]:
    report.used.setdefault(source.name, 0)
    for raw in source.rows():
        try:
            if isinstance(raw.value, RowProblem):
                raise raw.value
            prompt = read_prompt(rename(raw.value, source.columns), raw.label, tag)
        except RowProblem as problem:
            report.reject(raw.label, problem)
            continue
        if not report.used[source.name]:
            report.detected.append(f"{source.name}, detected: {_describe(prompt)}")
        report.used[source.name] += 1
        report.accept(raw.label, (), repr(prompt.messages))
        yield prompt


def read_prompt(row: Mapping[str, object], label: str, tag: str = "") -> Prompt:
    """The prompt of a row: a text or messages, or the messages of a conversation before its last reply."""
    column = next((name for name in (*ASKING, "messages") if row.get(name) is not None), None)
    if column is None:
        names = ", ".join(map(repr, row)) or "none"
        raise RowProblem("no prompt", f"has {names}; name yours: data.columns.prompt=...")
    asked = decoded_messages(row[column])
    if column == "instruction" and row.get("input"):
        asked = f"{asked}\n{row['input']}"
    if is_text := isinstance(asked, str):
        messages: list[Any] = [{"role": "user", "content": asked}]
    elif isinstance(asked, list) and asked:
        messages = _without_last_reply(asked) if column == "messages" else asked
    else:
        raise RowProblem("no prompt", f"{column} is {type(asked).__name__}, expected a text or messages")
    columns = {name: value for name, value in row.items() if name not in NOT_COLUMNS}
    return Prompt(label, _checked(messages, column), columns, is_text, tag)


def _without_last_reply(messages: list[Any]) -> list[Any]:
    end = max((i for i, m in enumerate(messages) if isinstance(m, dict) and m.get("role") == "user"), default=-1)
    return messages[: end + 1]


def _checked(messages: list[Any], column: str) -> tuple[dict[str, Any], ...]:
    try:
        clean = template_messages(messages)
    except ValueError as error:
        raise RowProblem("not messages", f"{column}: {error}") from None
    if not clean or clean[-1]["role"] == "assistant":
        raise RowProblem("nothing asked", f"{column} ends with a reply" if clean else f"{column} has no user message")
    if not str(clean[-1].get("content", "")).strip():
        raise RowProblem("nothing asked", f"{column} is empty")
    return tuple(clean)


def _describe(prompt: Prompt) -> str:
    form = "texts" if prompt.is_text else "messages"
    return f"prompts are {form}" + (f"; rewards may ask for {', '.join(prompt.columns)}" if prompt.columns else "")
