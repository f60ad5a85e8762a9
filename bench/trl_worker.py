"""One TRL SFTTrainer (PEFT LoRA) in a process of its own, stepping when told to: see bench/sft.py."""

from __future__ import annotations

import json
import os
import resource
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    job = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr; `out` speaks to the driver

    def say(**message) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    setting = job["setting"]
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, setting["dtype"]), attn_implementation="sdpa"
    ).to(job["device"])
    rows = [{"input_ids": row["tokens"], "completion_mask": row["mask"]} for row in job["rows"]]
    config = SFTConfig(
        output_dir=job["scratch"], max_length=setting["max_length"], packing=setting["packing"] is not None,
        packing_strategy=setting["packing"] or "bfd", per_device_train_batch_size=setting["batch_size"],
        gradient_accumulation_steps=setting["accumulate"], max_steps=job["steps"], learning_rate=1e-4,
        lr_scheduler_type="constant", gradient_checkpointing=setting.get("checkpointing", False), report_to=[],
        save_strategy="no", logging_steps=1_000_000, bf16=setting["dtype"] == "bfloat16", use_cpu=job["device"] == "cpu",
        completion_only_loss=True, dataloader_num_workers=0, disable_tqdm=True, max_grad_norm=0.0, weight_decay=0.0,
    )  # fmt: skip

    seen = {"tokens": 0}

    class Step(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            sys.stdin.readline()
            seen["tokens"], seen["start"] = 0, time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if job["device"] != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - seen["start"]
            say(seconds=seconds, tokens=seen["tokens"], peak_gb=peak_gb(job["device"]))

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            seen["tokens"] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Counting(
        model=model, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[Step()],
        peft_config=LoraConfig(r=job["rank"], lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    say(ready=True, first_loss=first_loss(trainer.model, job["probe"], job["device"]))
    trainer.train()


def first_loss(model, probe: list[dict], device: str) -> float:
    """Mean NLL per trained token of the probe rows, one at a time, before any step."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in probe:
            tokens = torch.tensor([row["tokens"]], device=device)
            logprobs = torch.log_softmax(model(input_ids=tokens).logits[0, :-1].float(), -1)
            mask = torch.tensor(row["mask"][1:], device=device).bool()
            chosen = logprobs.gather(1, tokens[0, 1:, None])[:, 0][mask]
            total, count = total - float(chosen.sum()), count + int(mask.sum())
    return total / count


def peak_gb(device: str) -> float:
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
