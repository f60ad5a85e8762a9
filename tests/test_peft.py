"""The engine computes what transformers and PEFT compute: logprobs, gradients, and the files it writes for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from core import AdamParams, DamagedCheckpoint, TrainingClient
from core.merge import Merged
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
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
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


def made_by_peft(directory: Path, **config) -> PeftModel:
    """Random A and B of rank 4, saved as PEFT saves them."""
    theirs = get_peft_model(base_model("llama"), LoraConfig(**{"r": 4, "init_lora_weights": False, **config})).eval()
    theirs.save_pretrained(directory)
    return theirs


def loaded(store: Path, adapter: Path) -> TrainingClient:
    return service_at(store).create_training_client_from_state(adapter, str(tiny_model_dir())).result()


ATTENTION = r".*\.(q_proj|k_proj|v_proj|o_proj)"
MADE_BY_PEFT = {
    "two matrices of a kind, alpha 16": ({"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}, 0.5),
    "two matrices of a kind, alpha 32": ({"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32}, 1),
    "all-linear, alpha 16": ({"target_modules": "all-linear", "lora_alpha": 16}, 0.5),
    "all-linear, alpha 32": ({"target_modules": "all-linear", "lora_alpha": 32}, 1),
    "a pattern": ({"target_modules": ATTENTION, "lora_alpha": 32}, 1),
    "every kind, an odd rank and alpha": ({"target_modules": ".*(up_proj|q_proj)", "r": 5, "lora_alpha": 24}, 0.75),
    "rslora": ({"target_modules": ["o_proj"], "lora_alpha": 8, "use_rslora": True}, 0.5),
    "one layer of two": ({"target_modules": ["down_proj"], "layers_to_transform": [1], "lora_alpha": 64}, 2),
    "ranks of their own": ({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 8}, "lora_alpha": 32}, None),
}  # fmt: skip


@pytest.mark.parametrize(("config", "factor"), MADE_BY_PEFT.values(), ids=MADE_BY_PEFT)
def test_an_adapter_made_by_peft_computes_what_peft_computes(config: dict, factor: float | None, tmp_path: Path) -> None:
    theirs, batch = made_by_peft(tmp_path / "theirs", **config), data([30])
    client = loaded(tmp_path, tmp_path / "theirs")
    ours = client.forward(batch, "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    with torch.no_grad():
        torch.testing.assert_close(ours, logprobs_of(theirs, batch[0]), rtol=1e-5, atol=1e-5)
        assert (ours - logprobs_of(base_model("llama"), batch[0])).abs().mean() > 0.01
    for name, (a, b) in factors(client).items():
        assert a.abs().max() > 0
        layer = theirs.base_model.model.get_submodule(name)
        if not hasattr(layer, "lora_A"):
            assert not b.any()
        elif factor is not None:
            assert torch.equal(a, layer.lora_A["default"].weight)
            assert torch.equal(b, factor * layer.lora_B["default"].weight)
    client.forward_backward(batch, "cross_entropy").result()
    client.optim_step(AdamParams(1e-3)).result()
    client.close()


def test_an_adapter_made_by_peft_is_saved_and_merged_as_it_was(tmp_path: Path) -> None:
    theirs, batch = made_by_peft(tmp_path / "theirs", target_modules=["q_proj", "up_proj"], lora_alpha=16), data([30])
    client = loaded(tmp_path, tmp_path / "theirs")
    saved = client.save_state("a").result()
    with torch.no_grad():
        expected = logprobs_of(theirs, batch[0])
        torch.testing.assert_close(logprobs_of(peft_model(saved.directory), batch[0]), expected, rtol=1e-5, atol=1e-5)
    merged = Merged(tiny_model_dir(), tmp_path / "theirs")
    whole = theirs.merge_and_unload().state_dict()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        torch.testing.assert_close(merged.read(name), whole[name], rtol=1e-5, atol=1e-6)
    (Path(saved.directory) / "state.json").unlink()
    again = loaded(tmp_path, Path(saved.directory))
    assert torch.equal(again.adapter.params, client.adapter.params)
    client.forward_backward(batch, "cross_entropy").result()
    client.optim_step(AdamParams(1e-2)).result()
    assert not torch.equal(again.adapter.params, client.adapter.params)
    client.load_state(tmp_path / "theirs").result()
    assert torch.equal(again.adapter.params, client.adapter.params)  # also what the file does not hold
    for one in (client, again):
        one.close()


def test_a_base_of_another_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made_by_peft(tmp_path / "theirs", target_modules=["q_proj"])
    edit(tmp_path / "theirs", base_model_name_or_path="some/model")
    loaded(tmp_path, tmp_path / "theirs").close()
    assert caplog.messages == [
        f"{tmp_path / 'theirs'} was made on some/model: whether {tiny_model_dir()} has the same weights cannot be checked"
    ]


def edit(directory: Path, **values: object) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


NO_PLAIN_LORA: list[tuple[dict, dict, str]] = [  # made with, then written into its configuration, what is said
    ({"use_dora": True}, {}, "{theirs} is not plain LoRA: use_dora=True"),
    ({"bias": "lora_only"}, {}, "{theirs} is not plain LoRA: bias='lora_only'"),
    ({"modules_to_save": ["lm_head"]}, {}, "{theirs} is not plain LoRA: modules_to_save=['lm_head']"),
    ({"alpha_pattern": {"q_proj": 4}}, {}, "{theirs} is not plain LoRA: alpha_pattern={{'q_proj': 4}}"),
    ({"init_lora_weights": "pissa"}, {}, "{theirs} is not plain LoRA: init_lora_weights='pissa'"),
    ({}, {"peft_type": "IA3"}, "{theirs} is not plain LoRA: peft_type='IA3'"),
    ({}, {"r": 8}, "{theirs}: model.layers.0.self_attn.q_proj has rank 4, adapter_config.json says [8]"),
    (
        {"target_modules": ["q_proj", "embed_tokens"]}, {},
        ("{theirs} adapts model.embed_tokens; this engine adapts"
         " q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"),
    ),
    (
        {"target_modules": ["lm_head"]}, {},
        ("{theirs} holds base_model.model.lm_head.base_layer.weight, which is no factor of a plain LoRA;"
         " to leave the base's own out, save it with save_embedding_layers=False"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "edits", "message"), NO_PLAIN_LORA)
def test_what_is_no_plain_lora_is_refused_by_name(config: dict, edits: dict, message: str, tmp_path: Path) -> None:
    made_by_peft(tmp_path / "theirs", **{"target_modules": ["q_proj"], **config})
    edit(tmp_path / "theirs", **edits)
    with pytest.raises(ValueError) as error:
        loaded(tmp_path, tmp_path / "theirs")
    assert str(error.value) == message.format(theirs=tmp_path / "theirs")


def test_an_adapter_of_a_wider_or_deeper_base_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    made_by_peft(theirs, target_modules=["q_proj"])
    file = theirs / "adapter_model.safetensors"
    tensors, name = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: torch.zeros(4, 48)}, file)
    with pytest.raises(ValueError) as error:
        loaded(tmp_path, theirs)
    assert str(error.value) == (
        f"{theirs}: model.layers.0.self_attn.q_proj lora_A is [4, 48], {tiny_model_dir()} needs [4, 32]"
    )
    save_file({key.replace("layers.1", "layers.2"): tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(ValueError) as error:
        loaded(tmp_path, theirs)
    assert str(error.value) == f"{theirs} adapts model.layers.2.self_attn.q_proj, which {tiny_model_dir()} does not have"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(DamagedCheckpoint, match=f"^checkpoint {theirs} is damaged: adapter_model.safetensors lacks '{name}'$"):
        loaded(tmp_path, theirs)
