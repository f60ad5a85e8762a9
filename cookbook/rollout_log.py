"""rollouts/<step>.jsonl of a run, and its best and worst attempts side by side on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cookbook import records
from cookbook.messages import text_of
from cookbook.rollouts import Group
from cookbook.trajectories import Trajectory
from envs.env import Message

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from cookbook.token_texts import TokenTexts

DETAILED_TOKENS = 16_384  # of one file: some 300 kB of texts and logprobs
TABLE_GROUPS, TABLE_CHARACTERS = 2, 2000  # of a step in a tracker's table, and of one of its texts
SHOWN_LINES = 14  # of an attempt on the screen
SHOWN_CHARACTERS = 1200


def write_rollouts(
    run_dir: Path, step: int, groups: Sequence[Group], *, name: str = "", texts_of: TokenTexts | None = None
) -> Path:
    """One row per attempt, dropped ones too. Resume cuts files of later steps: `step` counts as in metrics.jsonl.

    `name` sets an evaluation's file apart: eval-000020.jsonl. With `texts_of` the most telling groups have the text and
    the logprob of each token too, up to DETAILED_TOKENS in all.
    """
    file = run_dir / "rollouts" / f"{name}{'-' if name else ''}{step:06d}.jsonl"
    file.parent.mkdir(exist_ok=True)
    detailed = _in_detail(groups) if texts_of else set()
    records.write_rows(file, [
        row(group, trajectory, texts_of if index in detailed else None)
        for index, group in enumerate(groups) for trajectory in (*group.trajectories, *group.dropped)
    ])  # fmt: skip
    return file


def _in_detail(groups: Sequence[Group]) -> set[int]:
    """Indices of the groups whose attempts differ most, as many as DETAILED_TOKENS hold; one at least."""
    sizes = [sum(len(turn.tokens) for attempt in g.trajectories for turn in attempt.transitions) for g in groups]
    chosen: set[int] = set()
    room = DETAILED_TOKENS
    for index in sorted(range(len(groups)), key=lambda i: -spread(groups[i])):
        if sizes[index] <= room or not chosen:
            chosen.add(index)
            room -= sizes[index]
    return chosen


def row(group: Group, trajectory: Trajectory, texts_of: TokenTexts | None = None) -> records.Row:
    """An attempt with its text, its sampled tokens and the parts of its reward; advantage null: not trained on."""
    turns = [
        {
            "prompt_tokens": turn.observation.length, "tokens": turn.tokens, "ended": turn.ended,
            "reward": turn.reward, "metrics": turn.metrics,
            **({"texts": texts_of(turn.tokens), "logprobs": [round(lp, 3) for lp in turn.logprobs]} if texts_of else {}),
        }
        for turn in trajectory.transitions
    ]  # fmt: skip
    return {
        "problem": group.problem, "attempt": trajectory.attempt, "tag": group.tag,
        "reward": trajectory.reward, "advantage": trajectory.advantage,
        "ended": trajectory.ended, "error": trajectory.error,
        "metrics": trajectory.metrics, "messages": [plain(message) for message in trajectory.messages], "turns": turns,
    }  # fmt: skip


def table_rows(groups: Sequence[Group], step: int) -> list[records.Row]:
    """For a table that grows by a few rows a step: the best and the worst attempt of the groups that differ most."""
    tried = sorted((group for group in groups if group.trajectories), key=spread, reverse=True)
    return [
        {
            "step": step, "problem": group.problem, "tag": group.tag, "attempt": trajectory.attempt,
            "reward": float(trajectory.reward), "advantage": trajectory.advantage, "ended": trajectory.ended,
            "prompt": _asked(trajectory)[:TABLE_CHARACTERS], "reply": _said(trajectory)[:TABLE_CHARACTERS],
        }
        for group in tried[:TABLE_GROUPS] for trajectory in ([best(group), worst(group)] if spread(group) else [best(group)])
    ]  # fmt: skip


def new_failures(groups: Sequence[Group], known: set[str]) -> list[str]:
    """A line for each type of error, and for each limit that kept a rollout from any reward, not in `known` yet, which
    then holds it."""
    lines = []
    for group in groups:
        for trajectory in (*group.trajectories, *group.dropped):
            kind = trajectory.error_type or trajectory.ended
            if trajectory.failure and kind not in known:
                known.add(kind)
                without = "reward" if trajectory.transitions else "reply"
                how = "failed" if trajectory.error else f"ended without a {without}"
                lines.append(f"a rollout {how} at problem {group.problem}: {trajectory.failure}")
    return lines


def most_telling(groups: Sequence[Group]) -> Group | None:
    """The group whose attempts differ most in their rewards; None when there is no attempt at all."""
    tried = [group for group in groups if group.trajectories]
    return max(tried, key=spread, default=None)


def spread(group: Group) -> float:
    """How far the rewards of its attempts lie apart."""
    return _reward(best(group)) - _reward(worst(group)) if group.trajectories else 0.0


def best(group: Group) -> Trajectory:
    return max(group.trajectories, key=_reward)


def worst(group: Group) -> Trajectory:
    return min(group.trajectories, key=_reward)


def side_by_side(group: Group) -> Table:
    """The problem above, the best and the worst attempt at it in two columns."""
    from rich import box
    from rich.table import Table

    shown = [best(group), worst(group)]
    if _reward(shown[0]) == _reward(shown[1]):  # they agree: two different ones, if there are
        shown = group.trajectories[:2]
    table = Table(box=box.ROUNDED, expand=True, title=_text(_cut(_asked(shown[0]))), title_justify="left", title_style="")
    for trajectory in shown:
        about = f"reward {trajectory.reward:.3g}" + ("" if trajectory.ended == "done" else f", {trajectory.ended}")
        table.add_column(_text(about), ratio=1, overflow="fold")
    table.add_row(*(_text(_cut(_said(trajectory))) for trajectory in shown))
    return table


def _reward(trajectory: Trajectory) -> float:
    return trajectory.reward


def plain(message: Message) -> records.Row:
    """Only what JSON can hold; what an env put into a message may be anything."""
    return {str(key): value if _is_json(value) else str(value) for key, value in message.items()}


def _is_json(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int | float)


def _asked(trajectory: Trajectory) -> str:
    before = [message for message in trajectory.messages[: _first_reply(trajectory)] if message["role"] != "system"]
    return "\n".join(_line(message) for message in before)


def _said(trajectory: Trajectory) -> str:
    return "\n".join(_line(message) for message in trajectory.messages[_first_reply(trajectory) :])


def _first_reply(trajectory: Trajectory) -> int:
    roles = [message["role"] for message in trajectory.messages]
    return roles.index("assistant") if "assistant" in roles else len(roles)


def _line(message: Message) -> str:
    """A message as one reads it: replies bare, what came back marked by who said it."""
    return ("" if message["role"] == "assistant" else f"[{message['role']}] ") + text_of(message)


def _cut(text: str) -> str:
    """The beginning and the end of a long text."""
    lines = text.splitlines()
    if len(lines) > SHOWN_LINES:
        half = SHOWN_LINES // 2
        lines = [*lines[:half], f"[... {len(lines) - 2 * half} lines ...]", *lines[-half:]]
    text = "\n".join(lines)
    if len(text) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return text


def _text(text: str) -> Text:
    from rich.text import Text

    return Text(text)  # never markup: replies are full of brackets
