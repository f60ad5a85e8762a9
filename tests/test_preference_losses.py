"""The losses of recipes/dpo on given logprobs: by the papers' formulas in float64, and TRL's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cookbook.dpo import Part, Scored, accuracy
from cookbook.preferences import Rated, TokenSequence, mismatched
from core import Datum, ModelInput
from recipes.dpo import ipo, kto, pairs, simpo
from tests.tiny import tiny_model_dir

POLICY = torch.tensor([-12.5, -14.0, -30.0, -29.0, -7.25, -7.25])  # chosen, rejected, chosen, ...
REFERENCE = torch.tensor([-13.0, -13.0, -30.5, -28.0, -7.0, -7.0])
LENGTHS = [5, 6, 12, 10, 3, 3]


def datum(length: int) -> Datum:
    """Two prompt tokens without weight, then a reply of `length` tokens."""
    weights = torch.tensor([0.0, *[1.0] * length])
    return Datum(ModelInput.from_ints([1] * (length + 1)), {"target_tokens": torch.ones(length + 1).long(), "weights": weights})


def part(units: list[Any], reference: torch.Tensor | None = REFERENCE, lengths: list[int] = LENGTHS) -> Part:
    return Part(units, [datum(length) for length in lengths], reference)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def by_pairs(loss: Callable[[float, float, int, int], float]) -> list[float]:
    """`loss(chosen log ratio, rejected log ratio, their lengths)` of each pair."""
    ratios = [p - r for p, r in zip(POLICY.tolist(), REFERENCE.tolist(), strict=True)]
    return [loss(ratios[i], ratios[i + 1], LENGTHS[i], LENGTHS[i + 1]) for i in range(0, 6, 2)]


def close(scored: Scored, expected: list[float]) -> bool:
    return scored.loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_dpo_is_the_log_sigmoid_of_the_margin() -> None:
    for smoothing in (0.0, 0.1):
        config = pairs.Config(beta=0.3, label_smoothing=smoothing)

        def expected(c: float, r: float, *_: int, s: float = smoothing) -> float:
            return -(1 - s) * log_sigmoid(0.3 * (c - r)) - s * log_sigmoid(-0.3 * (c - r))

        assert close(pairs.score(config, part([None] * 3), POLICY), by_pairs(expected))


def test_the_policy_that_is_the_reference_has_a_loss_of_ln_2_and_ties() -> None:
    scored = pairs.score(pairs.Config(), part([None] * 3), REFERENCE)
    assert scored.loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7) and accuracy(scored) == 0.5


def test_ipo_aims_at_a_gap_per_token() -> None:
    scored = ipo.score(ipo.Config(beta=0.2), part([None] * 3), POLICY)
    assert close(scored, by_pairs(lambda c, r, lc, lr: (c / lc - r / lr - 2.5) ** 2))


def test_simpo_asks_no_reference() -> None:
    scored = simpo.score(simpo.Config(beta=2.0, gamma=0.5), part([None] * 3, reference=None), POLICY)
    means = [p / length for p, length in zip(POLICY.tolist(), LENGTHS, strict=True)]
    assert close(scored, [-log_sigmoid(2.0 * (means[i] - means[i + 1]) - 0.5) for i in range(0, 6, 2)])


def rated(wanted: list[bool]) -> list[Rated]:
    from array import array

    return [Rated("row", "", TokenSequence("row", array("i"), array("f")), desirable) for desirable in wanted]


def test_kto_weighs_wanted_and_unwanted_replies_against_the_distance() -> None:
    config = kto.Config(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)
    wanted = [True, False, False, True, True, False]
    scored = kto.score(config, part(rated(wanted)), POLICY, 0.07)
    rewards = (0.2 * (POLICY - REFERENCE)).tolist()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = [
        1.5 * (1 - sigmoid(x - 0.07)) if good else 0.5 * (1 - sigmoid(0.07 - x))
        for x, good in zip(rewards, wanted, strict=True)
    ]
    assert close(scored, expected)
    good, bad = scored.chosen_reward.tolist(), scored.rejected_reward.tolist()
    assert accuracy(scored) == pytest.approx(sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / 9)


def test_a_mismatched_reply_is_to_another_prompt() -> None:
    """Pairs taken apart have two replies to each prompt, one after the other or not."""
    from array import array

    def reply(prompt: int, token: int) -> TokenSequence:
        return TokenSequence("row", array("i", [9, prompt, token, token]), array("f", [0, 0, 1, 1]))

    def tokens(replies: list[TokenSequence]) -> list[list[int]]:
        data = mismatched(replies, 64)
        last = [int(torch.as_tensor(datum.loss_fn_inputs["target_tokens"])[-1]) for datum in data]
        return [[*datum.model_input.to_ints(), token] for datum, token in zip(data, last, strict=True)]

    assert tokens([reply(1, 4), reply(1, 5), reply(2, 6)]) == [[9, 1, 6, 6], [9, 1, 6, 6], [9, 2, 4, 4]]
    assert tokens([reply(1, 4), reply(2, 5)]) == [[9, 1, 5, 5], [9, 2, 4, 4]]
    assert tokens([reply(1, 4), reply(1, 5)]) == []


def test_every_loss_falls_when_the_chosen_reply_becomes_likelier() -> None:
    scores: list[Callable[[torch.Tensor], Scored]] = [
        lambda sums: pairs.score(pairs.Config(), part([None] * 3), sums),
        lambda sums: ipo.score(ipo.Config(), part([None] * 3), sums),
        lambda sums: simpo.score(simpo.Config(), part([None] * 3), sums),
        lambda sums: kto.score(kto.Config(), part(rated([True, False] * 3)), sums),
    ]
    for score in scores:
        sums = POLICY.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(sums).loss.sum(), sums)
        assert (gradient[::2] < 0).all() and (gradient[1::2] > 0).all()


# ---- TRL's own losses


def policy_and_reference() -> tuple[Any, Any]:
    """Two random models a little apart."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model_dir()) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return policy, reference


def reply_logprobs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a padded batch of TRL's, summed over each reply."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


def trl_trainer(name: str, directory: Path, rows: list[dict[str, Any]], **values: Any) -> Any:
    """Its trainer, with two models of `policy_and_reference`: `model` and `ref_model`."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    values |= {"per_device_train_batch_size": len(rows), "report_to": "none", "use_cpu": True, "bf16": False}
    arguments = getattr(trl, f"{name}Config")(str(directory), beta=0.3, **values)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir())
    data = Dataset.from_list(rows)
    trainer = getattr(trl, f"{name}Trainer")(*policy_and_reference(), arguments, train_dataset=data, processing_class=tokenizer)
    trainer.model.eval()
    return trainer


@pytest.mark.parametrize(("kind", "loss"), [("sigmoid", pairs), ("ipo", ipo)])
def test_dpo_and_ipo_are_trls_and_so_are_their_gradients(kind: str, loss: Any, tmp_path: Path) -> None:
    """Its trainer's loss on a batch, two random models as policy and reference; ours on these models' logprobs."""
    rows = [{"prompt": f"say {i}", "chosen": " yes" * (1 + i), "rejected": " no" * (4 - i)} for i in range(4)]
    trainer = trl_trainer("DPO", tmp_path, rows, loss_type=[kind])
    batch = next(iter(trainer.get_train_dataloader()))
    order = torch.arange(8).view(2, 4).T.flatten()  # chosen, rejected, chosen, ...; there the chosen come first
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        then = reply_logprobs(trainer.ref_model, batch)[order]
    now = reply_logprobs(trainer.model, batch)[order]
    lengths = batch["completion_mask"].sum(1)[order].tolist()
    ours = loss.score(loss.Config(beta=0.3), part([None] * 4, then, lengths), now).loss.mean()
    assert_same_loss_and_gradient(ours, theirs, list(trainer.model.parameters()))


def assert_same_loss_and_gradient(ours: torch.Tensor, theirs: torch.Tensor, parameters: list[torch.Tensor]) -> None:
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    gradients = (torch.autograd.grad(loss, parameters) for loss in (ours, theirs))
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


def test_kto_is_trls_and_so_is_its_gradient(tmp_path: Path) -> None:
    """With z of our own mismatched replies: TRL takes that of the row before, we that of the row after, hence the order."""
    from array import array

    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    wanted = [True, False, False, True, False]
    rows = [{"prompt": f"say {i}", "completion": " yes" * (1 + i), "label": label} for i, label in enumerate(wanted)]
    trainer = trl_trainer("KTO", tmp_path, rows, **weights)
    policy, reference = trainer.model, trainer.ref_model
    batch = trainer.data_collator([trainer.train_dataset[i] for i in reversed(range(5))])
    theirs = trainer.compute_loss(policy, dict(batch))

    replies = []
    for tokens, length, mask in zip(batch["input_ids"], batch["attention_mask"].sum(1), batch["completion_mask"], strict=True):
        replies.append(TokenSequence("row", array("i", tokens[:length].tolist()), array("f", mask[:length].tolist())))
    units = [Rated("row", "", reply, bool(label)) for reply, label in zip(replies, batch["label"], strict=True)]
    others = mismatched(replies, 64)
    with torch.no_grad():
        apart = [datum_logprob(policy, other) - datum_logprob(reference, other) for other in others]
        distance = float(torch.stack(apart).mean())
        then = reply_logprobs(reference, batch)
    assert distance > 0  # not cut off
    now = reply_logprobs(policy, batch)
    ours = kto.score(kto.Config(beta=0.3, **weights), Part(units, others, then), now, 0.3 * distance).loss.mean()
    assert_same_loss_and_gradient(ours, theirs, list(policy.parameters()))


def datum_logprob(model: Any, datum: Datum) -> torch.Tensor:
    logits = model(torch.tensor([datum.model_input.to_ints()])).logits[0]
    targets, weights = (torch.as_tensor(datum.loss_fn_inputs[key]) for key in ("target_tokens", "weights"))
    return (logits.log_softmax(-1).gather(1, targets.long()[:, None]).squeeze(1) * weights).sum()


def cpo_losses(policy: torch.Tensor, **values: Any) -> torch.Tensor:
    """TRL's losses without a reference, of chosen and rejected logprobs [P, 2]."""
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer

    its = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device="cpu"), **values)
    losses, *_ = CPOTrainer.cpo_loss(its, policy[:, 0], policy[:, 1])  # type: ignore[arg-type]
    return losses


def test_simpo_is_trls_and_so_is_its_gradient() -> None:
    policy = POLICY.clone().requires_grad_()
    means = (policy / torch.tensor(LENGTHS)).view(-1, 2)
    theirs = cpo_losses(means, loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.0)
    ours = simpo.score(simpo.Config(beta=2.0, gamma=0.5), part([None] * 3, reference=None), policy).loss
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert_same_loss_and_gradient(ours.mean(), theirs.mean(), [policy])


def test_label_smoothing_is_trls_and_so_is_its_gradient() -> None:
    """That of its CPOTrainer, given log ratios: its DPOTrainer leaves smoothing out of this loss."""
    policy = POLICY.clone().requires_grad_()
    theirs = cpo_losses((policy - REFERENCE).view(-1, 2), loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    ours = pairs.score(pairs.Config(beta=0.3, label_smoothing=0.2), part([None] * 3), policy).loss
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert_same_loss_and_gradient(ours.mean(), theirs.mean(), [policy])
