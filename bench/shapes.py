"""Models of real shapes with random weights, and rows of random tokens: speed without a download."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

CONFIGS = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}, "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}, "tie_word_embeddings": True,
    },
}  # fmt: skip
ROW_TOKENS = 2048


def random_model(name: str) -> str:
    """A directory with a bf16 model of `name`'s shapes (16 GB for 8B) and a tokenizer that only fills the place.

    Made once, among the temporary files.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    if name not in CONFIGS:
        raise SystemExit(f"--shapes {name}: expected one of {', '.join(CONFIGS)}")
    directory = Path(tempfile.gettempdir()) / f"cook-bench-{name}"
    if (directory / "tokenizer.json").exists():
        return str(directory)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**CONFIGS[name]), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    word_level = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=word_level, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        directory
    )
    return str(directory)


def random_rows(name: str, count: int) -> list[dict]:
    rng = random.Random(0)
    vocab = CONFIGS[name]["vocab_size"]
    return [
        {"tokens": [rng.randrange(2, vocab) for _ in range(ROW_TOKENS + 1)], "mask": [1] * (ROW_TOKENS + 1)}
        for _ in range(count)
    ]
