"""The JSON bodies of OpenAI's protocol, checked; a field that is not named here is refused, not ignored."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from cookbook.messages import tool_name
from cookbook.serving.refusal import Refusal

ROLES = ("system", "developer", "user", "assistant", "tool")


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Request(BaseModel):
    """What both kinds of request share. `top_k` and `stop_token_ids` are not OpenAI's: the SDK sends them as extra_body."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    # these may come with the values that mean nothing, and are refused with any other
    without: ClassVar[dict[str, tuple]] = {
        "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}),
    }  # fmt: skip

    model: str
    n: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int = Field(default=-1, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # about the caller, of no effect here
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self) -> None:
        """Refusal 400 for what this server does not do."""
        for name, harmless in self.without.items():
            value = getattr(self, name)
            if value not in harmless:
                raise Refusal(400, f"{name} is {value!r}, which this server does not support: leave it out", name)
        if "" in self.stops:
            raise Refusal(400, "stop has an empty text, expected texts of at least one character", "stop")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def usage_asked(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Completion(Request):
    without: ClassVar[dict[str, tuple]] = {
        **Request.without, "echo": (None, False), "suffix": (None, ""), "best_of": (None, 1),
    }  # fmt: skip

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One per text or list of ids."""
        given = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]  # type: ignore[list-item]
        return given  # type: ignore[return-value]


class Chat(Request):
    without: ClassVar[dict[str, tuple]] = {
        **Request.without, "response_format": (None, {"type": "text"}), "tool_choice": (None, "auto", "none"),
    }  # fmt: skip

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, f"top_logprobs is {self.top_logprobs} without logprobs=true", "top_logprobs")
        for i, message in enumerate(self.messages):
            if (role := message.get("role")) not in ROLES:
                raise Refusal(400, f"messages[{i}].role is {str(role)[:60]!r}, expected one of {', '.join(ROLES)}", "messages")
        for i, tool in enumerate(self.tools or []):
            if tool.get("type", "function") != "function" or not tool_name(tool):
                expected = 'expected {"type": "function", "function": {"name": ...}}'
                raise Refusal(400, f"tools[{i}] is {str(tool)[:60]!r}, {expected}", "tools")

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        return None if self.tool_choice == "none" else self.tools or None
