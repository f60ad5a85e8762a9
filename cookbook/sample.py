"""`cook sample`: replies of a trained policy to one prompt, for scripts and a quick look."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from cookbook.errors import UsageError
from cookbook.served_policy import Speaker, open_speaker
from core import ModelInput, SampledSequence, SamplingParams
from envs.env import Message

if TYPE_CHECKING:
    from rich.console import Console


def sample(
    target: str, prompt: str, checkpoint: str, *, number: int, temperature: float, max_tokens: int, raw: bool,
    system: str | None, seed: int | None, as_json: bool, notes: Console,
) -> None:  # fmt: skip
    """Print `number` replies, on stdout nothing else. The prompt "-" is read from stdin."""
    text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty: give a text, or - to read it from stdin")
    if raw and system is not None:
        raise UsageError("--raw takes the prompt as it is, without a template: leave --system out")
    policy = open_speaker(target, checkpoint, notes)
    notes.print(f"{policy.name}, {policy.model.name}", style="dim", markup=False, highlight=False, soft_wrap=True)
    tokens, stop = _prompt(policy, text, raw, system)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop)
    try:
        found = policy.sampler.sample(tokens, number, params).result().sequences
    except (ValueError, FloatingPointError) as error:
        raise UsageError(str(error)) from error
    replies = [_text(policy, sequence, stop) for sequence in found]
    if as_json:
        print(json.dumps([_row(text, reply, sequence) for reply, sequence in zip(replies, found, strict=True)],
                         ensure_ascii=False, indent=1))  # fmt: skip
        return
    for index, reply in enumerate(replies):
        if number > 1:
            print(f"{'' if index == 0 else chr(10)}--- {index + 1}")
        print(reply)


def _prompt(policy: Speaker, text: str, raw: bool, system: str | None) -> tuple[ModelInput, list[int]]:
    renderer = policy.renderer
    if raw:
        return renderer.build_completion_prompt(text), [renderer.end_of_text]
    first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    try:
        return renderer.build_generation_prompt([*first, {"role": "user", "content": text}]), renderer.stop
    except ValueError as error:
        raise UsageError(str(error)) from error


def _text(policy: Speaker, sequence: SampledSequence, stop: list[int]) -> str:
    ended = sequence.tokens[-1:] and sequence.tokens[-1] in stop
    return policy.renderer.decode(sequence.tokens[:-1] if ended else sequence.tokens)


def _row(prompt: str, reply: str, sequence: SampledSequence) -> dict[str, object]:
    return {
        "prompt": prompt, "reply": reply, "stop_reason": sequence.stop_reason, "num_tokens": len(sequence.tokens),
        "logprob": sum(sequence.logprobs),
    }  # fmt: skip
