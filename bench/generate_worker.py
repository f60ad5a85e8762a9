"""`generate` or `generate_batch` in a process of its own, answering requests when told to: see bench/sample.py."""

from __future__ import annotations

import json
import sys
import time

from bench.channel import opened, without_hub


def main() -> None:
    without_hub()
    job, say = opened()

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype, device = getattr(torch, job["dtype"]), job["device"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa").to(device).eval()
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = None  # every reply has the length asked for
    answer = {"generate": generate, "generate_batch": generate_batch}[job["side"]]
    say(ready=True)
    for line in sys.stdin:
        requests = json.loads(line)["requests"]
        with torch.no_grad():
            seconds = answer(model, requests, device)
        say(seconds=seconds, tokens=sum(max_tokens for _, max_tokens, _ in requests))


def settings(max_new_tokens: int):
    """Sampling at T = 1 from the whole distribution."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, pad_token_id=0, eos_token_id=None
    )


def generate(model, requests: list, device: str) -> float:
    """One left-padded batch, which ends with its longest reply."""
    import torch

    prompts = [prompt for prompt, _, _ in requests]
    longest, new = max(map(len, prompts)), max(max_tokens for _, max_tokens, _ in requests)
    start = time.perf_counter()
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    found = model.generate(tokens, attention_mask=mask, generation_config=settings(new)).cpu()
    seconds = time.perf_counter() - start
    assert found.shape[1] == longest + new, f"{found.shape[1]} tokens, expected {longest} + {new}"
    return seconds


def generate_batch(model, requests: list, device: str) -> float:
    """`generate_batch` with a max_new_tokens for each request: the same manager, whose making is not on the clock."""
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    longest, new = max(len(prompt) for prompt, _, _ in requests), max(max_tokens for _, max_tokens, _ in requests)
    hints = WorkloadHints(max_prompt_length=longest, max_generated_length=new, num_requests=len(requests))
    config = ContinuousBatchingConfig(max_memory_percent=None if device == "cpu" else 0.5)
    opened = model.continuous_batching_context_manager(
        generation_config=settings(new), continuous_batching_config=config, workload_hints=hints, timeout=5
    )
    num_tokens = 0
    with opened as manager:
        start = time.perf_counter()
        for prompt, max_tokens, _ in requests:
            manager.add_request(prompt, max_new_tokens=max_tokens)
        done = 0
        while done < len(requests):
            result = manager.get_result(timeout=1)
            if result is None:
                assert manager.is_running(), "the generation thread has ended"
            elif result.is_finished():
                assert not result.error, result.error
                num_tokens += len(result.generated_tokens)
                done += 1
        seconds = time.perf_counter() - start
    assert num_tokens == sum(max_tokens for _, max_tokens, _ in requests), num_tokens
    return seconds


if __name__ == "__main__":
    main()
