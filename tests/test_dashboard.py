"""The W&B workspace: its sections hold the metrics that recipes log; nothing is sent without a key."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cookbook.dashboard import SECTIONS, workspace
from cookbook.rollout_metrics import step_metrics
from cookbook.rollouts import Group
from tests.test_rollout_log import attempt

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb-workspaces
def test_a_section_per_kind_with_a_panel_per_chart_over_our_steps() -> None:
    pytest.importorskip("wandb_workspaces")
    built = workspace("team", "cook")
    assert (built.entity, built.project, built.name) == ("team", "cook", "cook")
    assert {section.name: [panel.title for panel in section.panels] for section in built.sections} == {
        name: list(panels) for name, panels in SECTIONS.items()
    }
    sft, _, dpo = built.sections
    assert (sft.panels[0].metric_regex, sft.panels[1].y, sft.panels[1].x) == (r"eval/.*/nll", ["train/nll"], "progress/step")
    assert dpo.panels[-1].y == ["dpo/chosen_reward", "dpo/rejected_reward"]
    told = built._to_model().spec.model_dump_json(by_alias=True)  # what is sent
    assert "progress/step" in told and "dpo/chosen_reward" in told and "eval/.*/nll" in told


def test_a_metric_of_a_panel_is_one_that_is_logged() -> None:
    """A renamed metric would leave an empty chart that nobody notices."""
    attempts = [attempt(reward, number=index) for index, reward in enumerate((1.0, 0.0))]
    logged = {*step_metrics([Group(0, "", attempts)])}
    source = "".join((ROOT / name).read_text() for name in ("recipes/sft/chat.py", "cookbook/rl.py", "recipes/rl/reinforce.py"))
    logged |= set(re.findall(r'"(\w+/\w+)"', source))
    shown = {metric for name in ("SFT", "RL") for metrics in SECTIONS[name].values() if isinstance(metrics, list)
             for metric in metrics}  # fmt: skip
    assert shown <= logged


def test_without_a_key_nothing_is_sent_and_it_says_so(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    bare = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "cookbook.cli", "dashboard", "push"]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=60)
    said = "error: cook dashboard push sends to W&B and needs its key: run `wandb login` (or set WANDB_API_KEY)"
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (2, "", said)
