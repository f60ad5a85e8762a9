"""Direct preference optimisation: make chosen replies likelier and rejected ones less likely, against a fixed reference.

    reward(reply) = beta (log p(reply) - log p_ref(reply))        summed over the reply's tokens
    loss = -(1 - s) log sigmoid(chosen reward - rejected reward) - s log sigmoid(rejected reward - chosen reward)

the mean over the pairs of a batch, s the label smoothing. The reference is the policy as it stood at step 0, so the first
loss is ln 2. Left out: an SFT term on chosen replies, length normalisation (simpo.py has it), and a reference that moves.
Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290; smoothing: Mitchell, "cDPO", 2023.

    uv run cook dpo                                          # SmolLM2-135M on solutions with one thing wrong
    uv run cook dpo model=qwen3-8b data=ultrafeedback init_from=RUN      # on a CUDA GPU, after SFT
    uv run cook dpo data=file data.path=pairs.jsonl          # prompt, chosen, rejected
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from cookbook.config import DataConfig, EngineConfig, LogConfig, LoraConfig, ModelConfig, OptimConfig, SamplesConfig
from cookbook.dpo import Part, Scored, Session, check_between, logsigmoid, share_of_mean
from cookbook.preferences import Pair, load_pairs
from cookbook.run import Run

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Shared:
    """The keys that all preference recipes have."""

    name: str | None = None  # of the run; null: made from model, data and time
    run_dir: str | None = None  # null: runs/<name>
    seed: int = 0  # adapter init and data order
    steps: int | None = None  # optimizer steps; null: `epochs` passes over the pairs
    epochs: float = 1.0
    batch_size: int = 32  # pairs per step
    learning_rate: float | None = None  # peak; null: the model's default (printed at the start)
    max_length: int = 2048  # tokens of a prompt with a reply
    init_from: str | None = None  # a run, a tinker:// URI or an adapter directory to start from; also the reference then
    eval_every: int = 20  # steps; 0: only before and after
    save_every: int = 50  # steps; 0: only at the end (the best evaluated weights are saved too)
    save_minutes: float = 10.0  # also after so many minutes; 0: never
    keep_last: int = 3  # checkpoints kept, beside the best and the final one
    service: str = "local"  # local, the URL of a server, or tinker: the hosted one
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(name="gsm_symbolic_pairs"))
    eval: SamplesConfig = field(default_factory=SamplesConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class Config(Shared):
    beta: float = 0.1  # what a nat more than the reference gives is worth; larger keeps the policy nearer to it
    label_smoothing: float = 0.0  # share of pairs taken to be the wrong way round, below 0.5

    def __post_init__(self) -> None:
        check_between("beta", self.beta, 0)
        check_between("label_smoothing", self.label_smoothing, 0, 0.5, with_low=True)


def main(config: Config) -> None:
    with Run(config, "dpo/pairs", best="eval/held_out/accuracy", best_is="max") as run:
        session = Session(run, config, load_pairs, partial(score, config))
        for step in session.steps():
            parts = session.batch(step)
            num_pairs = sum(len(part.units) for part in parts)
            gradients = []
            for part in parts:
                loss = share_of_mean(session.score, part, num_pairs)
                gradients.append(session.trainer.forward_backward_custom(part.data, loss, logprobs="weighted"))
            update = session.optim_step(step)
            session.finish(step, parts, gradients, update)


def score(config: Config, part: Part[Pair], sums: Tensor) -> Scored:
    """`sums` [2P]: log p of each pair's chosen and rejected reply."""
    assert part.reference is not None
    chosen_P, rejected_P = (config.beta * (sums - part.reference)).view(-1, 2).unbind(1)
    margin_P, smoothing = chosen_P - rejected_P, config.label_smoothing
    loss_P = -(1 - smoothing) * logsigmoid(margin_P) - smoothing * logsigmoid(-margin_P)
    return Scored(loss_P, chosen_P, rejected_P)
