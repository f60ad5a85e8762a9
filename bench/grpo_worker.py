"""One TRL GRPOTrainer (PEFT LoRA, no vLLM) in a process of its own, stepping when told to: see bench/rl.py."""

from __future__ import annotations

from bench.channel import all_linear, base_model, opened, stepping, trainer_options, without_hub


def main() -> None:
    without_hub()
    job, say = opened()

    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from envs.arithmetic import Arithmetic

    torch.manual_seed(0)
    setting, num_rows = job["setting"], job["problems"] * job["attempts"]
    config = GRPOConfig(
        per_device_train_batch_size=setting["rows"], gradient_accumulation_steps=num_rows // setting["rows"],
        num_generations=job["attempts"], max_completion_length=job["max_tokens"], temperature=1.0, beta=0.0,
        scale_rewards="none", loss_type="dapo", learning_rate=job["learning_rate"], gradient_checkpointing=False,
        use_vllm=False, use_transformers_continuous_batching=setting["continuous"], shuffle_dataset=False,
        **trainer_options(job),
    )  # fmt: skip
    seen: dict[str, float] = {}

    def reward(completions, completion_ids, expression, answer, **columns) -> list[float | None]:
        asked = zip(completions, expression, answer, strict=True)
        rewards: list[float | None] = []
        for reply, text, number in asked:
            rewards.append(Arithmetic(text, number).step(reply[-1]).reward)
        seen["reward"] = sum(filter(None, rewards)) / len(rewards)
        seen["reply_tokens"] = sum(map(len, completion_ids)) / len(completion_ids)
        return rewards

    trainer = GRPOTrainer(
        model=base_model(job), args=config, reward_funcs=reward, train_dataset=Dataset.from_list(job["problem_rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"), peft_config=all_linear(32),
        callbacks=[stepping(job, say, lambda: None, lambda: dict(seen))],
    )  # fmt: skip
    say(ready=True)
    trainer.train()


if __name__ == "__main__":
    main()
