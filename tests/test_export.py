"""Exports load elsewhere and compute what the engine computes with the adapter; a failed one leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from cookbook.cli import main
from cookbook.config import ModelConfig
from cookbook.exporting.card import _without_folders, card
from cookbook.exporting.subject import Subject
from core import Datum
from core.merge import Merged, in_shards
from core.models import EMBEDDED
from tests.small_runs import chat, train, write_rows
from tests.tiny import KINDS, base_model, data, logprobs_of, new_client, peft_model, tiny_model_dir

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings", "ignore:`is_gradient"),
]


def adapter(folder: Path, kind: str) -> tuple[str, list[Datum], list[torch.Tensor]]:
    """A saved adapter that matters, and the engine's logprobs with it."""
    client, batch = new_client(folder / "store", kind, rank=3), data([40, 17])
    directory = client.save_state("a").result().directory
    outputs = client.forward(batch, "cross_entropy").result().loss_fn_outputs
    client.close()
    return str(directory), batch, [output["logprobs"] for output in outputs]


def assert_same(model, batch: list[Datum], expected: list[torch.Tensor], apart: float) -> None:
    with torch.no_grad():
        for one, logprobs in zip(batch, expected, strict=True):
            assert (logprobs_of(model, one) - logprobs).abs().max() < apart


def exported(directory: str, to: Path, *words: str) -> Path:
    assert main(["export", directory, "--to", str(to), *words]) == 0
    return to


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_computes_what_the_engine_computes(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    directory, batch, expected = adapter(tmp_path, kind)
    plain = exported(directory, tmp_path / "peft", "--format", "peft")
    assert_same(PeftModel.from_pretrained(base_model(kind), plain).eval(), batch, expected, 1e-4)

    merged = exported(directory, tmp_path / "merged", "--format", "merged")
    assert_same(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), batch, expected, 1e-4)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.decode([258]) == "<|im_end|>" and "im_start" in tokenizer.chat_template

    for quantize, apart in (("f16", 0.02), ("q8_0", 0.6)):
        folder = exported(directory, tmp_path / quantize, "--format", "gguf", "--quantize", quantize)
        (file,) = folder.glob("*.gguf")
        size = {"head_dim": 16} if kind == "qwen3" else {}  # transformers' reader does not look it up there
        gguf = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **size
        )
        assert_same(gguf.eval(), batch, expected, apart)
        assert gguf.config.eos_token_id == 258 and gguf.config.tie_word_embeddings is False
    said = capsys.readouterr().out
    assert said.count("logprobs of the reloaded export differ by") == 4
    assert ("it gets weights of its own" in said) == (kind == "llama-tied")


def test_nothing_but_our_lines_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, *_ = adapter(tmp_path, "llama")
    capsys.readouterr()
    for form in ("peft", "merged", "gguf"):
        exported(directory, tmp_path / form, "--format", form)
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("exported ") == 3


def test_merging_by_peft_itself_gives_a_tied_model_other_logits(tmp_path: Path) -> None:
    """Why we merge by ourselves: it adds the head's adapter to the embedding too."""
    directory, batch, expected = adapter(tmp_path, "llama-tied")
    theirs = peft_model(directory, "llama-tied").merge_and_unload()
    with torch.no_grad():
        assert (logprobs_of(theirs.eval(), batch[0]) - expected[0]).abs().max() > 0.1


def test_a_tied_model_stays_tied_without_an_adapter_of_the_head(tmp_path: Path) -> None:
    client = new_client(tmp_path / "store", "llama-tied", train_unembed=False)
    directory = str(client.save_state("a").result().directory)
    client.close()
    merged = exported(directory, tmp_path / "merged", "--format", "merged")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in [info.name for info in Merged(merged, None).tensors]
    gguf = exported(directory, tmp_path / "gguf", "--format", "gguf")
    from gguf import GGUFReader

    assert "output.weight" not in [tensor.name for tensor in GGUFReader(next(gguf.glob("*.gguf"))).tensors]


def test_merging_holds_no_more_than_two_shards(tmp_path: Path) -> None:
    """16 shards of 16 MB: the resident memory may rise by two of them and by what a tokenizer takes."""
    from safetensors.torch import save_file

    from cookbook.config import ModelConfig
    from cookbook.exporting.model_dirs import write_merged
    from cookbook.renderers import load_renderer

    base, adapter_dir, size = tmp_path / "base", tmp_path / "adapter", 2048
    for folder in (base, adapter_dir, tmp_path / "out"):
        folder.mkdir()
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(15)]
    files = {f"{name}.weight": f"{index}.safetensors" for index, name in enumerate(names)}
    files["model.embed_tokens.weight"] = "embed.safetensors"
    for name, file in files.items():
        save_file({name: torch.randn(size, size)}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    factors = {f"base_model.model.{name}.lora_{x}.weight": torch.randn(*shape) for name in names
               for x, shape in (("A", (2, size)), ("B", (size, 2)))}  # fmt: skip
    save_file(factors, adapter_dir / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 32, "target_modules": ["up_proj"]}
    (adapter_dir / "adapter_config.json").write_text(json.dumps(config))
    renderer = load_renderer(ModelConfig(name=str(tiny_model_dir())))
    merged, shard = Merged(base, adapter_dir), 4 * size * size
    merged.read(f"{names[0]}.weight")  # what torch takes once
    peak, before = Watermark(), Watermark.now()
    write_merged(merged, renderer, tmp_path / "out", shard_bytes=shard)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 16
    assert peak.bytes() - before < 2.5 * shard
    made, name = Merged(tmp_path / "out", None), f"{names[5]}.weight"
    a, b = (factors[f"base_model.model.{names[5]}.lora_{x}.weight"] for x in "AB")
    torch.testing.assert_close(made.read(name), Merged(base, None).read(name) + 16 * b @ a, rtol=1e-5, atol=1e-4)


class Watermark:
    """The most memory that was resident since it was made; Linux alone tells."""

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            pytest.skip(f"no peak of resident memory can be had here: {error}")

    @staticmethod
    def now() -> int:
        return Watermark._field("VmRSS")

    def bytes(self) -> int:
        return self._field("VmHWM")

    @staticmethod
    def _field(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


def test_shards_are_cut_by_size_and_nothing_is_lost() -> None:
    infos = Merged(tiny_model_dir(), None).tensors
    shards = list(in_shards(infos, 20_000))
    assert [info for shard in shards for info in shard] == infos
    assert all(len(shard) == 1 or sum(info.num_bytes for info in shard) <= 20_000 for shard in shards)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("{/home/me/a.jsonl: 0.5, ~/b.jsonl: 1}", "{a.jsonl: 0.5, b.jsonl: 1}"),
        ("rewards./home/me/my.py:score", "rewards.my.py:score"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("../rows/a.jsonl", "../rows/a.jsonl"),
    ],
)
def test_a_card_names_no_folder_of_the_machine(text: str, kept: str) -> None:
    assert _without_folders(text) == kept


@pytest.mark.parametrize(("name", "loaded"), [
    ("smollm2-135m-instruct-q4_1", 'from_pretrained(local_model("smollm2-135m-instruct-q4_1"))'),
    ("Qwen/Qwen3-8B", 'from_pretrained("Qwen/Qwen3-8B")'),
])  # fmt: skip
def test_a_card_loads_the_base_by_a_name_that_there_is(name: str, loaded: str, tmp_path: Path) -> None:
    text = card(Subject("mine", ModelConfig(name=name), tmp_path), "peft")
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert loaded in code and ("import local_model" in code) == (name in EMBEDDED)


def test_a_run_is_exported_with_its_newest_or_named_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, rows = tmp_path / "run", write_rows(tmp_path / "rows.jsonl", map(chat, range(30)))
    assert train(run, rows, steps=4, eval_every=2) == 0
    exported(str(run), tmp_path / "newest")
    exported(str(run), tmp_path / "second", "--checkpoint", "2", "--no-verify")
    said = capsys.readouterr().out
    assert "step 4 to" in said.replace("\n", " ") and "step 2 to" in said.replace("\n", " ")
    text = (tmp_path / "newest/README.md").read_text()
    assert "| held_out/nll |" in text and "learning_rate: 0.01" in text and str(tmp_path) not in text
    assert main(["push", str(run), "me/model", "--dry-run", "--no-verify"]) == 0
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said and "nothing was sent (--dry-run)" in said and "me/model (private)" in said


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, *_ = adapter(tmp_path, "llama")
    capsys.readouterr()

    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    assert "something already" in refused("export", directory, "--to", str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]

    for form in ("peft", "merged"):
        words = ("export", directory, "--to", str(tmp_path / "out"), "--format", form, "--quantize", "q8_0")
        assert f"--quantize q8_0 goes with --format gguf, not {form}" in refused(*words)

    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("model: {name: x}\n")
    assert "has no checkpoint yet" in refused("export", str(tmp_path / "run"), "--to", str(tmp_path / "out"))
    assert "expected newest, best" in refused(
        "export", str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--checkpoint", "x"
    )

    adapter_file = Path(directory) / "adapter_model.safetensors"
    adapter_file.write_bytes(adapter_file.read_bytes()[:100])
    assert "is damaged" in refused("export", directory, "--to", str(tmp_path / "out"))
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    monkeypatch.setenv("HF_HOME", str(tmp_path / "nobody"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert "expected ORGANISATION/NAME" in refused("push", directory, "model")
    assert os.environ.get("HF_TOKEN") is None and "hf auth login" in refused("push", directory, "me/model")


def test_an_export_that_computes_something_else_is_not_kept(tmp_path: Path) -> None:
    from cookbook.exporting.verify import PROMPT, Reference, compare, load_merged

    directory, *_ = adapter(tmp_path, "qwen2")
    merged = exported(directory, tmp_path / "merged", "--format", "merged")
    model, tokenizer = load_merged(merged)
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        logprobs = torch.log_softmax(base_model("qwen2")(torch.tensor([prompt])).logits[0, :-1], -1)
    likeliest = logprobs.topk(8)
    found = Reference(prompt, likeliest.indices, likeliest.values, base_logprobs=likeliest.values)
    difference = compare(found, lambda: (model, tokenizer), 0.1)
    assert not difference.passed and difference.mean > 0.1
