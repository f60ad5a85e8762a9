"""What the policy says at each evaluation of a recipe without rollouts: a few fixed prompts, and an env's score."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cookbook import records
from cookbook.config import SamplesConfig
from cookbook.environments import problem_stream
from cookbook.errors import UsageError
from cookbook.limits import Limits
from cookbook.rollout_log import new_failures, write_rollouts
from cookbook.rollout_metrics import eval_metrics
from cookbook.rollouts import Rollouts
from cookbook.run import Run
from core import Datum, ModelInput, SamplingParams

if TYPE_CHECKING:
    from rich.table import Table

    from cookbook.renderers import Renderer
    from cookbook.service import Sampler, Trainer
    from envs.env import Problem


@dataclass(frozen=True)
class Asked:
    """The beginning of a held-out sequence, and what its row answers."""

    prompt: list[int]
    expected: list[int]


class EvalSamples:
    """Called at each evaluation with the steps done: metrics of the env; answers go to rollouts/samples-<step>.jsonl.

    UsageError for an env that cannot be opened, before anything is trained.
    """

    def __init__(
        self, run: Run, config: SamplesConfig, renderer: Renderer, trainer: Trainer, held_out: Sequence[Datum], seed: int
    ) -> None:
        self.run, self.config, self.renderer, self.trainer, self.seed = run, config, renderer, trainer, seed
        check_samples(config)
        context = trainer.get_info().max_length
        self.params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, stop=renderer.stop)
        self.rollouts = Rollouts(renderer, self.params, Limits(context=context, on_error="zero"))
        fitting = (asked for asked in map(asked_of, held_out) if asked and len(asked.prompt) + config.max_tokens <= context)
        self.asked = list(itertools.islice(fitting, config.prompts))
        self.problems: list[Problem] = []
        if config.env:
            self.problems += itertools.islice(problem_stream(config.env, "eval", seed), config.problems)
        self._known_failures: set[str] = set()

    def __call__(self, done: int, final: bool = False) -> dict[str, float]:
        if not self.asked and not self.problems:
            return {}
        sampler = self.trainer.save_weights_and_get_sampling_client().result()
        try:
            self._answer(sampler, done, final)
            return self._score(sampler, done)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {done}: {error}") from error
        finally:
            sampler.close()

    def _answer(self, sampler: Sampler, done: int, final: bool) -> None:
        if not self.asked:
            return
        params = replace(self.params, temperature=0.0)
        with sampler.together():
            futures = [sampler.sample(ModelInput.from_ints(asked.prompt), 1, params) for asked in self.asked]
        replies = [self._text(future.result().sequences[0].tokens) for future in futures]
        rows: list[records.Row] = [
            {"prompt": self._text(asked.prompt), "reply": reply, "expected": self._text(asked.expected)}
            for asked, reply in zip(self.asked, replies, strict=True)
        ]
        directory = self.run.dir / "rollouts"
        directory.mkdir(exist_ok=True)
        self.run.add_rows("samples", [{"step": done, **row} for row in rows])
        records.write_rows(directory / f"samples-{done:06d}.jsonl", rows)
        first = directory / "samples-000000.jsonl"
        if final and done and first.exists():
            for before, after in zip(records.read_rows(first), rows, strict=False):
                self.run.console.print(before_and_after(before, after))

    def _score(self, sampler: Sampler, done: int) -> dict[str, float]:
        if not self.problems:
            return {}
        groups = self.rollouts.run(self.problems, sampler, self.config.samples, (self.seed, "eval"))
        for line in new_failures(groups, self._known_failures):
            self.run.note(line)
        write_rollouts(self.run.dir, done, groups, name="eval", texts_of=self.renderer.texts_of)
        return eval_metrics(groups, str(self.config.env["name"]))

    def _text(self, tokens: Sequence[int]) -> str:
        return self.renderer.decode([token for token in tokens if token not in self.renderer.stop])


def check_samples(config: SamplesConfig) -> None:
    """UsageError for what no evaluation could sample."""
    for key, least in (("prompts", 0), ("problems", 1), ("samples", 1), ("max_tokens", 1), ("temperature", 0)):
        if not getattr(config, key) >= least:
            raise UsageError(f"eval.{key}={getattr(config, key)}: expected at least {least}")
    if config.samples > 1 and config.temperature == 0:
        raise UsageError(f"eval.samples={config.samples} would all be the same at eval.temperature=0: set it to 1, say")


def asked_of(datum: Datum) -> Asked | None:
    """All before the first trained token, and the trained ones that follow; None where there is nothing before it."""
    tokens = datum.model_input.to_ints()
    targets, weights = (list(datum.loss_fn_inputs[key]) for key in ("target_tokens", "weights"))
    first = next((i for i, weight in enumerate(weights) if weight), None)
    if first is None or first == 0:
        return None
    last = next((i for i in range(first, len(weights)) if not weights[i]), len(weights))
    return Asked(tokens[: first + 1], [int(token) for token in targets[first:last]])


def before_and_after(before: records.Row, after: records.Row) -> Table:
    """The prompt above, what the weights of step 0 said and what these say in two columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.ROUNDED, expand=True, title=Text(str(after["prompt"]).strip()), title_justify="left", title_style="")
    for name in ("before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(Text(str(before["reply"]).strip()), Text(str(after["reply"]).strip()))
    return table
