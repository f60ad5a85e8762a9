"""The real tinker SDK against a real server: the numbers are those of the engine in process."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("tinker", reason="the tinker SDK is not installed (uv sync --group serving)")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import tinker
from tinker import types

from core import AdamParams, Datum, ModelInput, TrainingClient
from core.losses import LOSSES
from tests.live_server import MODEL, serving
from tests.tiny import VOCAB, base_model, data, logprobs_of, new_client, peft_model, tiny_tokenizer, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "tml-anything"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TINKER_TELEMETRY", "0")
        with serving(tmp_path_factory.mktemp("store")) as (url, _):
            yield url


@pytest.fixture(scope="module")
def service(url: str) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=url, api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def trained(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A client whose adapter has left the base; tests that use it leave its weights alone."""
    client = wire_client(service)
    client.forward_backward(to_wire(data([30, 20])), "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=0.02)).result()
    return client


def wire_client(service: tinker.ServiceClient, seed: int = 0) -> tinker.TrainingClient:
    return service.create_lora_training_client(MODEL, rank=4, seed=seed).result()


def local_client(tmp_path: Path, seed: int = 0) -> TrainingClient:
    return new_client(tmp_path, seed=seed, noise=False)


def to_wire(ours: list[Datum]) -> list[types.Datum]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(one.model_input.to_ints()),
            loss_fn_inputs={key: types.TensorData.from_torch(torch.as_tensor(v)) for key, v in one.loss_fn_inputs.items()},
        )
        for one in ours
    ]


def text(length: int, seed: int = 3) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens(length, seed))


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_every_loss_gives_the_same_steps_as_in_process(loss_fn: str, service: tinker.ServiceClient, tmp_path: Path) -> None:
    there, here = wire_client(service), local_client(tmp_path)
    for step in range(3):
        batch = data([24, 9, 40], seed=step, loss_fn=loss_fn)
        theirs, ours = there.forward_backward(to_wire(batch), loss_fn), here.forward_backward(batch, loss_fn)
        adam = {"learning_rate": 1e-3, "weight_decay": 0.1, "grad_clip_norm": 1.0}
        moved, expected = there.optim_step(types.AdamParams(**adam)), here.optim_step(AdamParams(**adam))
        assert theirs.result().metrics["loss:sum"] == pytest.approx(ours.result().metrics["loss:sum"], rel=1e-5)
        assert moved.result().metrics["grad_norm:mean"] == pytest.approx(expected.result().metrics["grad_norm:mean"], rel=1e-4)
        for a, b in zip(theirs.result().loss_fn_outputs, ours.result().loss_fn_outputs, strict=True):
            torch.testing.assert_close(a["logprobs"].to_torch(), b["logprobs"], rtol=0, atol=1e-5)


def test_many_targets_per_position_travel_sparse(trained: tinker.TrainingClient) -> None:
    targets, weights = torch.randint(250, (12, 6)), torch.zeros(12, 6)
    weights[3, 2] = 2.0
    one = types.Datum(
        model_input=text(12),
        loss_fn_inputs={"target_tokens": types.TensorData.from_torch(targets), "weights": types.TensorData.from_torch(weights)},
    )
    output = trained.forward([one], "cross_entropy").result()
    logprobs = output.loss_fn_outputs[0]["logprobs"].to_torch()
    assert logprobs.shape == (12, 6)
    assert output.metrics["loss:sum"] == pytest.approx(-2 * float(logprobs[3, 2]), rel=1e-5)


def test_a_custom_loss_runs_on_the_clients_side(service: tinker.ServiceClient, tmp_path: Path) -> None:
    def square(batch, logprobs):
        loss = sum((one.square().sum() for one in logprobs), torch.zeros(()))
        return loss, {"mine": float(loss.detach())}

    there, here, batch = wire_client(service), local_client(tmp_path), data([16, 8], weights=False)
    theirs = there.forward_backward_custom(to_wire(batch), square).result()
    ours = here.forward_backward_custom(batch, square).result()
    assert theirs.metrics["mine"] == pytest.approx(ours.metrics["mine"], rel=1e-5)
    norms = [client.optim_step(adam).result().metrics for client, adam in ((there, types.AdamParams()), (here, AdamParams()))]
    assert norms[0]["grad_norm:mean"] == pytest.approx(norms[1]["grad_norm:mean"], rel=1e-4)


@pytest.mark.slow
def test_a_batch_in_many_chunks_is_one_batch(service: tinker.ServiceClient, tmp_path: Path) -> None:
    """The SDK cuts at 1,024 data."""
    batch = data([2] * 1100)
    theirs = wire_client(service).forward(to_wire(batch), "cross_entropy").result()
    ours = local_client(tmp_path).forward(batch, "cross_entropy").result()
    assert len(theirs.loss_fn_outputs) == 1100
    assert theirs.metrics["loss:sum"] == pytest.approx(ours.metrics["loss:sum"], rel=1e-5)


def test_training_goes_on_from_a_saved_state(service: tinker.ServiceClient) -> None:
    first, batch, adam = wire_client(service), to_wire(data([20])), types.AdamParams(learning_rate=1e-2)
    for _ in range(2):
        first.forward_backward(batch, "cross_entropy")
        first.optim_step(adam)
    path = first.save_state("two").result().path
    whole = service.create_training_client_from_state_with_optimizer(path).result()
    bare = service.create_training_client_from_state(path).result()
    fresh = wire_client(service, seed=9)
    fresh.load_state_with_optimizer(path).result()
    after = []
    for client in (first, whole, fresh, bare):
        client.forward_backward(batch, "cross_entropy")
        client.optim_step(adam)
        after.append(client.forward(batch, "cross_entropy").result().metrics["loss:sum"])
    assert after[1:3] == pytest.approx([after[0]] * 2, rel=1e-5)
    assert abs(after[3] - after[0]) > 1e-3 * abs(after[0])  # without its moments the step is another


def test_a_sampler_keeps_the_weights_of_its_moment(service: tinker.ServiceClient) -> None:
    client, batch = wire_client(service), to_wire(data([20]))
    before = client.save_weights_and_get_sampling_client().result()
    expected = before.compute_logprobs(text(10)).result()
    assert expected[0] is None
    client.forward_backward(batch, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=0.05)).result()
    named = service.create_sampling_client(model_path=client.save_weights_for_sampler("s").result().path).result()
    assert before.compute_logprobs(text(10)).result()[1:] == pytest.approx(expected[1:], rel=1e-5)
    assert named.compute_logprobs(text(10)).result()[1] != pytest.approx(expected[1], rel=1e-3)


def test_samples_with_everything(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result()
    prompt, params = text(20), types.SamplingParams(max_tokens=12, seed=5, stop=[], temperature=0.7)
    one, two = (
        sampler.sample(
            prompt,
            3,
            params,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=VOCAB,  # the sampled one is among them
        ).result()
        for _ in range(2)
    )
    assert [list(s.tokens) for s in one.sequences] == [list(s.tokens) for s in two.sequences]
    assert len({tuple(s.tokens) for s in one.sequences}) == 3
    assert one.prompt_logprobs is not None and one.topk_prompt_logprobs is not None
    ids = prompt.to_ints()
    exact = logprobs_of(base_model(), Datum(ModelInput.from_ints(ids[:-1]), {"target_tokens": torch.tensor(ids[1:])}))
    assert one.prompt_logprobs[0] is None
    assert one.prompt_logprobs[1:] == pytest.approx(exact.tolist(), abs=1e-4)
    assert len(one.topk_prompt_logprobs) == 20 and len(one.topk_prompt_logprobs[1]) == 2
    for sequence in one.sequences:
        assert sequence.stop_reason == "length" and len(sequence.tokens) == 12
        for token, logprob, top in zip(sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True):
            assert dict(top)[token] == pytest.approx(logprob, abs=1e-3)


def test_samples_end_at_stops_and_include_them(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model=MODEL).result()
    free = sampler.sample(text(9), 1, types.SamplingParams(max_tokens=30, temperature=0, stop=[])).result().sequences[0]
    chosen = free.tokens[4]
    end = list(free.tokens).index(chosen) + 1
    by_token = sampler.sample(text(9), 1, types.SamplingParams(max_tokens=30, temperature=0, stop=[chosen])).result()
    assert list(by_token.sequences[0].tokens) == list(free.tokens[:end])
    assert by_token.sequences[0].stop_reason == "stop"
    printable = tiny_tokenizer().decode([chosen])
    if printable.isascii():
        by_text = sampler.sample(text(9), 1, types.SamplingParams(max_tokens=30, temperature=0, stop=printable)).result()
        assert list(by_text.sequences[0].tokens) == list(free.tokens[:end])


def test_what_the_engine_refuses_fails_alone(service: tinker.ServiceClient) -> None:
    client, good = wire_client(service), to_wire(data([8]))
    bad = to_wire(data([8]))
    bad[0].loss_fn_inputs["target_tokens"] = types.TensorData.from_torch(torch.full((8,), 999))
    wrong, fine = client.forward_backward(bad, "cross_entropy"), client.forward_backward(good, "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match="token 999, outside the vocabulary of 259") as refused:
        wrong.result()
    assert refused.value.category == types.RequestErrorCategory.User
    assert fine.result().metrics["loss:sum"] > 0
    with pytest.raises(tinker.RequestFailedError, match="optim_step without a gradient"):
        wire_client(service).optim_step(types.AdamParams()).result()
    with pytest.raises(tinker.BadRequestError, match=r"'gpt-9' is not served here, there are: .*llama"):
        service.create_lora_training_client("gpt-9").result()


def test_checkpoints_are_listed_published_timed_and_deleted(
    service: tinker.ServiceClient, trained: tinker.TrainingClient, url: str
) -> None:
    rest = tinker.RestClient(base_url=url, api_key=KEY)
    run = trained.model_id
    path = trained.save_state("kept", user_metadata={"why": "test"}).result().path
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        trained.save_state("kept").result()
    assert rest.get_training_run(run).result().lora_rank == 4
    assert run in {one.training_run_id for one in rest.list_training_runs().result().training_runs}
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    (found,) = [c for c in rest.list_checkpoints(run).result().checkpoints if c.tinker_path == path]
    assert found.public and found.expires_at is not None and found.user_metadata == {"why": "test"}
    assert found.size_bytes > 10_000
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank) == (MODEL, 4)
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert path not in {c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints}
    with pytest.raises(tinker.NotFoundError, match="no checkpoint"):
        service.create_training_client_from_state(path).result()


def test_an_export_is_downloaded_and_loads_in_peft(trained: tinker.TrainingClient, url: str, tmp_path: Path) -> None:
    path = trained.save_weights_external("export").result().path
    links = tinker.RestClient(base_url=url, api_key=KEY).get_external_weights_urls(path).result()
    for name, link in links.urls.items():
        with urllib.request.urlopen(link) as reply:
            (tmp_path / name).write_bytes(reply.read())
    one = data([20], weights=False)[0]
    theirs = trained.forward(to_wire([one]), "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_torch()
    torch.testing.assert_close(theirs, logprobs_of(peft_model(tmp_path), one).detach(), rtol=0, atol=1e-4)


def test_capabilities_name_the_models(url: str) -> None:
    (model,) = tinker.RestClient(base_url=url, api_key=KEY).get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length) == (MODEL, 1024)
