"""Which models the engine takes: what it does not compute is refused by name, never ignored."""

# ruff: noqa: E501 - messages stand word for word

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core import UnsupportedModel, clients
from tests.tiny import data, fill_with_noise, logprobs_of, service_at

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
HEAD = {**SIZES, "head_dim": 8}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def saved(directory: Path, config: str, **keys) -> Path:
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**keys))
    fill_with_noise(model)
    model.save_pretrained(directory)
    return directory


REFUSED = [
    ("Gemma2Config", HEAD, "Gemma2ForCausalLM: layers of type ['sliding_attention'] are not supported (full attention only)"),
    ("GemmaConfig", HEAD, "GemmaForCausalLM: hidden_act=gelu_pytorch_tanh is not supported (silu only)"),
    ("MistralConfig", {**SIZES, "sliding_window": 16}, "MistralForCausalLM: sliding_window=16 is not supported (full attention only)"),
    ("Qwen2Config", {**SIZES, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
     "Qwen2ForCausalLM: layers of type ['sliding_attention'] are not supported (full attention only)"),
    ("GraniteConfig", {**SIZES, "embedding_multiplier": 12.0}, "GraniteForCausalLM: embedding_multiplier=12.0 is not supported"),
    ("GraniteConfig", {**SIZES, "residual_multiplier": 0.2}, "GraniteForCausalLM: residual_multiplier=0.2 is not supported"),
    ("GraniteConfig", {**SIZES, "logits_scaling": 8.0}, "GraniteForCausalLM: logits_scaling=8.0 is not supported"),
    ("CohereConfig", SIZES, "CohereForCausalLM: logit_scale=0.0625 is not supported"),
    ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 1},
     "GPT2LMHeadModel (GPT2Model) lacks ['embed_tokens', 'layers', 'norm', 'rotary_emb']: not a Llama-like decoder"),
    ("Phi3Config", SIZES, "Phi3ForCausalLM layer 0 (Phi3DecoderLayer) has ['resid_attn_dropout', 'resid_mlp_dropout'], which the engine does not compute"),
    ("Olmo2Config", SIZES, "Olmo2ForCausalLM layer 0 (Olmo2DecoderLayer) lacks ['input_layernorm']: not a Llama-like decoder"),
    ("OlmoConfig", SIZES, "model.layers.0.input_layernorm (OlmoLayerNorm) is not an RMSNorm"),
    ("Qwen3MoeConfig", {**HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
     "Qwen3MoeForCausalLM layer 0 mlp (Qwen3MoeSparseMoeBlock) lacks ['act_fn', 'down_proj', 'gate_proj', 'up_proj']: not a Llama-like decoder"),
    ("MambaConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1},
     "MambaForCausalLM: layers of type ['linear_attention'] are not supported (full attention only)"),
    ("LlamaConfig", {**SIZES, "hidden_act": "gelu"}, "LlamaForCausalLM: hidden_act=gelu is not supported (silu only)"),
    ("LlamaConfig", {**SIZES, "rope_parameters": {**ROPE, "rope_type": "dynamic"}},
     "LlamaForCausalLM: rope_type=dynamic is not supported (angles that depend on the longest sequence of a batch)"),
    ("SmolLM3Config", {**SIZES, "num_hidden_layers": 4},
     "SmolLM3ForCausalLM: layers without rotary embedding (no_rope_layers) are not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "keys", "message"), REFUSED)
def test_what_the_engine_does_not_compute_is_refused_by_name(
    config: str, keys: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel) as error:
        service_at(tmp_path).create_lora_training_client(str(saved(tmp_path / "model", config, **keys))).result()
    assert str(error.value) == message
    assert not clients._engines


TAKEN = [
    ("MistralConfig", {**SIZES, "sliding_window": None}),
    ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    (
        "LlamaConfig",
        {**SIZES, "rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    ("LlamaConfig", {**SIZES, "rope_parameters": {**ROPE, "rope_type": "yarn"}}),
    ("GraniteConfig", {**SIZES, "attention_multiplier": 0.3}),
    ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("config", "keys"), TAKEN)
def test_models_of_the_same_structure_are_taken_whatever_their_name(config: str, keys: dict, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory, batch = saved(tmp_path / "model", config, **keys), data([100, 17])
    client = service_at(tmp_path).create_lora_training_client(str(directory)).result()
    ours = client.forward(batch, "cross_entropy").result().loss_fn_outputs
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        for one, output in zip(batch, ours, strict=True):
            torch.testing.assert_close(output["logprobs"], logprobs_of(model, one), rtol=1e-5, atol=2e-5)
    client.close()
