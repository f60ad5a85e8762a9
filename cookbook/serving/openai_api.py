"""OpenAI's protocol: models, completions, chat completions, streamed or whole."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cookbook.messages import Message, template_messages
from cookbook.serving import openai_bodies as bodies
from cookbook.serving.door import Owner, Serving, StrictRoute
from cookbook.serving.openai_generate import Generation, watched
from cookbook.serving.openai_models import Models, Served
from cookbook.serving.openai_text import Deltas, Reply, Style, chat_logprobs, completion_logprobs, message_of
from cookbook.serving.refusal import Refusal
from cookbook.tool_prompt import knows_tools, with_tools_as_text
from core import ModelInput, SamplingParams

if TYPE_CHECKING:
    from cookbook.renderers import Renderer

router = APIRouter(prefix="/v1", route_class=StrictRoute)
COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may go on to the end of the context


def error_json(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    codes = {401: "invalid_api_key"}
    return {"error": {"message": message, "type": kind, "param": param, "code": code or codes.get(status)}}


def _models(request: Request) -> Models:
    return request.app.state.openai


Known = Annotated[Models, Depends(_models)]


@router.get("/models")
async def list_models(models: Known, owner: Owner) -> dict:
    return {"object": "list", "data": models.list(owner)}


@router.get("/models/{name:path}")
async def get_model(name: str, models: Known, owner: Owner) -> dict:
    found = next((row for row in models.list(owner) if row["id"] == name), None)
    if found is None:
        raise Refusal(404, f"no model '{name}'", "model", "model_not_found")
    return found


@router.post("/completions", response_model=None)
async def completions(body: bodies.Completion, request: Request, server: Serving, models: Known, owner: Owner) -> Response:
    body.check()
    served = await models.find(body.model, owner)
    if not body.prompts:
        raise Refusal(400, "prompt is an empty list, expected at least one prompt", "prompt")
    prompts = [await served.texts.encode(prompt) for prompt in body.prompts]
    ends = {*served.client.end_tokens, *body.stop_token_ids}
    params = [_params(body, ends, body.max_tokens or COMPLETION_TOKENS) for _ in prompts]
    form = CompletionForm(body, served)
    return await _answer(request, server, owner, Asked(body, served, prompts, params, ends, body.logprobs or 0, "prompt"), form)


@router.post("/chat/completions", response_model=None)
async def chat_completions(body: bodies.Chat, request: Request, server: Serving, models: Known, owner: Owner) -> Response:
    body.check()
    served = await models.find(body.model, owner)
    renderer = await served.texts.renderer()
    try:
        prompt = renderer.build_generation_prompt(*_told(body, renderer))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refusal(400, " ".join(str(error).split()), "messages") from error
    ends = {*renderer.stop, *served.client.end_tokens, *body.stop_token_ids}
    params = _params(body, ends, body.max_completion_tokens or body.max_tokens or served.room(prompt))
    form = ChatForm(body, Style(renderer.facts.in_thinking, renderer.facts.tool_style if body.offered else None), served)
    asked = Asked(body, served, [prompt], [params], ends, body.top_logprobs or 0, "messages")
    return await _answer(request, server, owner, asked, form)


def _told(body: bodies.Chat, renderer: Renderer) -> tuple[Sequence[Message], list[dict[str, Any]] | None]:
    """Messages and tools as this chat template takes them. Raises ValueError."""
    messages: Sequence[Message] = template_messages(body.messages)
    messages = [{**one, "role": "system"} if one["role"] == "developer" else one for one in messages]
    called = any(one.get("tool_calls") for one in messages)
    if (body.offered or called) and not knows_tools(renderer):
        return with_tools_as_text(messages, body.offered or []), None
    return messages, body.offered


def _params(body: bodies.Request, ends: set[int], max_tokens: int | None) -> SamplingParams:
    def given(value: float | None) -> float:
        return 1.0 if value is None else value

    seed = None if body.seed is None else body.seed % (2**63 - 1)
    top_k = body.top_k or -1
    stop: Any = [*body.stops, *sorted(ends)] or None
    return SamplingParams(max_tokens, seed, stop, given(body.temperature), top_k, given(body.top_p))


@dataclass(frozen=True)
class Asked:
    """A request that has been understood."""

    body: bodies.Request
    served: Served
    prompts: list[ModelInput]
    params: list[SamplingParams]
    ends: set[int]
    top: int
    param: str  # what errors about the prompt name

    def reply(self) -> Reply:
        return Reply(self.served.texts.texts_of, self.body.stops, self.ends)

    def usage(self, sampled: int) -> dict[str, int]:
        read = sum(prompt.length for prompt in self.prompts)
        return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


class Form(Protocol):
    """How one endpoint writes its choices."""

    prefix: str
    whole: str
    part: str

    def choice(self, index: int, reply: Reply, stop_reason: str) -> dict[str, Any]: ...

    def first(self, index: int) -> dict[str, Any] | None: ...

    def delta(self, index: int, reply: Reply, stop_reason: str | None) -> dict[str, Any] | None: ...


@dataclass
class CompletionForm:
    body: bodies.Completion
    served: Served
    sent: dict[int, int] = field(default_factory=dict)
    prefix = "cmpl"
    whole = part = "text_completion"

    def choice(self, index: int, reply: Reply, stop_reason: str) -> dict[str, Any]:
        return {"index": index, "text": reply.text, "logprobs": self._logprobs(reply), "finish_reason": stop_reason}

    def first(self, index: int) -> None:
        return None

    def delta(self, index: int, reply: Reply, stop_reason: str | None) -> dict[str, Any] | None:
        new = reply.text[self.sent.get(index, 0) :]
        self.sent[index] = len(reply.text)
        if not new and stop_reason is None:
            return None
        return {"index": index, "text": new, "logprobs": self._logprobs(reply), "finish_reason": stop_reason}

    def _logprobs(self, reply: Reply) -> dict[str, Any] | None:
        entries = reply.take()
        return None if self.body.logprobs is None else completion_logprobs(entries, self.served.texts.texts_of)


@dataclass
class ChatForm:
    body: bodies.Chat
    style: Style
    served: Served
    deltas: dict[int, Deltas] = field(default_factory=dict)
    prefix = "chatcmpl"
    whole, part = "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, reply: Reply, stop_reason: str) -> dict[str, Any]:
        message = message_of(reply.text, self.style)
        reason = _reason(stop_reason, "tool_calls" in message)
        return {"index": index, "message": message, "logprobs": self._logprobs(reply), "finish_reason": reason}

    def first(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, reply: Reply, stop_reason: str | None) -> dict[str, Any] | None:
        deltas = self.deltas.setdefault(index, Deltas(self.style))
        new = deltas.of(reply.text) if stop_reason is None else deltas.last(reply.text)
        if not new and stop_reason is None:
            return None
        reason = _reason(stop_reason, "tool_calls" in new)
        return {"index": index, "delta": new, "logprobs": self._logprobs(reply), "finish_reason": reason}

    def _logprobs(self, reply: Reply) -> dict[str, Any] | None:
        entries = reply.take()
        return chat_logprobs(entries, self.served.texts.texts_of) if self.body.logprobs else None


def _reason(stop_reason: str | None, calls: bool) -> str | None:
    return "tool_calls" if calls and stop_reason == "stop" else stop_reason


async def _answer(request: Request, server: Serving, owner: str, asked: Asked, form: Form) -> Response:
    body = asked.body
    try:
        generation = Generation(
            server, owner, asked.served.client, asked.prompts, body.samples, asked.params, asked.top, bool(body.stream)
        )
    except Refusal as error:
        raise Refusal(error.status, error.detail, error.param or asked.param, error.code) from error
    about = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    if body.stream:
        return Streamed(_events(generation, asked, form, {**about, "object": form.part}), generation)
    replies = [asked.reply() for _ in range(len(asked.prompts) * body.samples)]
    reasons = [""] * len(replies)
    async with watched(request, generation):
        async for found in generation.read():
            if found.token is None:
                reasons[found.index] = _ended(replies[found.index], found.stop_reason)
            else:
                replies[found.index].add(found.token, found.logprob, found.top)
    choices = [form.choice(i, reply, reason) for i, (reply, reason) in enumerate(zip(replies, reasons, strict=True))]
    usage = asked.usage(sum(reply.count for reply in replies))
    return JSONResponse({**about, "object": form.whole, "choices": choices, "usage": usage})


def _ended(reply: Reply, stop_reason: str) -> str:
    reply.finish()
    return "stop" if reply.stopped else stop_reason


class Streamed(StreamingResponse):
    """Server-sent events of a generation that ends with the connection."""

    def __init__(self, events: AsyncIterator[str], generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.close()


async def _events(generation: Generation, asked: Asked, form: Form, about: dict[str, Any]) -> AsyncIterator[str]:
    def event(*choices: dict[str, Any], **more: Any) -> str:
        return f"data: {json.dumps({**about, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    replies = [asked.reply() for _ in range(len(asked.prompts) * generation.n)]
    over: set[int] = set()
    try:
        for index in range(len(replies)):
            if (first := form.first(index)) is not None:
                yield event(first)
        async for found in generation.read():
            reply = replies[found.index]
            if found.index in over:
                continue
            if found.token is not None:
                reply.add(found.token, found.logprob, found.top)
            reason = _ended(reply, found.stop_reason) if found.token is None or reply.stopped else None
            if reason is not None:
                over.add(found.index)
            if (choice := form.delta(found.index, reply, reason)) is not None:
                yield event(choice)
    except Exception as error:  # the status has been sent: the stream must say it
        yield f"data: {json.dumps(error_json(500, str(error)))}\n\n"
        return
    if asked.body.usage_asked:
        yield event(usage=asked.usage(sum(reply.count for reply in replies)))
    yield "data: [DONE]\n\n"
