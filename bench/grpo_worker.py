"""One TRL GRPOTrainer (PEFT LoRA, no vLLM) in a process of its own, stepping when told to: see bench/rl.py."""

from __future__ import annotations

import json
import os
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
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from bench.trl_worker import peak_gb
    from envs.arithmetic import Arithmetic

    torch.manual_seed(0)
    setting, num_rows = job["setting"], job["problems"] * job["attempts"]
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, setting["dtype"]), attn_implementation="sdpa"
    ).to(job["device"])
    config = GRPOConfig(
        output_dir=job["scratch"], per_device_train_batch_size=setting["rows"],
        gradient_accumulation_steps=num_rows // setting["rows"], num_generations=job["attempts"],
        max_completion_length=job["max_tokens"], temperature=1.0, beta=0.0, scale_rewards="none", loss_type="dapo",
        max_steps=job["steps"], learning_rate=job["learning_rate"], lr_scheduler_type="constant", max_grad_norm=0.0,
        weight_decay=0.0, gradient_checkpointing=False, use_vllm=False, report_to=[], save_strategy="no",
        use_transformers_continuous_batching=setting["continuous"], logging_steps=1_000_000, disable_tqdm=True,
        bf16=setting["dtype"] == "bfloat16", use_cpu=job["device"] == "cpu", shuffle_dataset=False,
        dataloader_num_workers=0,
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

    class Step(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            sys.stdin.readline()
            seen["start"] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if job["device"] != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - seen.pop("start")
            say(seconds=seconds, peak_gb=peak_gb(job["device"]), **seen)

    trainer = GRPOTrainer(
        model=model, args=config, reward_funcs=reward, train_dataset=Dataset.from_list(job["problem_rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"], padding_side="left"), callbacks=[Step()],
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    say(ready=True)
    trainer.train()


if __name__ == "__main__":
    main()
