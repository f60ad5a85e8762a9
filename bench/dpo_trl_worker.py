"""One TRL DPOTrainer (PEFT LoRA) in a process of its own, stepping when told to: see bench/dpo.py."""

from __future__ import annotations

from bench.channel import all_linear, base_model, opened, stepping, trainer_options, without_hub


def main() -> None:
    without_hub()
    job, say = opened()

    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(0)
    pairs = job["setting"]["pairs"]
    config = DPOConfig(
        max_length=256, per_device_train_batch_size=pairs, gradient_accumulation_steps=job["pairs"] // pairs,
        learning_rate=1e-5, beta=0.1, gradient_checkpointing=False, **trainer_options(job),
    )  # fmt: skip
    losses: list[float] = []

    class Noting(DPOTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)  # the pairs in our order

    trainer = Noting(
        model=base_model(job), ref_model=None, args=config, train_dataset=Dataset.from_list(job["rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), peft_config=all_linear(32),
        callbacks=[stepping(job, say, losses.clear, lambda: {"loss": sum(losses)})],
    )  # fmt: skip
    say(ready=True)
    trainer.train()


if __name__ == "__main__":
    main()
