"""What preference recipes share around their loop: data and reference, passes over batches, evaluation and the record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Protocol

from cookbook.config import DataConfig, EngineConfig, LoraConfig, ModelConfig, OptimConfig, SamplesConfig
from cookbook.data_log import write_data
from cookbook.errors import UsageError
from cookbook.eval_samples import EvalSamples
from cookbook.memory import peak_memory_gb
from cookbook.origin import settle
from cookbook.preferences import AnyUnit, PreferenceData, Unit
from cookbook.renderers import Renderer, load_renderer
from cookbook.run import Run, RunConfig
from cookbook.schedule import adam_at, peak_learning_rate, total_steps
from cookbook.service import check_context, check_vocabulary, connect, new_trainer, opened, resumed
from core import Datum, ForwardBackwardOutput, Future, OptimStepOutput

if TYPE_CHECKING:
    from torch import Tensor

    from core.request import CustomLoss


class PreferenceConfig(RunConfig, Protocol):
    """The keys of a recipe's Config that a Session reads."""

    seed: int
    steps: int | None
    epochs: float
    batch_size: int
    learning_rate: float | None
    max_length: int
    init_from: str | None
    eval_every: int
    save_every: int
    save_minutes: float
    service: str
    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    eval: SamplesConfig
    optim: OptimConfig
    engine: EngineConfig


@dataclass(frozen=True)
class Part(Generic[AnyUnit]):
    """Units that fit one micro-batch, their data (each unit's sequences one after another), and what the reference says."""

    units: list[AnyUnit]
    data: list[Datum]
    reference: Tensor | None  # logprobs of the replies of the data, summed over their tokens [D]; None without a reference

    def sums(self, logprobs: Sequence[Tensor]) -> Tensor:
        """Per-token logprobs of the data, each [N] -> those of the replies, summed [D]."""
        return reply_sums(self.data, logprobs)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each reply [D]."""
        import torch

        return torch.stack([datum.loss_fn_inputs["weights"].sum() for datum in self.data])


@dataclass(frozen=True)
class Scored:
    """What a recipe makes of a part: the loss of each unit, the rewards of its wanted replies and of the others."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


Score = Callable[[Part[AnyUnit], "Tensor"], Scored]  # (part, the policy's summed logprobs [D])
Load = Callable[..., PreferenceData[AnyUnit]]  # cookbook/preferences.py: load_pairs or load_rated


class Session(Generic[AnyUnit]):
    """A run between two updates: `for step in session.steps()`, take `session.batch(step)`, (the recipe trains,) finish.

    `score` is the recipe's loss; `load` load_pairs or load_rated; without `with_reference` parts have none. The reference is
    the policy as it stood at step 0: a second client that is never stepped, opened alike by every session of the run.
    """

    def __init__(
        self, run: Run, config: PreferenceConfig, load: Load[AnyUnit], score: Score[AnyUnit], *, with_reference: bool = True
    ) -> None:
        self.run, self.config, self.score = run, config, score
        service = connect(config.service, run.store, config.engine)
        found = resumed(run, service)
        origin = settle(run, service, config.lora, config.init_from)
        loading = None if found else new_trainer(service, config.model, config.lora, config.seed, origin)
        lora = replace(config.lora, rank=1)  # B is zero, so the rank of a fresh one does not matter
        reference = new_trainer(service, config.model, lora, config.seed, origin) if with_reference else None
        renderer = load_renderer(config.model)  # while the model loads
        self.data = load(
            config.data, renderer, seed=config.seed, batch_size=config.batch_size, max_length=config.max_length,
            console=run.console,
        )  # fmt: skip
        run.reads(self.data.report)
        self.trainer = found[1] if found else opened(loading)
        self.reference = opened(reference) if reference else None
        info = self.trainer.get_info()
        check_context(config.max_length, info)
        check_vocabulary(renderer.tokenizer, info)
        self._budget, self._shares_prompts = info.token_budget, info.device.startswith("cpu")
        self.num_steps = total_steps(config.steps, config.epochs, self.data.epoch_steps)
        self._peak = peak_learning_rate(config.learning_rate, config.optim, info, "dpo")
        run.record("engine.token_budget", info.token_budget)
        what = f"{self.num_steps} steps of {config.batch_size}, learning rate {self._peak:.3g}"
        run.note(f"{what}, {info.dtype} on {info.device}")
        self._sums: dict[int, list[float]] = {}  # of the reference, by unit
        self._samples, self._texts_of = self._eval_samples(renderer), renderer.texts_of
        self.done, self._num_tokens = (found[0]["step"], found[0]["loop"]["tokens"]) if found else (0, 0)
        self._stopping = False
        if not found and self._evaluates:
            run.log_eval("before", self._evaluate())
        run.begin(self.num_steps)
        self._last_end = self._last_save = time.monotonic()
        self._next = self._begin(self.done) if self.done < self.num_steps else None

    def _eval_samples(self, renderer: Renderer) -> EvalSamples:
        units = [unit for unit in self.data.held_out if _wanted(unit)][: 8 * self.config.eval.prompts]
        wanted = [unit.sequences[0].datum() for unit in units]
        return EvalSamples(self.run, self.config.eval, renderer, self.trainer, wanted, self.config.seed)

    @property
    def _evaluates(self) -> bool:
        return bool(self.data.held_out or self.config.eval.env)

    def steps(self) -> Iterator[int]:
        """The steps to do, from 0, until the last one or until someone asks to stop."""
        while self.done < self.num_steps and not self._stopping:
            yield self.done

    def batch(self, step: int) -> list[Part[AnyUnit]]:
        """The units of a step in parts of about a micro-batch: the loss is a sum over units, so each takes one pass."""
        assert self._next is not None and self._next.step == step
        begun, self._next = self._next, None
        self._num_tokens += sum(datum.model_input.length for part in begun.parts for datum in part.data)
        return self._ended(begun)

    def optim_step(self, step: int) -> Future[OptimStepOutput]:
        """The update behind the gradients submitted for this step; the reference goes on with the next step's replies."""
        update = self.trainer.optim_step(adam_at(step, self.num_steps, self._peak, self.config.optim))
        if step + 1 < self.num_steps:
            self._next = self._begin(step + 1)
        return update

    def _begin(self, step: int) -> _Begun[AnyUnit]:
        return self._asked(step, self.data.batch(step))

    def _asked(self, step: int, units: Sequence[AnyUnit]) -> _Begun[AnyUnit]:
        """Parts of units, the reference asked for those whose logprobs are not known yet."""
        parts = [Part(group, [s.datum() for unit in group for s in unit.sequences], None) for group in self._cut(units)]
        futures: list[Future[ForwardBackwardOutput] | None] = [None] * len(parts)
        if self.reference is not None:
            for i, part in enumerate(parts):
                if any(id(unit) not in self._sums for unit in part.units):
                    futures[i] = self.reference.forward(part.data, "cross_entropy", logprobs="weighted")
        return _Begun(step, parts, futures)

    def _ended(self, begun: _Begun[AnyUnit]) -> list[Part[AnyUnit]]:
        import torch

        parts = []
        for part, future in zip(begun.parts, begun.futures, strict=True):
            if future is not None:
                sums = iter(part.sums([output["logprobs"] for output in future.result().loss_fn_outputs]).tolist())
                for unit in part.units:
                    self._sums[id(unit)] = [next(sums) for _ in unit.sequences]
            known = None
            if self.reference is not None:
                known = torch.tensor([value for unit in part.units for value in self._sums[id(unit)]], dtype=torch.float32)
            parts.append(replace(part, reference=known))
        return parts

    def _cut(self, units: Sequence[AnyUnit]) -> Iterator[list[AnyUnit]]:
        group: list[AnyUnit] = []
        rows = 0
        for unit in units:
            own = self._rows(unit)
            if group and rows + own > self._budget:
                yield group
                group, rows = [], 0
            group.append(unit)
            rows += own
        yield group

    def _rows(self, unit: AnyUnit) -> int:
        """Rows of a micro-batch; on a CPU a prompt that replies share counts once."""
        first, *others = (sequence.tokens for sequence in unit.sequences)
        total = len(first) + sum(len(tokens) for tokens in others)
        if self._shares_prompts:
            for tokens in others:
                total -= next((i for i, (a, b) in enumerate(zip(first, tokens, strict=False)) if a != b), len(tokens))
        return total

    def finish(
        self, step: int, parts: Sequence[Part[AnyUnit]], gradients: Sequence[Future[ForwardBackwardOutput]],
        update: Future[OptimStepOutput], metrics: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Read the results of a step; evaluate, log and save what is due."""
        config, run = self.config, self.run
        outputs = [gradient.result() for gradient in gradients]
        grad_norm = self._grad_norm(step, update)
        policy = [part.sums([o["logprobs"] for o in out.loss_fn_outputs]) for part, out in zip(parts, outputs, strict=True)]
        self.done = step + 1
        final, self._stopping = self.done == self.num_steps, run.should_stop
        eval_due = self._evaluates and (final or _every(config.eval_every, self.done))
        save_due = final or self._stopping or _every(config.save_every, self.done)
        save_due |= 0 < 60 * config.save_minutes < time.monotonic() - self._last_save
        seconds, self._last_end = time.monotonic() - self._last_end, time.monotonic()
        if eval_due:
            run.log_eval("after" if final else "during", self._evaluate())
            save_due |= run.is_best
        tokens = sum(datum.model_input.length for part in parts for datum in part.data)
        run.log(self.done, {
            **{f"dpo/{name}": value for name, value in self._figures(parts, policy).items()}, **(metrics or {}),
            "optim/lr": adam_at(step, self.num_steps, self._peak, config.optim).learning_rate, "optim/grad_norm": grad_norm,
            "progress/tokens": self._num_tokens, "progress/done_frac": self.done / self.num_steps,
            "progress/epoch": self.done / self.data.epoch_steps, "time/step": seconds,
            "perf/train_tokens_per_second": tokens / seconds, "perf/peak_memory_gb": peak_memory_gb(),
        })  # fmt: skip
        if save_due:
            uri = self.trainer.save_state(f"{self.done:06d}", overwrite=True).result().path
            run.checkpoint(self.done, uri, loop={"tokens": self._num_tokens})
            self._last_save = time.monotonic()
        if eval_due or save_due:  # not the next step's time
            self._last_end = time.monotonic()

    def _grad_norm(self, step: int, update: Future[OptimStepOutput]) -> float:
        try:
            return update.result().metrics["grad_norm:mean"]
        except FloatingPointError as error:
            labels = [unit.label for unit in self.data.batch(step)]
            shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
            raise FloatingPointError(f"step {step + 1}: {error}; rows {shown} (cook data show)") from error

    def _evaluate(self) -> dict[str, float]:
        """Held-out replies under the policy as it is."""
        samples = self._samples(self.done, final=self.done == self.num_steps)
        if not self.data.held_out:
            return samples
        parts = self._ended(self._asked(self.done, self.data.held_out))
        # after the reference: in micro-batches with it, bf16 would round the two differently, and step 0 is to be a tie
        futures = [self.trainer.forward(part.data, "cross_entropy", logprobs="weighted") for part in parts]
        outputs = [future.result() for future in futures]
        self._write(parts[0], outputs[0])
        policy = [part.sums([o["logprobs"] for o in out.loss_fn_outputs]) for part, out in zip(parts, outputs, strict=True)]
        figures = self._figures(parts, policy)
        if "accuracy" in figures:
            for kind in sorted({unit.kind for part in parts for unit in part.units} - {""}):
                figures |= self._accuracy_of(kind, parts, policy)
        return {**{f"held_out/{name}": value for name, value in figures.items()}, **samples}

    def _write(self, part: Part[AnyUnit], output: ForwardBackwardOutput) -> None:
        """A few held-out replies token by token, for the report."""
        about = [
            {"pair": i, "side": "chosen" if j == 0 and _wanted(unit) else "rejected", "kind": unit.kind}
            for i, unit in enumerate(part.units) for j in range(len(unit.sequences))
        ]  # fmt: skip
        write_data(self.run.dir, self.done, "held_out", part.data, output, self._texts_of, about)

    def _figures(self, parts: Sequence[Part[AnyUnit]], policy: Sequence[Tensor]) -> dict[str, float]:
        scored = _together([self.score(part, sums) for part, sums in zip(parts, policy, strict=True)])
        figures = {"loss": float(scored.loss.mean())}
        if _comparable(scored):
            chosen, rejected = float(scored.chosen_reward.mean()), float(scored.rejected_reward.mean())
            figures |= {"accuracy": accuracy(scored), "margin": chosen - rejected}
            figures |= {"chosen_reward": chosen, "rejected_reward": rejected}
        if self.reference is not None:
            figures |= _shifts(parts, policy)
        return figures

    def _accuracy_of(self, kind: str, parts: Sequence[Part[AnyUnit]], policy: Sequence[Tensor]) -> dict[str, float]:
        """Over the units of one kind. Single replies: where only mistakes have kinds, against all wanted ones."""
        has_wanted = any(unit.kind == kind and _wanted(unit) for part in parts for unit in part.units)
        chosen = []
        for part, sums in zip(parts, policy, strict=True):
            width = len(part.units[0].sequences)
            keep = [i for i, u in enumerate(part.units) if u.kind == kind or (not has_wanted and _wanted(u))]
            places = [i * width + j for i in keep for j in range(width)]
            if keep:
                reference = None if part.reference is None else part.reference[places]
                taken = Part([part.units[i] for i in keep], [part.data[i] for i in places], reference)
                chosen.append(self.score(taken, sums[places]))
        scored = _together(chosen)
        return {f"accuracy/{kind}": accuracy(scored)} if _comparable(scored) else {}


@dataclass(frozen=True)
class _Begun(Generic[AnyUnit]):
    """The units of a step, with what the reference has been asked."""

    step: int
    parts: list[Part[AnyUnit]]
    futures: list[Future[ForwardBackwardOutput] | None]


def share_of_mean(score: Score[AnyUnit], part: Part[AnyUnit], num_units: int) -> CustomLoss:
    """The custom loss of a part of a step: the engine sums over parts, the recipe averages over the step's units."""

    def loss(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        return score(part, part.sums(logprobs)).loss.sum() / num_units, {}

    return loss


def logsigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def check_between(key: str, value: float, low: float, high: float = math.inf, *, with_low: bool = False) -> None:
    """UsageError unless low < value < high (low <= value with `with_low`)."""
    if not (low < value < high or (with_low and value == low)):
        least = f"at least {low:g}" if with_low else f"more than {low:g}"
        most = "" if high == math.inf else f" and less than {high:g}"
        raise UsageError(f"{key}={value:g}: expected {least}{most}")


def reply_sums(data: Sequence[Datum], logprobs: Sequence[Tensor]) -> Tensor:
    """Logprobs of the tokens with a weight, summed in fp32: [D]. Carries the gradient of `logprobs`."""
    import torch

    return torch.stack([(lp * d.loss_fn_inputs["weights"]).sum() for d, lp in zip(data, logprobs, strict=True)])


def accuracy(scored: Scored) -> float:
    """Share of pairs whose chosen reply has the larger reward, a tie counted half; unpaired replies: of all combinations."""
    return float(wins(scored).mean())


def wins(scored: Scored) -> Tensor:
    """1 where a chosen reply has the larger reward, 0.5 at a tie, else 0: of each pair [P], or of all combinations [C, R]."""
    chosen, rejected = scored.chosen_reward, scored.rejected_reward
    if not are_paired(scored):
        chosen, rejected = chosen[:, None], rejected[None, :]
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def _comparable(scored: Scored) -> bool:
    """Whether there are replies of both sorts; unpaired ones may all be of one."""
    return len(scored.chosen_reward) > 0 and len(scored.rejected_reward) > 0


def are_paired(scored: Scored) -> bool:
    return len(scored.chosen_reward) == len(scored.rejected_reward) == len(scored.loss)


def wanted_of(units: Sequence[Unit]) -> Tensor:
    """Which replies are wanted: the first of a pair, rated ones by their label [D]."""
    import torch

    return torch.tensor([j == 0 and _wanted(unit) for unit in units for j in range(len(unit.sequences))])


def _wanted(unit: Unit) -> bool:
    """Whether its first reply is wanted: that of a pair, or one rated so."""
    return getattr(unit, "desirable", True)


def _together(scored: Sequence[Scored]) -> Scored:
    import torch

    return Scored(
        torch.cat([s.loss for s in scored]),
        torch.cat([s.chosen_reward for s in scored]),
        torch.cat([s.rejected_reward for s in scored]),
    )


def _shifts(parts: Sequence[Part[AnyUnit]], policy: Sequence[Tensor]) -> dict[str, float]:
    """By how much wanted replies have become likelier than under the reference, in nats per token."""
    gained = tokens = 0.0
    for part, sums in zip(parts, policy, strict=True):
        assert part.reference is not None
        wanted = wanted_of(part.units).tolist()
        for more, length, is_wanted in zip((sums - part.reference).tolist(), part.lengths.tolist(), wanted, strict=True):
            gained, tokens = gained + is_wanted * more, tokens + is_wanted * length
    return {"chosen_shift": gained / max(tokens, 1.0)}


def _every(interval: int, done: int) -> bool:
    return interval > 0 and done % interval == 0
