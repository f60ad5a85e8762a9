"""The engine computes what transformers and PEFT compute: logprobs, gradients, and the files it writes for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import (
    KINDS,
    assert_gradients_equal,
    base_model,
    data,
    factors,
    gradients,
    logprobs_of,
    new_client,
    peft_model,
    service_at,
    tiny_model_dir,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Model has `tie_word_embeddings"),
]
LENGTHS = [1, 2, 15, 16, 17, 40]


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_the_log_softmax_of_the_models_own_logits(kind: str, tmp_path: Path) -> None:
    client, batch = new_client(tmp_path, kind, noise=False), data(LENGTHS)
    outputs = client.forward(batch, "cross_entropy").result().loss_fn_outputs
    with torch.no_grad():
        model = base_model(kind)
        for one, output in zip(batch, outputs, strict=True):
            torch.testing.assert_close(output["logprobs"], logprobs_of(model, one), rtol=1e-5, atol=1e-5)
    client.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_gives_the_same_logprobs_and_gradients_in_peft(kind: str, tmp_path: Path) -> None:
    """PEFT adapts lm_head of a tied model too, as long as nobody merges it: merging would reach into the embedding."""
    client, batch = new_client(tmp_path, kind, rank=3), data(LENGTHS)
    saved = client.save_state("a").result()
    ours = client.forward_backward(batch, "cross_entropy").result()
    model, loss = peft_model(saved.directory, kind), torch.zeros(())
    for one, output in zip(batch, ours.loss_fn_outputs, strict=True):
        theirs = logprobs_of(model, one)
        torch.testing.assert_close(output["logprobs"], theirs.detach(), rtol=1e-5, atol=1e-5)
        loss = loss - (theirs * one.loss_fn_inputs["weights"]).sum()
    loss.backward()
    assert ours.metrics["loss:sum"] == pytest.approx(float(loss.detach()), rel=1e-5)
    found = gradients(client)
    assert "lm_head" in found
    assert len(found) == 1 + 2 * 7
    assert_gradients_equal(client, model)
    client.close()


def test_a_random_adapter_is_far_from_the_base_so_that_the_comparisons_mean_something(tmp_path: Path) -> None:
    client, batch = new_client(tmp_path, rank=3, noise=False), data([40])
    before = client.forward(batch, "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    client.close()
    other = new_client(tmp_path, rank=3)
    after = other.forward(batch, "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    assert (after - before).abs().mean() > 0.3
    other.close()


def test_only_the_asked_matrices_are_trained(tmp_path: Path) -> None:
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    for targets, expected in [
        ({"train_mlp": False, "train_unembed": False}, attention),
        ({"train_attn": False, "train_unembed": False}, mlp),
        ({"train_attn": False, "train_mlp": False}, {"lm_head"}),
        ({"train_unembed": False}, attention | mlp),
    ]:
        client = new_client(tmp_path, **targets)
        assert {name.rsplit(".", 1)[-1] for name in factors(client)} == expected
        saved, batch = client.save_state("a").result(), data([9])
        ours = client.forward(batch, "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
        with torch.no_grad():
            theirs = logprobs_of(peft_model(saved.directory), batch[0])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        client.close()
    with pytest.raises(ValueError, match="train_attn, train_mlp and train_unembed are all false: nothing to train"):
        new_client(tmp_path, train_attn=False, train_mlp=False, train_unembed=False)


def test_an_adapter_made_by_peft_loads_as_it_is(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=5, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False
    )
    theirs = get_peft_model(base_model("llama"), config)
    theirs.save_pretrained(tmp_path / "theirs")

    client = service_at(tmp_path).create_training_client_from_state(tmp_path / "theirs", str(tiny_model_dir())).result()
    batch = data([30])
    ours = client.forward(batch, "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    with torch.no_grad():
        torch.testing.assert_close(ours, logprobs_of(theirs.eval(), batch[0]), rtol=1e-5, atol=1e-5)
    client.close()


def test_an_adapter_of_another_scale_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=5, lora_alpha=16, target_modules=["q_proj"])
    get_peft_model(base_model("llama"), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"lora_alpha=16 .* needs plain lora_alpha=32"):
        service_at(tmp_path).create_training_client_from_state(tmp_path / "theirs").result()
