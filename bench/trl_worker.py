"""One TRL SFTTrainer (PEFT LoRA) in a process of its own, stepping when told to: see bench/sft.py."""

from __future__ import annotations

from bench.channel import all_linear, base_model, opened, stepping, trainer_options, without_hub


def main() -> None:
    without_hub()
    job, say = opened()

    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    setting = job["setting"]
    rows = [{"input_ids": row["tokens"], "completion_mask": row["mask"]} for row in job["rows"]]
    config = SFTConfig(
        max_length=setting["max_length"], packing=setting["packing"] is not None,
        packing_strategy=setting["packing"] or "bfd", per_device_train_batch_size=setting["batch_size"],
        gradient_accumulation_steps=setting["accumulate"], learning_rate=1e-4, completion_only_loss=True,
        gradient_checkpointing=setting.get("checkpointing", False), **trainer_options(job),
    )  # fmt: skip
    seen = {"tokens": 0}

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            seen["tokens"] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    def begin() -> None:
        seen["tokens"] = 0

    trainer = Counting(
        model=base_model(job), args=config, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), peft_config=all_linear(job["rank"]),
        callbacks=[stepping(job, say, begin, lambda: dict(seen))],
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


if __name__ == "__main__":
    main()
