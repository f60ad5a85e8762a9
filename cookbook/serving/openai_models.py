"""Which sampler and which tokenizer a `model` of OpenAI's protocol means."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cookbook.chat_templates import load_tokenizer
from cookbook.config import ModelConfig
from cookbook.errors import UsageError
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server
from cookbook.token_texts import TokenTexts
from core import ModelInput, SamplingClient

if TYPE_CHECKING:
    from cookbook.renderers import Renderer

RECENT = 8  # checkpoints that stay loaded between requests


class Texts:
    """The tokenizer and the chat template of one base model, loaded when they are first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.order = asyncio.Lock()  # a tokenizer is used by one thread at a time
        self._tokenizer: Any = None
        self._texts_of: TokenTexts | None = None
        self._renderer: Renderer | None = None

    def texts_of(self, tokens: Sequence[int]) -> list[str]:
        if self._texts_of is None:
            self._texts_of = TokenTexts(self._decode)
        return self._texts_of(tokens)

    async def encode(self, prompt: str | list[int]) -> ModelInput:
        """A raw text; control tokens in it are kept."""
        if isinstance(prompt, list):
            return ModelInput.from_ints(prompt)
        async with self.order:
            return ModelInput.from_ints(await asyncio.to_thread(lambda: self.tokenizer.encode(prompt)))

    async def renderer(self) -> Renderer:
        from cookbook.renderers import load_renderer

        async with self.order:
            if self._renderer is None:
                try:
                    self._renderer = await asyncio.to_thread(load_renderer, ModelConfig(name=self.name))
                except UsageError as error:
                    raise Refusal(400, f"no chat with this model: {error}", "model") from error
            return self._renderer

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name)
        return self._tokenizer

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Served:
    client: SamplingClient
    texts: Texts

    def room(self, prompt: ModelInput) -> int | None:
        """How many tokens may follow `prompt`: what is left of the context and of the key-value cache."""
        engine = self.client.engine
        cache, most = engine.sampler.cache, engine.decoder.max_length
        if cache.capacity_for(most) > cache.max_tokens:
            most = cache.capacity_for(1)
            while cache.capacity_for(most + 1) <= cache.max_tokens:
                most = cache.capacity_for(most + 1)
        return max(most - prompt.length, 0) or None


class Models:
    """Base models and checkpoints by their names."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.recent: OrderedDict[str, SamplingClient] = OrderedDict()
        self._texts: dict[str, Texts] = {}

    async def find(self, name: str, owner: str) -> Served:
        """Refusal 404 for a model that is not there, or not `owner`'s."""
        if name in self.server.base:
            return Served(self.server.base[name], self._texts_for(name))
        if not name.startswith("tinker://"):
            known = ", ".join(self.server.base)
            raise Refusal(
                404, f"model '{name}' is not served here, expected {known}, or tinker://... of a checkpoint", "model",
                "model_not_found",
            )  # fmt: skip
        try:
            base = self.server.base_model_of(self.server.store.checkpoint(name, owner))
            client = await self.server.load_sampler(name, owner)
        except Refusal as error:
            code = "model_not_found" if error.status == 404 else None
            raise Refusal(error.status, error.detail, "model", code) from error
        self.recent[name] = client
        self.recent.move_to_end(name)
        while len(self.recent) > RECENT:
            self.recent.popitem(last=False)
        return Served(client, self._texts_for(base))

    def list(self, owner: str) -> list[dict[str, Any]]:
        """Base models, and the checkpoints for sampling that `owner` may read, newest first."""
        started = int(self.server.started)
        rows = [{"id": name, "object": "model", "created": started, "owned_by": "cook"} for name in self.server.base]
        for one in self.server.store.checkpoints("kind = 'sampler_weights' AND (owner = ? OR public = 1)", owner):
            rows.append({"id": one.uri, "object": "model", "created": int(one.created), "owned_by": one.owner})
        return rows

    def _texts_for(self, base: str) -> Texts:
        return self._texts.setdefault(base, Texts(base))
