"""`cook dashboard push`: a saved workspace on W&B whose sections are those of our metrics, for SFT, RL and DPO.

It sends a layout, no run and no data, and needs a W&B login. What it builds is a plain object, so tests can read it.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from cookbook.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from wandb_workspaces.workspaces import Workspace

NAME = "cook"
SECTIONS: dict[str, dict[str, str | list[str]]] = {  # section -> title -> metrics, or a pattern for names of evaluations
    "SFT": {
        "held-out NLL": r"eval/.*/nll", "training NLL": ["train/nll"], "learning rate": ["optim/lr"],
        "gradient norm": ["optim/grad_norm"], "trained tokens per second": ["perf/train_tokens_per_second"],
        "tokens so far": ["progress/tokens"],
    },
    "RL": {
        "held-out reward": r"eval/.*/reward", "reward": ["env/all/reward"], "correct": ["env/all/correct"],
        "held-out correct": r"eval/.*/correct",
        "groups": ["group/frac_mixed", "group/frac_all_good", "group/frac_all_bad"],
        "KL of sampler and trainer": ["kl/sample_train_v1", "kl/sample_train_v2"],
        "largest logprob difference": ["kl/max_abs_dlogprob"], "importance ratio, p99": ["ratio/p99"],
        "entropy": ["sampling/entropy"], "tokens per turn": ["sampling/tokens_per_turn"],
        "cut short": ["sampling/truncated_frac"], "failed rollouts": r"env/errors/.*",
        "seconds": ["time/sample", "time/train"], "sampled tokens per second": ["perf/sample_tokens_per_second"],
    },
    "DPO": {
        "held-out accuracy": r"eval/.*/accuracy", "loss": ["dpo/loss"], "accuracy": ["dpo/accuracy"],
        "margin": ["dpo/margin"], "rewards": ["dpo/chosen_reward", "dpo/rejected_reward"],
    },
}  # fmt: skip


def workspace(entity: str, project: str) -> Workspace:
    """The workspace as it is sent: a section per kind of recipe over the axis that all rows have."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def panel(title: str, metrics: str | list[str]) -> reports.LinePlot:
        if isinstance(metrics, str):
            return reports.LinePlot(title=title, x="progress/step", metric_regex=metrics)
        return reports.LinePlot(title=title, x="progress/step", y=list(metrics))

    sections = [
        workspaces.Section(name=name, panels=[panel(title, metrics) for title, metrics in panels.items()], is_open=True)
        for name, panels in SECTIONS.items()
    ]
    settings = workspaces.WorkspaceSettings(x_axis="progress/step", remove_legends_from_panels=False)
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def push(entity: str | None, project: str, console: Console) -> None:
    """Save the workspace in the project on W&B, and print its address. UsageError without the extra, a login or a way there."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UsageError("cook dashboard needs wandb-workspaces: uv sync --extra dashboard (or pip install wandb-workspaces)")
    import requests
    import wandb
    import wandb.errors

    try:
        if not wandb.login(prompt=False):
            raise UsageError("cook dashboard push sends to W&B and needs its key: run `wandb login` (or set WANDB_API_KEY)")
        entity = entity or str(wandb.Api().default_entity)
        place = f"W&B project {entity}/{project}"
        console.print(f"sending the layout of workspace {NAME} (no run, no data) to {place}", highlight=False, soft_wrap=True)
        saved = workspace(entity, project).save()
    except (wandb.errors.Error, requests.RequestException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"W&B took no workspace ({reason}): check network, key, --entity and --project") from error
    console.print(saved.url, highlight=False, soft_wrap=True)
