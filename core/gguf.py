"""GGUF files as ordinary Hugging Face model directories: dequantised once to bf16 and kept in a cache.

Two traps of transformers are stepped around: it would keep the weights packed and unpack them at every forward
(hence `dequantize=True`), and AutoTokenizer picks a class with ids beyond the embedding (hence the plain fast tokenizer).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path

_SAMPLE = 1 << 20  # bytes hashed at each end of the file
_converting = threading.Lock()


def cache_directory() -> Path:
    """$COOK_CACHE, else cook/ in the user's cache folder."""
    if override := os.environ.get("COOK_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cook"


def converted(gguf_file: Path) -> Path:
    """The model directory made from `gguf_file`; takes about 20 s and 2 bytes per parameter of disk the first time."""
    target = cache_directory() / "models" / f"{gguf_file.stem}-{_fingerprint(gguf_file)}"
    with _converting:  # the engine and the renderer ask at the same time
        if not (target / "config.json").exists():
            _convert_aside(gguf_file, target)
    return target


def _convert_aside(gguf_file: Path, target: Path) -> None:
    print(f"converting {gguf_file.name} to bf16 in {target} (once)", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        _convert(gguf_file, aside)
        aside.rename(target)
    except OSError:
        if not (target / "config.json").exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, path.stat().st_size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]


def _convert(gguf_file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, name = str(gguf_file.parent), gguf_file.name
    raw = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name)
    pad = "<|endoftext|>" if "<|endoftext|>" in raw.get_vocab() else raw.pad_token
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw.backend_tokenizer, bos_token=raw.bos_token, eos_token=raw.eos_token, pad_token=pad
    )
    tokenizer.chat_template = raw.chat_template
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    num_rows = len(model.get_input_embeddings().weight)  # pyright: ignore[reportArgumentType]
    if len(tokenizer) > num_rows:
        raise ValueError(f"{name}: {len(tokenizer)} token ids for {num_rows} rows of the embedding")
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.name_or_path = ""
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    logging.enable_progress_bar()
