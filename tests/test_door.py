"""What the engine says, word for word, to a request that it does not take; and that nothing came of it."""

# ruff: noqa: E501 - messages stand word for word

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch

from core import AdamParams, Datum, ModelInput, TrainingClient
from tests.tiny import CONTEXT, VOCAB, assert_close, datum, flat, new_client

pytestmark = pytest.mark.usefixtures("one_thread")
RL = {"logprobs": [-1.0] * 3, "advantages": [1.0] * 3}
LOSSES = "cross_entropy, importance_sampling, ppo, cispo, dro, gspo"
RATIO = "expected bounds of the ratio: 0 <= low <= high"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[TrainingClient]:
    client = new_client(tmp_path_factory.mktemp("store"))
    yield client
    client.close()


def three(tokens=(1, 2, 3), **inputs) -> Datum:
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": [2, 3, 4], **inputs})


def without(*keys: str) -> Datum:
    full = {"target_tokens": [2, 3, 4], **RL, "sequence_ratio_mask": [1.0] * 3}
    return Datum(ModelInput.from_ints([1, 2, 3]), {key: value for key, value in full.items() if key not in keys})


BAD_DATA: list[tuple[list[Datum], str, str]] = [
    ([], "cross_entropy", "data is empty, expected at least one Datum"),
    ([three(), three(())], "cross_entropy", "data[1] has no input tokens"),
    ([datum(CONTEXT + 1)], "cross_entropy", f"data[0] has {CONTEXT + 1} input tokens, the model's context is {CONTEXT}"),
    ([three((1, VOCAB, 3))], "cross_entropy", f"data[0].model_input has token {VOCAB}, outside the vocabulary of {VOCAB}"),
    ([three((1, -1, 3))], "cross_entropy", f"data[0].model_input has token -1, outside the vocabulary of {VOCAB}"),
    ([three((1, 2.5, 3))], "cross_entropy", "data[0].model_input holds torch.float32, expected whole numbers"),
    ([three(target_tokens=[1, 2, 999])], "cross_entropy",
     f"data[0].loss_fn_inputs['target_tokens'] has token 999, outside the vocabulary of {VOCAB}"),
    ([three(target_tokens=[1, -100, 2])], "cross_entropy",
     f"data[0].loss_fn_inputs['target_tokens'] has token -100, outside the vocabulary of {VOCAB}"),
    ([three(target_tokens=[1.0, 2.5, 3.0])], "cross_entropy",
     "data[0].loss_fn_inputs['target_tokens'] holds torch.float32, expected whole numbers"),
    ([three(target_tokens=[1, 2])], "cross_entropy", "data[0].loss_fn_inputs['target_tokens'] has 2 values for 3 input tokens"),
    ([three(target_tokens=[])], "cross_entropy", "data[0].loss_fn_inputs['target_tokens'] has 0 values for 3 input tokens"),
    ([three(target_tokens=5)], "cross_entropy", "data[0].loss_fn_inputs['target_tokens'] has 1 values for 3 input tokens"),
    ([three(target_tokens=torch.ones(3, 2, 2, dtype=torch.int64))], "cross_entropy",
     "data[0].loss_fn_inputs['target_tokens'] has shape [3, 2, 2], expected [3] or [3, K]"),
    ([three(target_tokens=torch.ones(3, 0, dtype=torch.int64))], "cross_entropy",
     "data[0].loss_fn_inputs['target_tokens'] has shape [3, 0], expected [3] or [3, K]"),
    ([three(target_tokens=[[1, 2]] * 3, **RL)], "ppo",
     "data[0].loss_fn_inputs['target_tokens'] has shape [3, 2]; ppo takes one target per position"),
    ([three(), three(weights=[1.0, 1.0])], "cross_entropy", "data[1].loss_fn_inputs['weights'] has 2 values for 3 input tokens"),
    ([three(weights=torch.ones(3, 2))], "cross_entropy",
     "data[0].loss_fn_inputs['weights'] has shape [3, 2], target_tokens has [3]"),
    ([three(weights=[1.0, NAN, 1.0])], "cross_entropy", "data[0].loss_fn_inputs['weights'] is not finite at position 1"),
    ([three(**{**RL, "logprobs": [-1.0, -1.0, -INF]})], "ppo", "data[0].loss_fn_inputs['logprobs'] is not finite at position 2"),
    ([three(**{**RL, "advantages": [INF, 0.0, 0.0]})], "ppo", "data[0].loss_fn_inputs['advantages'] is not finite at position 0"),
    ([three(**{**RL, "advantages": [0.5]})], "dro", "data[0].loss_fn_inputs['advantages'] has 1 values for 3 input tokens"),
    ([without("target_tokens", *RL, "sequence_ratio_mask")], "cross_entropy",
     "data[0].loss_fn_inputs lacks ['target_tokens'], which cross_entropy needs"),
    ([without(*RL, "sequence_ratio_mask")], "ppo", "data[0].loss_fn_inputs lacks ['advantages', 'logprobs'], which ppo needs"),
    ([without("sequence_ratio_mask")], "gspo", "data[0].loss_fn_inputs lacks ['sequence_ratio_mask'], which gspo needs"),
    ([without("sequence_ratio_mask")], "cross_entropy",
     "data[0].loss_fn_inputs has ['advantages', 'logprobs'], which cross_entropy does not know"),
    ([without()], "cispo", "data[0].loss_fn_inputs has ['sequence_ratio_mask'], which cispo does not know"),
    ([three(weight=[1.0] * 3)], "cross_entropy", "data[0].loss_fn_inputs has ['weight'], which cross_entropy does not know"),
]  # fmt: skip

BAD_CONFIGS: list[tuple[str, dict | None, str]] = [
    ("ppoo", None, f"unknown loss_fn 'ppoo', expected one of {LOSSES}; did you mean 'ppo'?"),
    ("crossentropy", None, f"unknown loss_fn 'crossentropy', expected one of {LOSSES}; did you mean 'cross_entropy'?"),
    ("zzz", None, f"unknown loss_fn 'zzz', expected one of {LOSSES}"),
    (
        "ppo",
        {"clip": 0.2},
        "loss_fn_config of ppo has no key 'clip', it knows ['clip_high_threshold', 'clip_low_threshold']",
    ),
    ("dro", {"clip_low_threshold": 0.2}, "loss_fn_config of dro has no key 'clip_low_threshold', it knows ['beta']"),
    ("cross_entropy", {"beta": 0.1}, "loss_fn_config of cross_entropy has no key 'beta', it knows none"),
    ("dro", {"beta": NAN}, "loss_fn_config['beta'] is nan, expected a finite number"),
    ("dro", {"beta": "0.1"}, "loss_fn_config['beta'] is '0.1', expected a finite number"),
    ("dro", {"beta": -0.1}, "loss_fn_config['beta'] is -0.1, expected a number from 0 on"),
    ("ppo", {"clip_low_threshold": 2.0}, f"loss_fn_config has clip_low_threshold=2 and clip_high_threshold=1.2, {RATIO}"),
    ("cispo", {"clip_high_threshold": -1}, f"loss_fn_config has clip_low_threshold=0 and clip_high_threshold=-1, {RATIO}"),
    ("gspo", {"clip_low_threshold": -3e-4}, f"loss_fn_config has clip_low_threshold=-0.0003 and clip_high_threshold=1.0004, {RATIO}"),
]


BAD_ADAM: list[tuple[dict, str]] = [
    ({"learning_rate": NAN}, "learning_rate is nan, expected a number from 0 on"),
    ({"learning_rate": INF}, "learning_rate is inf, expected a number from 0 on"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0, expected a number from 0 on"),
    ({"learning_rate": "1e-4"}, "learning_rate is '1e-4', expected a number from 0 on"),
    ({"learning_rate": None}, "learning_rate is None, expected a number from 0 on"),
    ({"beta1": 1.0}, "beta1 is 1.0, expected a number from 0 on, below 1"),
    ({"beta1": -3}, "beta1 is -3, expected a number from 0 on, below 1"),
    ({"beta2": 1.0}, "beta2 is 1.0, expected a number from 0 on, below 1"),
    ({"beta2": NAN}, "beta2 is nan, expected a number from 0 on, below 1"),
    ({"eps": NAN}, "eps is nan, expected a number above 0 (in fp32)"),
    ({"eps": -1.0}, "eps is -1.0, expected a number above 0 (in fp32)"),
    ({"eps": 0}, "eps is 0, expected a number above 0 (in fp32)"),
    ({"eps": 1e-50}, "eps is 1e-50, expected a number above 0 (in fp32)"),
    ({"weight_decay": NAN}, "weight_decay is nan, expected a number from 0 on"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1, expected a number from 0 on"),
    ({"grad_clip_norm": NAN}, "grad_clip_norm is nan, expected a number from 0 on"),
    ({"grad_clip_norm": -1}, "grad_clip_norm is -1, expected a number from 0 on"),
]


@pytest.mark.parametrize(("batch", "loss_fn", "message"), BAD_DATA)
def test_bad_data_is_refused_and_nothing_accumulates(client: TrainingClient, batch, loss_fn: str, message: str) -> None:
    for verb in (client.forward_backward, client.forward):
        with pytest.raises(ValueError) as error:
            verb(batch, loss_fn)
        assert str(error.value) == message
    assert not client.adapter.has_grad and not client.adapter.grad.any()


@pytest.mark.parametrize(("loss_fn", "config", "message"), BAD_CONFIGS)
def test_an_unknown_loss_or_configuration_is_refused(
    client: TrainingClient, loss_fn: str, config, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        client.forward_backward([three(**RL)], loss_fn, config)
    assert str(error.value) == message
    assert not client.adapter.has_grad


@pytest.mark.parametrize(("adam", "message"), BAD_ADAM)
def test_an_optimizer_step_that_would_spoil_the_weights_is_refused(client: TrainingClient, adam: dict, message: str) -> None:
    client.forward_backward([three()], "cross_entropy").result()
    before = flat(client)
    with pytest.raises(ValueError) as error:
        client.optim_step(AdamParams(**adam))
    assert str(error.value) == message
    assert client.adapter.step == 0 and client.adapter.has_grad
    assert all(torch.equal(flat(client)[key], value) for key, value in before.items())
    client.adapter.clear_grad()


def test_numbers_at_the_bounds_are_taken(tmp_path: Path) -> None:
    client = new_client(tmp_path)
    client.forward_backward([three()], "cross_entropy").result()
    client.optim_step(AdamParams(numpy.float32(0), 0, 0, 1e-38 * 1.2, 0, 0)).result()  # type: ignore[arg-type]
    assert client.adapter.step == 1 and torch.isfinite(client.adapter.params).all()
    client.close()


def test_what_is_no_array_of_numbers_is_refused_by_key(client: TrainingClient) -> None:
    for bad in (["a", "b", "c"], [[1.0], [1.0, 2.0], [1.0]], None):
        with pytest.raises(ValueError, match=r"^data\[0\]\.loss_fn_inputs\['weights'\] is not an array of numbers: "):
            client.forward_backward([three(weights=bad)], "cross_entropy")


def test_an_unknown_logprobs_mode_is_refused(client: TrainingClient) -> None:
    with pytest.raises(ValueError, match=r"^logprobs='none', expected 'all' or 'weighted'$"):
        client.forward([three()], "cross_entropy", logprobs="none")


def test_a_sequence_as_long_as_the_context_is_taken(client: TrainingClient) -> None:
    output = client.forward([datum(CONTEXT)], "cross_entropy").result()
    assert output.loss_fn_outputs[0]["logprobs"].shape == (CONTEXT,)


def test_lists_arrays_and_tensors_mean_the_same(client: TrainingClient) -> None:
    forms = [
        [0.5, 1.0, 0.0],
        numpy.array([0.5, 1.0, 0.0]),
        torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True),
    ]
    losses = {client.forward([three(weights=form)], "cross_entropy").result().metrics["loss:sum"] for form in forms}
    assert len(losses) == 1
    whole = [three(weights=form) for form in ([1, 0, 1], [True, False, True], [1.0, 0.0, 1.0])]
    assert len({client.forward([one], "cross_entropy").result().metrics["loss:sum"] for one in whole}) == 1


def test_a_request_keeps_its_numbers_when_the_caller_reuses_the_buffer(client: TrainingClient) -> None:
    weights = torch.ones(3)
    expected = client.forward([three(weights=weights)], "cross_entropy").result().metrics["loss:sum"]
    waiting = [client.forward([datum(500)], "cross_entropy") for _ in range(3)]
    ours = client.forward([three(weights=weights)], "cross_entropy")
    weights.zero_()
    assert ours.result().metrics["loss:sum"] == expected
    assert all(future.done() for future in waiting)


def test_chunks_are_one_sequence(client: TrainingClient) -> None:
    from core import EncodedTextChunk

    pieces = Datum(ModelInput((EncodedTextChunk((1,)), EncodedTextChunk((2, 3)))), {"target_tokens": [2, 3, 4]})
    assert (pieces.model_input.to_ints(), pieces.model_input.length, ModelInput.empty().length) == ([1, 2, 3], 3, 0)
    left, right = (
        client.forward([one], "cross_entropy").result().loss_fn_outputs[0]["logprobs"] for one in (pieces, three())
    )
    assert_close(left, right)
