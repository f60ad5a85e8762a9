"""What trajectories become: data whose gradient is that of their turns, with advantages on sampled tokens only."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from cookbook.limits import Limits
from cookbook.rollouts import rollout
from cookbook.trajectories import Trajectory, Transition, data_of, extension_rate
from core import Datum, ModelInput, SamplingParams, TrainingClient
from envs.env import Env, Message, StepResult
from tests.scripted_sampler import CUT, ScriptedSampler, tiny_renderer
from tests.tiny import assert_close, gradients, new_client, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
FORGETFUL = (  # drops the thoughts of earlier replies
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turn(prompt: list[int], reply: list[int], logprob: float = -4.0) -> Transition:
    return Transition(ModelInput.from_ints(prompt), reply, [logprob - 0.1 * i for i in range(len(reply))], "stop")


def chain() -> Trajectory:
    """Three turns; the second extends the first, the third starts anew."""
    first = turn(tokens(20, 0), tokens(6, 1))
    second = turn(first.observation.to_ints() + first.tokens + tokens(5, 2), tokens(7, 3))
    return Trajectory(transitions=[first, second, turn(tokens(9, 4), tokens(4, 5))])


def test_turns_that_extend_each_other_are_one_datum() -> None:
    trajectory = chain()
    first, second = trajectory.transitions[:2]
    data = data_of(trajectory, 2.0)
    whole = second.observation.to_ints() + second.tokens
    assert [datum.model_input.length for datum in data] == [len(whole) - 1, 12]
    assert data[0].model_input.to_ints() == whole[:-1] and data[0].loss_fn_inputs["target_tokens"].tolist() == whole[1:]
    assert extension_rate([trajectory]) == 0.5
    assert extension_rate([Trajectory(transitions=[first])]) == 1.0
    sampled = [0.0] * 19 + [1.0] * 6 + [0.0] * 5 + [1.0] * 7  # position i speaks of token i + 1
    assert data[0].loss_fn_inputs["weights"].tolist() == sampled
    assert data[0].loss_fn_inputs["advantages"].tolist() == [2 * one for one in sampled]
    logprobs = [0.0] * 19 + first.logprobs + [0.0] * 5 + second.logprobs
    assert data[0].loss_fn_inputs["logprobs"].tolist() == pytest.approx(logprobs)


def test_no_turn_is_no_datum() -> None:
    assert data_of(Trajectory(), 1.0) == []


def gradient_of(client: TrainingClient, data: list[Datum], loss_fn: str = "importance_sampling") -> torch.Tensor:
    """Accumulated in one flat tensor, from zero."""
    client.adapter.grad.zero_()
    client.forward_backward(data, loss_fn).result()
    return torch.cat([part.flatten() for pair in gradients(client).values() for part in pair])


def test_merged_turns_have_the_gradient_of_one_datum_per_turn(tmp_path: Path) -> None:
    client, trajectory = new_client(tmp_path), chain()
    apart = [datum for one in trajectory.transitions for datum in data_of(Trajectory(transitions=[one]), 0.7)]
    assert len(apart) == 3 and len(data_of(trajectory, 0.7)) == 2
    assert_close(gradient_of(client, data_of(trajectory, 0.7)), gradient_of(client, apart))


def test_on_policy_every_ratio_loss_has_reinforces_gradient(tmp_path: Path) -> None:
    """advantage * gradient of log p, which is cross_entropy's with the advantage for a weight."""
    client = new_client(tmp_path)
    plain = data_of(chain(), 0.7)
    asked = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in plain]
    logprobs = [output["logprobs"] for output in client.forward(asked, "cross_entropy").result().loss_fn_outputs]
    on_policy = [Datum(d.model_input, {**d.loss_fn_inputs, "logprobs": lp}) for d, lp in zip(plain, logprobs, strict=True)]
    weighted = [Datum(d.model_input, {**a.loss_fn_inputs, "weights": d.loss_fn_inputs["advantages"]})
                for d, a in zip(plain, asked, strict=True)]  # fmt: skip
    reinforce = gradient_of(client, weighted, "cross_entropy")
    for loss_fn in ("importance_sampling", "ppo", "cispo"):
        assert_close(gradient_of(client, on_policy, loss_fn), reinforce)


# ---- from rollouts


class Talk(Env):
    """Three questions."""

    def __init__(self) -> None:
        self.asked = 0

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": "one?"}]

    def step(self, reply: Message) -> StepResult:
        self.asked += 1
        return StepResult(1.0, done=self.asked == 3, messages=[{"role": "user", "content": "more?"}])


def talk(reply: str, template: str | None = None) -> Trajectory:
    client = ScriptedSampler(lambda prompt, params: reply, tiny_renderer(template))
    return asyncio.run(rollout(Talk(), client, client.renderer, SamplingParams(max_tokens=50), Limits()))


@pytest.mark.parametrize("reply", ["yes", "cut" + CUT, " <|im_start|>odd\n", ""])
def test_a_conversation_is_one_datum_whatever_was_sampled(reply: str) -> None:
    trajectory = talk(reply)
    (datum,) = data_of(trajectory, 1.0)
    sampled = [token for turn in trajectory.transitions for token in turn.tokens]
    chosen = datum.loss_fn_inputs["weights"] == 1
    assert torch.as_tensor(datum.loss_fn_inputs["target_tokens"])[chosen].tolist() == sampled
    assert extension_rate([trajectory]) == 1.0


def test_a_template_that_rewrites_replies_starts_a_datum_per_turn() -> None:
    trajectory = talk("<think>hm</think>yes", FORGETFUL)
    data = data_of(trajectory, 1.0)
    assert len(data) == 3 and extension_rate([trajectory]) == 0.0
    for datum, one in zip(data, trajectory.transitions, strict=True):
        assert datum.model_input.to_ints() == (one.observation.to_ints() + one.tokens)[:-1]
        assert int(datum.loss_fn_inputs["weights"].sum()) == len(one.tokens)
