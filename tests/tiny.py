"""Tiny random models with a byte tokenizer, saved as a hub model is; and tiny requests for their engine."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from core import Datum, EngineOptions, ModelInput, ServiceClient, TrainingClient
from core.engine import Engine
from core.futures import Future
from core.request import Call

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 256 + len(SPECIAL)
CONTEXT = 1024
KINDS = ("llama", "llama-tied", "qwen2", "qwen3")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cook-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tiny_model_dir(kind: str = "llama") -> Path:
    """What transformers (and `model.name=`) loads: config, seeded fp32 weights, byte tokenizer with ChatML."""
    directory = _folder() / kind
    model = tiny_model(kind)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def tiny_model(kind: str = "llama", intermediate_size: int = 56):
    """2 layers, hidden 32, 4 query and 2 key-value heads; norm weights and biases are not trivial."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": intermediate_size, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": kind == "llama-tied",
        "bos_token_id": None, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 3,
    }  # fmt: skip
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))  # heads * size is not the hidden size
    elif kind in ("llama", "llama-tied"):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        raise ValueError(f"no tiny model '{kind}', expected one of {', '.join(KINDS)}")
    fill_with_noise(model)
    return model


def fill_with_noise(model) -> None:
    """Seeded weights of a size at which attention and logits are far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 2:
                weight.copy_(noise * (0.4 if "embed" in name else 1.3 * weight.shape[1] ** -0.5))
            else:
                weight.copy_(1 + 0.2 * noise if "norm" in name else 0.3 * noise)


def tiny_tokenizer():
    """One token per byte, then <|endoftext|>, <|im_start|>, <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


# ---- requests for the engine


def service_at(store: Path, **options) -> ServiceClient:
    """fp32 on the CPU unless told otherwise."""
    return ServiceClient(store, EngineOptions(**{"dtype": "float32", "device": "cpu", **options}))


def new_client(store: Path, kind: str = "llama", rank: int = 4, seed: int = 0, noise: bool = True, **targets) -> TrainingClient:
    """A training client whose B is random too, so that the adapter matters."""
    client = service_at(store).create_lora_training_client(str(tiny_model_dir(kind)), rank, seed, **targets).result()
    if noise:
        randomise(client, seed)
    return client


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine is busy until the block ends: what is submitted inside waits, and is then taken together."""
    gate, tenant = threading.Event(), engine.join()
    engine.submit(tenant, Call(gate.wait, Future()))
    yield
    gate.set()
    engine.leave(tenant, None)


def randomise(client: TrainingClient, seed: int, size: float = 0.05) -> None:
    """Random B, while nothing is submitted."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for _, _, b in client.adapter.factors():
        b.copy_(size * torch.randn(b.shape, generator=generator))
    client.adapter.version += 1


def factors(client: TrainingClient) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module path -> (A, B), copies."""
    return {name: (a.clone(), b.clone()) for name, a, b in client.adapter.factors()}


def gradients(client: TrainingClient) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module path -> (d A, d B) of what is accumulated, copies."""
    view = copy.copy(client.adapter)
    view.params = client.adapter.grad
    return {name: (a.clone(), b.clone()) for name, a, b in view.factors()}


def flat(client: TrainingClient) -> dict[str, torch.Tensor]:
    """The adapter's buffers, copies."""
    adapter = client.adapter
    return {key: getattr(adapter, key).clone() for key in ("params", "grad", "exp_avg", "exp_avg_sq")}


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def datum(length: int, seed: int = 0, loss_fn: str = "cross_entropy", weights: bool = True) -> Datum:
    """A random sequence with every input that `loss_fn` takes; about a third of the weights are 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokens(length + 1, seed)

    def normal(mean: float, size: float) -> torch.Tensor:
        return mean + size * torch.randn(length, generator=generator)

    inputs: dict[str, torch.Tensor] = {"target_tokens": torch.tensor(ids[1:])}
    if loss_fn != "cross_entropy":
        inputs |= {"logprobs": normal(-5.0, 1.0), "advantages": normal(0.0, 1.0)}
    if loss_fn == "gspo":
        inputs["sequence_ratio_mask"] = (torch.arange(length) >= length // 3).float()
    if weights:
        trained = torch.rand(length, generator=generator) > 0.35
        trained[-1] = True
        inputs["weights"] = torch.where(trained, normal(1.0, 0.3), 0.0)
    return Datum(ModelInput.from_ints(ids[:-1]), inputs)


def data(lengths: Sequence[int], seed: int = 0, loss_fn: str = "cross_entropy", weights: bool = True) -> list[Datum]:
    return [datum(length, 100 * seed + i, loss_fn, weights) for i, length in enumerate(lengths)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """|actual - expected| <= relative * |expected|, as norms of the whole tensors."""
    assert actual.shape == expected.shape
    assert torch.isfinite(expected).all()
    error, size = torch.linalg.vector_norm(actual - expected), torch.linalg.vector_norm(expected)
    assert error <= relative * size, f"relative difference {float(error / size):.3g}"


# ---- what transformers and PEFT make of the same


def base_model(kind: str = "llama"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir(kind), dtype=torch.float32).eval()


def peft_model(directory: str | Path, kind: str = "llama"):
    """The base under a saved adapter, whose A and B take gradients."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model(kind), directory, is_trainable=True)


def logprobs_of(model, one: Datum) -> torch.Tensor:
    """log_softmax of the model's own logits at the targets [N] or [N, K]."""
    logits = model(torch.tensor([one.model_input.to_ints()])).logits[0]
    targets = one.loss_fn_inputs["target_tokens"]
    return torch.log_softmax(logits, -1).gather(1, targets.reshape(len(targets), -1)).reshape(targets.shape)


def assert_gradients_equal(client: TrainingClient, model, relative: float = 1e-5) -> None:
    """What the client has accumulated is what backward left in PEFT's layers."""
    for name, (d_a, d_b) in gradients(client).items():
        layer = model.base_model.model.get_submodule(name)
        assert_close(d_a, layer.lora_A["default"].weight.grad, relative)
        assert_close(d_b, layer.lora_B["default"].weight.grad, relative)
