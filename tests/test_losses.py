"""Each loss is the formula it says, as a plain sum: terms, gradients, weights and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from core import Datum, ModelInput, TrainingClient
from core.losses import LOSSES, loss_and_gradient
from tests.tiny import (
    VOCAB,
    assert_close,
    assert_gradients_equal,
    data,
    datum,
    gradients,
    logprobs_of,
    new_client,
    peft_model,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
]
LENGTHS = (4, 17, 30)
Formula = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[TrainingClient]:
    client = new_client(tmp_path_factory.mktemp("store"), rank=3)
    yield client
    client.close()


@pytest.fixture(autouse=True)
def no_gradient(client: TrainingClient) -> None:
    client.adapter.clear_grad()


@pytest.fixture(scope="module")
def saved(client: TrainingClient) -> str:
    return client.save_state("a").result().directory


def cross_entropy(lp, w):
    return -(w * lp).sum()


def importance_sampling(lp, w, q, a):
    return -(w * a * lp.exp() / q.exp()).sum()


def clipped(ratio, w, a, low, high):
    """PPO's minimum, spelled out: no gradient once a ratio has gone far enough in the direction of its advantage."""
    up, down = (a > 0) & (ratio > high), (a < 0) & (ratio < low)
    term = torch.where(up, high * a, torch.where(down, low * a, ratio * a))
    return -(w * term).sum()


def ppo(lp, w, q, a, low=0.8, high=1.2):
    return clipped((lp - q).exp(), w, a, low, high)


def cispo(lp, w, q, a, low=0.0, high=4.0):
    ratio = (lp - q).exp().detach()
    return -(w * ratio.clamp(low, high) * lp * a).sum()


def dro(lp, w, q, a, beta=0.05):
    return -(w * (lp * a - beta / 2 * (lp - q) ** 2)).sum()


def gspo(lp, w, q, a, mask, low=1 - 3e-4, high=1 + 4e-4):
    chosen = mask != 0
    s = (lp.detach() - q)[chosen].mean()
    return clipped((s + lp - lp.detach()).exp(), w, a, low, high)


FORMULAS: dict[str, Formula] = {f.__name__: f for f in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo)}
CONFIGS: list[tuple[str, dict[str, float]]] = [
    *((name, {}) for name in FORMULAS),
    ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05}),
    ("cispo", {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}),
    ("dro", {"beta": 0.7}),
    ("gspo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.01}),
]
NAMES = {"clip_low_threshold": "low", "clip_high_threshold": "high", "beta": "beta"}


def near_policy(client: TrainingClient, loss_fn: str, spread: float = 0.3) -> list[Datum]:
    """Sampling logprobs near the policy's, so that some ratios are inside every clip and some outside."""
    batch = [*data(LENGTHS, 1, loss_fn), *data(LENGTHS, 2, loss_fn)]
    if loss_fn == "cross_entropy":
        return batch
    outputs = client.forward(batch, loss_fn).result().loss_fn_outputs
    noise, generator = spread * torch.linspace(-1, 1, len(batch)), torch.Generator().manual_seed(0)
    near = [
        lp["logprobs"] + shift + spread * torch.randn(lp["logprobs"].shape, generator=generator)
        for lp, shift in zip(outputs, noise, strict=True)
    ]
    return [Datum(d.model_input, {**d.loss_fn_inputs, "logprobs": q}) for d, q in zip(batch, near, strict=True)]


def arguments(one: Datum) -> list[torch.Tensor]:
    names = ("weights", "logprobs", "advantages", "sequence_ratio_mask")
    return [one.loss_fn_inputs[name] for name in names if name in one.loss_fn_inputs]


@pytest.mark.parametrize(("loss_fn", "config"), CONFIGS)
def test_loss_and_gradients_are_the_formulas(client: TrainingClient, saved: str, loss_fn: str, config: dict) -> None:
    batch = near_policy(client, loss_fn)
    ours = client.forward_backward(batch, loss_fn, config).result()
    model = peft_model(saved)
    keywords = {NAMES[key]: value for key, value in config.items()}
    loss = sum(FORMULAS[loss_fn](logprobs_of(model, one), *arguments(one), **keywords) for one in batch)
    loss.backward()
    assert ours.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_gradients_equal(client, model, 2e-5)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_forward_reports_the_same_loss(client: TrainingClient, loss_fn: str) -> None:
    batch = near_policy(client, loss_fn)
    forward, both = client.forward(batch, loss_fn).result(), client.forward_backward(batch, loss_fn).result()
    assert forward.metrics["loss:sum"] == pytest.approx(both.metrics["loss:sum"], rel=1e-6)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_batch_is_the_plain_sum_of_its_data(client: TrainingClient, loss_fn: str) -> None:
    batch = near_policy(client, loss_fn)
    total = client.forward(batch, loss_fn).result().metrics["loss:sum"]
    parts = [client.forward([one], loss_fn).result().metrics["loss:sum"] for one in batch]
    assert total == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_missing_weights_are_ones_and_double_weights_double_loss_and_gradient(
    client: TrainingClient, loss_fn: str
) -> None:
    bare = [
        Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k != "weights"})
        for d in near_policy(client, loss_fn)
    ]
    losses, found = [], []
    for weight in (None, 1.0, 2.0):
        batch = bare if weight is None else [
            Datum(d.model_input, {**d.loss_fn_inputs, "weights": [weight] * d.model_input.length}) for d in bare
        ]  # fmt: skip
        losses.append(client.forward_backward(batch, loss_fn).result().metrics["loss:sum"])
        found.append(client.adapter.grad.clone())
        client.adapter.clear_grad()
    assert losses == pytest.approx([losses[0], losses[0], 2 * losses[0]], rel=1e-5)
    assert_close(found[1], found[0])
    assert_close(found[2], 2 * found[0])


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_all_and_weighted_logprobs_go_with_the_same_gradient(client: TrainingClient, loss_fn: str) -> None:
    """gspo's sequence ratio reads positions that no weight trains."""
    batch = near_policy(client, loss_fn, 1e-4 if loss_fn == "gspo" else 0.3)
    full = client.forward_backward(batch, loss_fn).result()
    expected = client.adapter.grad.clone()
    client.adapter.clear_grad()
    some = client.forward_backward(batch, loss_fn, logprobs="weighted").result()
    assert_close(client.adapter.grad, expected)
    assert some.metrics["loss:sum"] == pytest.approx(full.metrics["loss:sum"], rel=1e-5)
    for one, output in zip(batch, some.loss_fn_outputs, strict=True):
        left_out = one.loss_fn_inputs["weights"] == 0
        if loss_fn == "gspo":
            left_out &= one.loss_fn_inputs["sequence_ratio_mask"] == 0
        assert left_out.any() or one.model_input.length < 10
        assert bool((output["logprobs"][left_out] == 0).all())
        assert bool((output["logprobs"][~left_out] < 0).all())


def test_weights_of_zero_everywhere_give_a_gradient_of_zero_either_way(client: TrainingClient) -> None:
    nothing = [
        Datum(d.model_input, {**d.loss_fn_inputs, "weights": [0.0] * d.model_input.length}) for d in data(LENGTHS)
    ]
    for logprobs in ("all", "weighted"):
        output = client.forward_backward(nothing, "cross_entropy", logprobs=logprobs).result()
        assert output.metrics["loss:sum"] == 0
        assert [o["logprobs"].shape for o in output.loss_fn_outputs] == [(length,) for length in LENGTHS]
        assert client.adapter.has_grad and not client.adapter.grad.any()
        client.adapter.clear_grad()


def test_ppo_inside_the_clip_is_importance_sampling(client: TrainingClient) -> None:
    batch, found = near_policy(client, "ppo"), []
    for loss_fn, config in (
        ("ppo", {"clip_low_threshold": 0.01, "clip_high_threshold": 100.0}),
        ("importance_sampling", None),
        ("ppo", None),
    ):
        client.forward_backward(batch, loss_fn, config).result()
        found.append(client.adapter.grad.clone())
        client.adapter.clear_grad()
    assert_close(found[0], found[1])
    assert (found[2] - found[1]).norm() > 0.1 * found[1].norm()  # with the default thresholds much is clipped


def test_on_policy_importance_sampling_has_reinforces_gradient(client: TrainingClient) -> None:
    """d(exp(lp - q) A) = A d lp where q = lp: REINFORCE is cross_entropy with the advantages as weights."""
    batch = near_policy(client, "importance_sampling", spread=0.0)
    client.forward_backward(batch, "importance_sampling").result()
    expected = client.adapter.grad.clone()
    client.adapter.clear_grad()
    weighted = [
        Datum(d.model_input, {
            "target_tokens": d.loss_fn_inputs["target_tokens"],
            "weights": d.loss_fn_inputs["weights"] * d.loss_fn_inputs["advantages"],
        }) for d in batch
    ]  # fmt: skip
    client.forward_backward(weighted, "cross_entropy").result()
    assert_close(client.adapter.grad, expected)


def test_gspo_ratios_are_of_whole_sequences(client: TrainingClient) -> None:
    """One token's sampling logprob moves the terms of all tokens of its sequence, and of no other."""
    batch = near_policy(client, "gspo", spread=1e-4)[:2]
    moved = dict(batch[0].loss_fn_inputs)
    moved["logprobs"] = moved["logprobs"].clone()
    moved["logprobs"][-1] -= 1e-4 * 3
    other = Datum(batch[0].model_input, moved)
    wide = {"clip_low_threshold": 0.1, "clip_high_threshold": 10.0}

    def losses(*some: Datum) -> list[float]:
        return [client.forward([one], "gspo", wide).result().metrics["loss:sum"] for one in some]

    both = client.forward([other, batch[1]], "gspo", wide).result().metrics["loss:sum"]
    assert both == pytest.approx(sum(losses(other, batch[1])), rel=1e-5)
    inputs = batch[0].loss_fn_inputs
    s = 3e-4 / float((inputs["sequence_ratio_mask"] != 0).sum())  # rise of the mean log ratio
    assert losses(other)[0] == pytest.approx(losses(batch[0])[0] * (1 + s), rel=2e-6)


@pytest.mark.parametrize("logprobs", ["all", "weighted"])
def test_cross_entropy_takes_several_targets_per_position(client: TrainingClient, saved: str, logprobs: str) -> None:
    """Soft targets: K tokens with K weights at each position, beside data with one target."""
    generator = torch.Generator().manual_seed(0)
    batch: list[Datum] = []
    for length, k in ((5, 3), (12, 3), (7, 1), (9, 5)):
        targets = torch.randint(VOCAB, (length, k), generator=generator)
        targets[2] = targets[2, 0]  # the same token twice counts twice
        weights = torch.rand(length, k, generator=generator) * (torch.arange(length) % 3 != 0).unsqueeze(1)
        batch.append(
            Datum(
                ModelInput.from_ints(datum(length, length).model_input.to_ints()),
                {"target_tokens": targets, "weights": weights},
            )
        )
    batch.append(datum(8))
    ours = client.forward_backward(batch, "cross_entropy", logprobs=logprobs).result()
    model = peft_model(saved)
    loss = torch.zeros(())
    for one, output in zip(batch, ours.loss_fn_outputs, strict=True):
        expected, weights = logprobs_of(model, one), one.loss_fn_inputs["weights"]
        loss = loss - (expected * weights).sum()
        assert output["logprobs"].shape == one.loss_fn_inputs["target_tokens"].shape
        rows = (
            torch.ones(len(weights), dtype=torch.bool)
            if logprobs == "all"
            else weights.reshape(len(weights), -1).ne(0).any(1)
        )
        torch.testing.assert_close(output["logprobs"][rows], expected[rows].detach(), rtol=1e-5, atol=1e-5)
        assert not output["logprobs"][~rows].any()
    loss.backward()
    assert ours.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_gradients_equal(client, model)


def test_an_untrained_token_cannot_poison_loss_or_gradient() -> None:
    """Its ratio may be infinite: 0 * inf is NaN, in the terms and again in the gradient."""
    lp = torch.tensor([[-1.0], [-2.0]])
    for name in ("importance_sampling", "ppo", "dro", "cispo"):
        inputs = {
            "logprobs": torch.tensor([[-1.0], [-1e30]]), "advantages": torch.tensor([[1.0], [1.0]]),
            "weights": torch.tensor([[1.0], [0.0]]),
        }  # fmt: skip
        terms, gradient = loss_and_gradient(name, lp, inputs, LOSSES[name].defaults)
        assert terms[1] == 0 and gradient[1] == 0
        assert torch.isfinite(terms).all() and torch.isfinite(gradient).all()
        assert gradient[0] != 0


def test_custom_loss_that_is_cross_entropy(client: TrainingClient) -> None:
    batch = data(LENGTHS)
    expected_output = client.forward_backward(batch, "cross_entropy").result()
    expected = gradients(client)

    def fn(data, logprobs):
        loss = sum(-(d.loss_fn_inputs["weights"] * lp).sum() for d, lp in zip(data, logprobs, strict=True))
        return loss, {"mine": 3.0, "first": float(logprobs[0][0].detach())}

    for token_budget in (
        1024,
        16,
    ):  # one micro-batch: one forward; several: a forward for fn, then forward and backward
        client.adapter.clear_grad()
        client.engine.token_budget = token_budget
        output = client.forward_backward_custom(batch, fn).result()
        client.engine.token_budget = 1024
        assert output.metrics["loss:sum"] == pytest.approx(expected_output.metrics["loss:sum"], rel=1e-5)
        assert output.metrics["mine"] == 3.0
        assert output.metrics["first"] == pytest.approx(float(output.loss_fn_outputs[0]["logprobs"][0]))
        for ours, theirs in zip(output.loss_fn_outputs, expected_output.loss_fn_outputs, strict=True):
            torch.testing.assert_close(ours["logprobs"], theirs["logprobs"], rtol=1e-5, atol=1e-5)
        for name, (d_a, d_b) in gradients(client).items():
            assert_close(d_a, expected[name][0])
            assert_close(d_b, expected[name][1])


def pair_loss(data, logprobs):
    """DPO's shape: a sigmoid over differences of whole sequences, so a datum's gradient hangs on another's logprobs."""
    totals = [(d.loss_fn_inputs["weights"] * lp).sum() for d, lp in zip(data, logprobs, strict=True)]
    margins = torch.stack(
        [0.1 * (chosen - rejected) for chosen, rejected in zip(totals[::2], totals[1::2], strict=True)]
    )
    return -torch.nn.functional.logsigmoid(margins).sum(), {"margin": float(margins.detach().mean())}


@pytest.mark.parametrize("token_budget", [1024, 40, 16])
def test_a_custom_loss_over_pairs_has_autograds_gradient(client: TrainingClient, saved: str, token_budget: int) -> None:
    batch = data((9, 14, 30, 5, 17, 17))
    client.engine.token_budget = token_budget
    ours = client.forward_backward_custom(batch, pair_loss).result()
    client.engine.token_budget = 1024
    model = peft_model(saved)
    loss, metrics = pair_loss(batch, [logprobs_of(model, one) for one in batch])
    loss.backward()
    assert ours.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert ours.metrics["margin"] == pytest.approx(metrics["margin"], rel=1e-5, abs=1e-6)
    assert_gradients_equal(client, model, 2e-5)


@pytest.mark.parametrize("token_budget", [1024, 16])
def test_a_custom_loss_on_weighted_positions_alone_has_the_same_gradient(client: TrainingClient, token_budget: int) -> None:
    batch = data((9, 14, 30, 5))
    batch[1].loss_fn_inputs["weights"] = torch.zeros(14)  # no position of it is wanted
    whole = client.forward_backward_custom(batch, pair_loss).result()
    expected = gradients(client)
    client.adapter.clear_grad()
    client.engine.token_budget = token_budget
    ours = client.forward_backward_custom(batch, pair_loss, logprobs="weighted").result()
    client.engine.token_budget = 1024
    assert ours.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=1e-5)
    for name, (d_a, d_b) in gradients(client).items():
        assert_close(d_a, expected[name][0])
        assert_close(d_b, expected[name][1])
    for one, some, every in zip(batch, ours.loss_fn_outputs, whole.loss_fn_outputs, strict=True):
        wanted = torch.as_tensor(one.loss_fn_inputs["weights"]) != 0
        torch.testing.assert_close(some["logprobs"], every["logprobs"] * wanted, rtol=1e-5, atol=1e-5)


def test_a_custom_loss_may_use_keys_of_its_own_and_several_targets(client: TrainingClient) -> None:
    one = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": [[2, 5], [3, 6], [4, 7]], "reference": "anything"})
    seen: list = []

    def fn(data, logprobs):
        seen.append((data[0].loss_fn_inputs["reference"], logprobs[0].shape))
        return -logprobs[0][:, 0].sum(), {}

    output = client.forward_backward_custom([one], fn).result()
    assert seen == [("anything", (3, 2))]
    assert output.loss_fn_outputs[0]["logprobs"].shape == (3, 2)
    custom = client.adapter.grad.clone()
    client.adapter.clear_grad()
    client.forward_backward([Datum(one.model_input, {"target_tokens": [2, 3, 4]})], "cross_entropy").result()
    assert_close(custom, client.adapter.grad)


def test_a_custom_loss_that_ignores_a_datum_gives_it_no_gradient(client: TrainingClient) -> None:
    batch = data((6, 8))
    client.forward_backward_custom(batch, lambda data, logprobs: (-logprobs[1].sum(), {})).result()
    found = client.adapter.grad.clone()
    client.adapter.clear_grad()
    bare = Datum(batch[1].model_input, {"target_tokens": batch[1].loss_fn_inputs["target_tokens"]})
    client.forward_backward([bare], "cross_entropy").result()
    assert_close(found, client.adapter.grad)


@pytest.mark.parametrize("token_budget", [1024, 8])
def test_a_custom_loss_that_nothing_can_be_learned_from_is_refused_and_nothing_accumulates(
    client: TrainingClient, token_budget: int
) -> None:
    client.engine.token_budget = token_budget
    constant = r"the custom loss does not depend on the logprobs \(detached, perhaps\): there is nothing to train on"
    for result, line in [
        (lambda lp: (lp[0].sum() * float("nan"), {}), "the custom loss is nan, expected a finite number"),
        (lambda lp: (lp[0].sum() * float("inf"), {}), "the custom loss is -inf, expected a finite number"),
        (lambda lp: (lp[0], {}), "the custom loss returned tensor"),
        (lambda lp: (1.5, {}), r"the custom loss returned 1.5, expected \(scalar tensor, metrics\)"),
        (lambda lp: (lp[0].detach().sum(), {}), f"{constant}$"),
        (lambda lp: (torch.ones((), requires_grad=True) * 2, {}), f"{constant}$"),
    ]:
        with pytest.raises(ValueError, match=f"^{line}"):
            client.forward_backward_custom(data((5, 7)), lambda _, lp, result=result: result(lp)).result()
        assert not client.adapter.has_grad
        assert not client.adapter.grad.any()
    client.engine.token_budget = 1024


def test_a_custom_loss_refuses_bad_data_at_the_door(client: TrainingClient, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data is empty, expected at least one Datum"):
        client.forward_backward_custom([], pair_loss)
