"""rollouts/<step>.jsonl and what the screen shows of them."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from cookbook.config import LogConfig
from cookbook.rollout_log import most_telling, new_failures, side_by_side, write_rollouts
from cookbook.rollouts import Group
from cookbook.run import Run
from cookbook.trajectories import Trajectory, Transition
from core import ModelInput


def attempt(reward: float, said: str = "[bold]4[/bold]", error: str | None = None, number: int = 0) -> Trajectory:
    turn = Transition(ModelInput.from_ints([1, 2, 3]), [4, 5], [-0.1, -0.2], "stop", reward, {"correct": reward})
    messages = [{"role": "user", "content": "2 + 2 [?]"}, {"role": "assistant", "content": said}]
    return Trajectory(
        number, [turn], messages, reward, {"correct": reward}, "error" if error else "done", advantage=0.5, error=error
    )


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_has_text_tokens_and_the_parts_of_the_reward(tmp_path: Path) -> None:
    groups = [Group(7, "sums", [attempt(1.0)], [attempt(0.0, error="KeyError: 'x' (my.py:3)", number=1)])]
    file = write_rollouts(tmp_path, 12, groups)
    assert file == tmp_path / "rollouts" / "000012.jsonl"
    good, failed = rows(file)
    assert good == {
        "problem": 7, "attempt": 0, "tag": "sums", "reward": 1.0, "advantage": 0.5, "ended": "done", "error": None,
        "metrics": {"correct": 1.0},
        "messages": [{"role": "user", "content": "2 + 2 [?]"}, {"role": "assistant", "content": "[bold]4[/bold]"}],
        "turns": [{"prompt_tokens": 3, "tokens": [4, 5], "ended": "stop", "reward": 1.0, "metrics": {"correct": 1.0}}],
    }  # fmt: skip
    assert failed["attempt"] == 1 and failed["error"] == "KeyError: 'x' (my.py:3)"


def test_what_json_cannot_hold_is_written_as_text(tmp_path: Path) -> None:
    odd = attempt(float("nan"))
    odd.messages[0]["board"] = {(0, 1): "x"}
    (row,) = rows(write_rollouts(tmp_path, 0, [Group(0, "", [odd])], name="eval"))
    assert row["messages"][0]["board"] == "{(0, 1): 'x'}" and row["reward"] == "NaN"
    assert (tmp_path / "rollouts" / "eval-000000.jsonl").exists()


@dataclass
class Config:
    run_dir: str
    name: str | None = None
    keep_last: int = 3
    log: LogConfig = field(default_factory=lambda: LogConfig(progress=False))


def test_resume_cuts_rollouts_after_the_step_it_goes_back_to(tmp_path: Path) -> None:
    def files() -> set[str]:
        return {path.stem for path in (tmp_path / "rollouts").iterdir()}

    with Run(Config(str(tmp_path)), "rl/reinforce") as run:
        run.resume(lambda row: None)
        write_rollouts(run.dir, 0, [Group(0, "", [attempt(1.0)])], name="eval")
        for step in (1, 2, 3):
            write_rollouts(run.dir, step, [Group(0, "", [attempt(1.0)])])
            run.log(step, {})
            if step == 2:
                run.checkpoint(step, "tinker://x", loop={})
        write_rollouts(run.dir, 3, [Group(0, "", [attempt(1.0)])], name="eval")
    assert len(files()) == 5
    with Run(Config(str(tmp_path)), "rl/reinforce") as run:
        run.resume(lambda row: None)
        assert files() == {"eval-000000", "000001", "000002"}


def test_each_type_of_error_and_each_limit_that_kept_from_rewards_is_told_once() -> None:
    known: set[str] = set()
    failed = [attempt(0, error="KeyError: 'x'"), attempt(0, error="KeyError: 'y'"), attempt(0, error="OSError")]
    assert new_failures([Group(3, "", [], failed)], known) == [
        "a rollout failed at problem 3: KeyError: 'x'",
        "a rollout failed at problem 3: OSError",
    ]
    assert new_failures([Group(4, "", failed[:1])], known) == []
    unasked = Trajectory(ended="context", limit="limits.context=1024, the prompt has 3,012 tokens")
    paid = replace(attempt(1.0), ended="turns", limit="limits.turns=2, the env asked for more")
    unpaid = replace(paid, reward=0.0)
    assert new_failures([Group(5, "", [paid]), Group(6, "", [unasked, unpaid, unpaid])], known) == [
        "a rollout ended without a reply at problem 6: limits.context=1024, the prompt has 3,012 tokens",
        "a rollout ended without a reward at problem 6: limits.turns=2, the env asked for more",
    ]


def shown(group: Group, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(side_by_side(group))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_best_and_the_worst_attempt_stand_side_by_side() -> None:
    dull = Group(0, "", [attempt(1.0), attempt(1.0)])
    telling = Group(1, "", [attempt(0.5, "half"), attempt(1.0), attempt(0.0, "five")])
    assert most_telling([dull, Group(2, "", []), telling]) is telling and most_telling([]) is None
    text = shown(telling)
    assert "[user] 2 + 2 [?]" in text and "reward 1" in text and "reward 0" in text
    assert any("[bold]4[/bold]" in line and "five" in line for line in text.splitlines())
    assert "half" not in text


def test_long_attempts_are_cut_to_the_screen() -> None:
    long = Group(0, "", [attempt(1.0, "\n".join(map(str, range(500)))), attempt(0.0, "x" * 10_000)])
    text = shown(long)
    assert len(text.splitlines()) < 50 and "[... 486 lines ...]" in text and "characters ...]" in text


def test_a_group_of_one_is_shown_alone() -> None:
    assert "reward 1" in shown(Group(0, "", [attempt(1.0)]))


def test_the_most_telling_groups_have_texts_and_logprobs_of_their_tokens(tmp_path: Path) -> None:
    from cookbook.rollout_log import DETAILED_TOKENS
    from cookbook.token_texts import TokenTexts

    texts_of = TokenTexts(lambda tokens: "".join(f"<{token}>" for token in tokens))
    dull, telling = Group(0, "", [attempt(1.0), attempt(1.0)]), Group(1, "", [attempt(1.0), attempt(0.0)])
    long = Group(2, "", [attempt(1.0), attempt(0.5)])
    for each in long.trajectories:
        each.transitions[0].tokens.extend([4] * DETAILED_TOKENS)
        each.transitions[0].logprobs.extend([-0.1] * DETAILED_TOKENS)
    written = rows(write_rollouts(tmp_path, 1, [dull, telling, long], texts_of=texts_of))
    turns = [row["turns"][0] for row in written]
    assert [("texts" in turn, "logprobs" in turn) for turn in turns] == [(True, True)] * 4 + [(False, False)] * 2
    assert turns[2]["texts"] == ["<4>", "<5>"] and turns[2]["logprobs"] == [-0.1, -0.2]
    assert "texts" in rows(write_rollouts(tmp_path, 2, [long], texts_of=texts_of))[0]["turns"][0]  # one at least
