"""One TRL DPOTrainer (PEFT LoRA) in a process of its own, stepping when told to: see bench/dpo.py."""

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
    os.dup2(2, 1)

    def say(**message) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from bench.trl_worker import peak_gb

    torch.manual_seed(0)
    setting = job["setting"]
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, setting["dtype"]), attn_implementation="sdpa"
    ).to(job["device"])
    config = DPOConfig(
        output_dir=job["scratch"], max_length=256, per_device_train_batch_size=setting["pairs"],
        gradient_accumulation_steps=job["pairs"] // setting["pairs"], max_steps=job["steps"], learning_rate=1e-5, beta=0.1,
        lr_scheduler_type="constant", gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1_000_000,
        bf16=setting["dtype"] == "bfloat16", use_cpu=job["device"] == "cpu", dataloader_num_workers=0, disable_tqdm=True,
        max_grad_norm=0.0, weight_decay=0.0,
    )  # fmt: skip
    seen = {"start": 0.0, "losses": []}

    class Step(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            sys.stdin.readline()
            seen["losses"], seen["start"] = [], time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if job["device"] != "cpu":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - seen["start"]
            say(seconds=seconds, loss=sum(seen["losses"]), peak_gb=peak_gb(job["device"]))

    class Noting(DPOTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen["losses"].append(float(loss))
            return loss

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)  # the pairs in our order

    trainer = Noting(
        model=model, ref_model=None, args=config, train_dataset=Dataset.from_list(job["rows"]),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[Step()],
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    say(ready=True)
    trainer.train()


if __name__ == "__main__":
    main()
