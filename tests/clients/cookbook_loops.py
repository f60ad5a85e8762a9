"""tinker-cookbook's own loops, run by an environment that has tinker-cookbook and nothing of ours.

python cookbook_loops.py sft|rl URL MODEL_DIRECTORY LOG_DIRECTORY EPOCHS; what happened is in LOG_DIRECTORY.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import chz
import tinker
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset, RLDatasetBuilder, StepResult
from tinker_cookbook.supervised import train as sft_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer

RENDERER = "qwen3_instruct"  # ChatML, as the tiny model's template
NUM_CONVERSATIONS, NUM_HELD_OUT, BATCH_SIZE = 20, 4, 4


def sft(url: str, model: str, log: Path, epochs: int) -> None:
    """Four steps an epoch on conversations of a file, with a held-out loss."""
    conversations = log.parent / "conversations.jsonl"
    with conversations.open("w") as file:
        for i in range(NUM_CONVERSATIONS):
            turns = [{"role": "user", "content": f"Count to {i}."}, {"role": "assistant", "content": "one two three"}]
            file.write(json.dumps({"messages": turns}) + "\n")
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model, renderer_name=RENDERER, max_length=256, batch_size=BATCH_SIZE
    )
    builder = FromConversationFileBuilder(file_path=str(conversations), test_size=NUM_HELD_OUT, common_config=common)
    config = sft_train.Config(
        log_path=str(log), model_name=model, recipe_name="sft", renderer_name=RENDERER, dataset_builder=builder,
        learning_rate=0.02, num_epochs=epochs, lora_rank=8, base_url=url, save_every=2, eval_every=2,
        lr_schedule="constant",
    )  # fmt: skip
    asyncio.run(sft_train.main(config))


class SmallLetters(Env):
    """One reply, rewarded by its share of the bytes a to z."""

    def __init__(self, model: str) -> None:
        self.renderer = get_renderer(RENDERER, get_tokenizer(model))

    async def initial_observation(self):
        prompt = self.renderer.build_generation_prompt([{"role": "user", "content": "Say something."}])
        return prompt, self.renderer.get_stop_sequences()

    async def step(self, action, *, extra=None) -> StepResult:
        text = self.renderer.tokenizer.decode(action, skip_special_tokens=True)
        reward = sum("a" <= letter <= "z" for letter in text) / max(1, len(text))
        return StepResult(reward=reward, episode_done=True, next_observation=tinker.ModelInput.empty(), next_stop_condition=[])


@chz.chz
class SmallLettersGroup(EnvGroupBuilder):
    model: str

    async def make_envs(self) -> Sequence[Env]:
        return [SmallLetters(self.model) for _ in range(8)]


class Groups(RLDataset):
    def __init__(self, model: str, num_batches: int) -> None:
        self.model, self.num_batches = model, num_batches

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [SmallLettersGroup(model=self.model) for _ in range(4)]

    def __len__(self) -> int:
        return self.num_batches


@chz.chz
class GroupsBuilder(RLDatasetBuilder):
    model: str
    num_batches: int

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        return Groups(self.model, self.num_batches), None


def rl(url: str, model: str, log: Path, epochs: int) -> None:
    """Eight steps an epoch of four groups of eight rollouts."""
    config = rl_train.Config(
        log_path=str(log), model_name=model, recipe_name="rl", renderer_name=RENDERER,
        dataset_builder=GroupsBuilder(model=model, num_batches=8 * epochs), learning_rate=0.05, max_tokens=16,
        lora_rank=8, base_url=url, save_every=4, eval_every=0,
    )  # fmt: skip
    asyncio.run(rl_train.main(config))


if __name__ == "__main__":
    loop, url, model, log, epochs = sys.argv[1:]
    {"sft": sft, "rl": rl}[loop](url, model, Path(log), int(epochs))
