"""What `cook eval` measures: NLL of rows, preference of pairs, rewards of an env or of prompts of one's own."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from cookbook import records
from cookbook.compose import compose, load_recipe, recompose
from cookbook.errors import UsageError
from cookbook.estimates import Item, of_two_samples
from cookbook.keys import did_you_mean
from cookbook.limits import Limits
from cookbook.overrides import key_of, spelt_out
from cookbook.past_policy import Found, PastPolicy
from cookbook.preferences import AnyUnit
from cookbook.rollout_log import row as attempt_row
from cookbook.rollout_metrics import env_metrics, pass_metrics
from cookbook.rollouts import Rollouts
from core import Datum, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from cookbook.dpo import Score
    from cookbook.run_reader import PastRun
    from envs.env import Problem

SCORED = ("env", "reward", "rewards", "judge")  # words that choose something to sample and score
READ = ("data", "max_length")  # words that choose rows to read
COMPARED = ("reward", "correct")  # figures of a problem, beside pass@k


@dataclass(frozen=True)
class Choice:
    """What the command line says beside the words. `max_tokens` None: as the run has it."""

    problems: int = 64
    samples: int = 1
    temperature: float | None = None  # None: 0 for one sample, 1 for several
    max_tokens: int | None = None
    seed: int = 0

    def check(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise UsageError(f"--samples {self.samples} would all be the same at --temperature 0: leave it out, or 1")

    @property
    def params(self) -> SamplingParams:
        temperature = float(self.samples > 1) if self.temperature is None else self.temperature
        return SamplingParams(max_tokens=self.max_tokens, temperature=temperature)


@dataclass(frozen=True)
class Measured:
    """Items of each figure, in the same order for every policy, and the attempts behind them if any."""

    items: dict[str, list[Item]]
    attempts: list[records.Row] = field(default_factory=list)


class Measure(ABC):
    @abstractmethod
    def __call__(self, policy: PastPolicy) -> Measured: ...


@dataclass
class RowLoss(Measure):
    """NLL per trained token, an item per sequence. `read` renders the rows for a policy's template."""

    name: str
    read: Callable[[PastPolicy], Sequence[Datum]]
    _tokens: list[list[int]] | None = None  # of the first policy

    def __call__(self, policy: PastPolicy) -> Measured:
        data = self.read(policy)
        tokens = [datum.model_input.to_ints() for datum in data]
        if self._tokens is not None and tokens != self._tokens:
            raise UsageError(f"{policy.name} reads these rows as other tokens: an NLL per token cannot be compared with it")
        self._tokens = tokens
        items = []
        for datum, logprobs in zip(data, _logprobs(policy, data), strict=True):
            weights = datum.loss_fn_inputs["weights"]
            items.append((-float((weights * logprobs).sum()), float(weights.sum())))
        return Measured({f"{self.name}/nll": items})


@dataclass
class Preference(Measure, Generic[AnyUnit]):
    """How well a policy tells wanted replies from others: accuracy by the rewards of the run's recipe; and by how much more
    it has come to like them since the run's beginning, in nats. An item per pair, or per reply where there are no pairs.
    """

    read: Callable[[PastPolicy], Sequence[AnyUnit]]
    score: Score[AnyUnit]
    origin: Callable[[PastPolicy], PastPolicy]
    _before: dict[str, Tensor] = field(default_factory=dict)  # the origin's log p of each reply, by base model

    def __call__(self, policy: PastPolicy) -> Measured:
        from cookbook.dpo import Part, are_paired, wanted_of, wins

        units = list(self.read(policy))
        data = [sequence.datum() for unit in units for sequence in unit.sequences]
        if policy.model.name not in self._before:
            origin = self.origin(policy)
            self._before[policy.model.name] = _reply_sums(origin, data)
            origin.close()
        before, now = self._before[policy.model.name], _reply_sums(policy, data)
        scored, wanted = self.score(Part(units, data, before), now), wanted_of(units)
        if wanted.all() or not wanted.any():
            raise UsageError("the replies held out are all of one sort (label): there is nothing to compare them with")
        gained, lost = (now - before)[wanted], (now - before)[~wanted]
        if are_paired(scored):
            items = {"accuracy": _singly(wins(scored)), "margin_nats": _singly(gained - lost)}
        else:
            won_CR = wins(scored)
            items = {
                "accuracy": of_two_samples(won_CR.mean(1).tolist(), won_CR.mean(0).tolist()),
                "margin_nats": of_two_samples((gained - lost.mean()).tolist(), (gained.mean() - lost).tolist()),
            }
        return Measured({f"held_out/{name}": values for name, values in items.items()})


@dataclass
class EnvScore(Measure):
    """Attempts at problems, an item per problem: reward, correct, pass@k. A failed attempt counts as 0."""

    name: str
    problems: Callable[[], Iterator[Problem]]
    choice: Choice
    limits: Limits
    say: Callable[[str], None]

    def __call__(self, policy: PastPolicy) -> Measured:
        problems = list(itertools.islice(self.problems(), self.choice.problems))
        if not problems:
            raise UsageError(f"{self.name} has no problems to measure by")
        self.say(f"{policy.name}: {len(problems)} problems of {self.name}, {self.choice.samples} attempts each")
        limits = replace(self.limits, on_error="zero", context=min(self.limits.context or policy.context, policy.context))
        if (self.choice.max_tokens or 0) >= (limits.context or 0):
            raise UsageError(f"--max-tokens {self.choice.max_tokens} leaves no room for a prompt in {limits.context} tokens")
        params = replace(self.choice.params, stop=policy.renderer.stop)
        runner = Rollouts(policy.renderer, params, limits)
        groups = runner.run(problems, policy.sampler, self.choice.samples, (self.choice.seed, "cook eval"))
        failed = [t.error for group in groups for t in group.trajectories if t.error]
        if failed:
            self.say(f"{len(failed)} attempts failed and count as 0, the first: {failed[0]}")
        figures = [env_metrics([group]) | pass_metrics([group]) for group in groups]
        names = [key for key in dict.fromkeys(key for f in figures for key in f) if key in COMPARED or key.startswith("pass@")]
        items = {f"{self.name}/{key}": [(f.get(key, 0.0), 1.0) for f in figures] for key in names}
        attempts = [attempt_row(group, trajectory) for group in groups for trajectory in group.trajectories]
        return Measured(items, [{"policy": policy.name, **row} for row in attempts])


@dataclass
class InspectTask(Measure):
    """A task of inspect-ai, an item per sample and scorer; the mean over its attempts."""

    task: str
    choice: Choice
    logs: Path
    say: Callable[[str], None]

    def __call__(self, policy: PastPolicy) -> Measured:
        from cookbook.inspect_model import run_task, scores_of

        choice = self.choice
        log = run_task(self.task, policy, self.logs, limit=choice.problems, samples=choice.samples, params=choice.params)
        self.say(f"inspect's log: {log.location}")
        return Measured({f"{log.eval.task}/{name}": items for name, items in scores_of(log).items()})


def measures_of(found: Found, words: Sequence[str], choice: Choice, say: Callable[[str], None]) -> list[Measure]:
    """Those that the words choose; without words, what the run itself was evaluated on. Before any weights are read."""
    say = cache(say)  # a second policy reads the same rows: nothing is told twice
    keys = {key_of(word).partition(".")[0] for word in spelt_out(list(words))}
    known = (*SCORED, *READ)
    if unknown := sorted(keys - {*known, "limits"}):
        meant = did_you_mean(unknown[0], known)
        raise UsageError(f"{unknown[0]}=...: cook eval takes {', '.join(known)} and options (--help){meant}")
    if keys & set(SCORED):
        config = compose("rl", list(words)).config
        return [_scored(config, choice, say, whole="data" in keys and not config.env)]
    if keys:
        config = compose("sft", list(words)).config
        return [RowLoss(config.data.name, lambda one: _every_row(config, one, say))]
    if found.run is None:
        raise UsageError(f"{found.name} is no run with data of its own: say on what, env=arithmetic or data=rows.jsonl")
    return list(_of_run(found.run, choice, say))


def _of_run(past: PastRun, choice: Choice, say: Callable[[str], None]) -> Iterator[Measure]:
    kind = past.recipe.partition("/")[0]
    if kind not in ("sft", "rl", "dpo"):
        unknown = f"is of an unknown recipe ({'; '.join(past.unreadable)})"
        what = f"comes from a recipe of its own ({past.recipe})" if past.recipe else unknown
        raise UsageError(f"{past.name} {what}: say on what, env=... or data=...")
    config = recompose(past.recipe, past.config, []).config
    if kind == "rl":
        yield _scored(config, choice, say)
        return
    if config.data.eval_rows:
        yield _rows_of_run(kind, past, config)
    if config.eval.env:
        yield _scored_env(config.eval.env, replace(choice, max_tokens=choice.max_tokens or config.eval.max_tokens), say)
    elif not config.data.eval_rows:
        raise UsageError(f"{past.name} held no rows out (data.eval_rows=0): say on what, env=... or data=rows.jsonl")


def _rows_of_run(kind: str, past: PastRun, config: Any) -> Measure:
    how = {"seed": config.seed, "batch_size": 1, "max_length": config.max_length}
    if kind == "sft":
        from cookbook.data import load_supervised

        return RowLoss("held_out", lambda policy: load_supervised(config.data, policy.renderer, **how).held_out)
    from cookbook.origin import adapter_of
    from cookbook.preferences import UNPAIRED, load_pairs, load_rated

    def read(policy: PastPolicy) -> Sequence[Any]:
        load = load_rated if past.recipe in UNPAIRED else load_pairs
        return load(config.data, policy.renderer, **how).held_out

    def origin(policy: PastPolicy) -> PastPolicy:
        from cookbook.past_policy import open_policy

        started = adapter_of(past)
        return open_policy(started, service=policy.service) if started else policy.base()

    return Preference(read, partial(load_recipe(past.recipe).score, config), origin)


def _scored(config: Any, choice: Choice, say: Callable[[str], None], whole: bool = False) -> Measure:
    """The env, or the prompts with rewards, of an RL Config; `whole`: all of its prompts, held out or not."""
    from cookbook.environments import problems_of
    from cookbook.prompts import every_prompt
    from cookbook.rl import eval_name

    choice = replace(choice, max_tokens=choice.max_tokens or config.max_tokens)
    if whole:
        prompts = cache(lambda: every_prompt(config, say))
        return EnvScore(Path(config.data.path or config.data.name).stem, lambda: iter(prompts()), choice, config.limits, say)
    return EnvScore(eval_name(config), lambda: problems_of(config, "eval"), choice, config.limits, say)


def _scored_env(env: dict[str, Any], choice: Choice, say: Callable[[str], None]) -> Measure:
    from cookbook.environments import problem_stream

    return EnvScore(str(env["name"]), lambda: problem_stream(env, "eval", choice.seed), choice, Limits(), say)


def _every_row(config: Any, policy: PastPolicy, say: Callable[[str], None]) -> Sequence[Datum]:
    """All usable rows of a file or a set that one names, held out or not; what is left out is told."""
    from cookbook.data import prepare
    from cookbook.row_report import RowReport

    read, name = prepare(config.data, policy.renderer, min(config.max_length, policy.context))
    report = RowReport(name)
    data = [sequence.datum() for row in read(report) for sequence in row]
    report.refuse_bad(config.data.max_bad)
    if report.rejected or report.overlong:
        for line in report.account():
            say(line)
    return data


def _reply_sums(policy: PastPolicy, data: Sequence[Datum]) -> Tensor:
    from cookbook.dpo import reply_sums

    return reply_sums(data, _logprobs(policy, data))


def _singly(values: Tensor) -> list[Item]:
    return [(value, 1.0) for value in values.tolist()]


def _logprobs(policy: PastPolicy, data: Sequence[Datum]) -> list[Tensor]:
    """Of each token where a weight is not 0 [N]."""
    trainer = policy.trainer()
    try:
        output = trainer.forward(list(data), "cross_entropy", logprobs="weighted").result()
    except (ValueError, FloatingPointError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    finally:
        trainer.close()
    logprobs = [one["logprobs"] for one in output.loss_fn_outputs]
    if not all(math.isfinite(float(one.sum())) for one in logprobs):
        raise UsageError(f"{policy.name} gives logprobs that are no numbers: the run diverged; try --checkpoint best")
    return logprobs
