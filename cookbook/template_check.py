"""What a chat template does, learned from its renderings, and the check of the properties in cookbook/renderers.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cookbook.encoding import REPLY_TAGS, TextEncoder
from cookbook.errors import UsageError
from cookbook.messages import Json, Message
from cookbook.replies import ToolStyle

if TYPE_CHECKING:
    from cookbook.renderers import Renderer

ASK: Message = {"role": "user", "content": "What is two plus two?"}
REPLY = "It makes four."
ANSWER: Message = {"role": "assistant", "content": REPLY}
CITY = "Zermatt"
CALL: Message = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": CITY}}}],
}
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CHECKED_REPLIES = (
    REPLY,
    "42",
    "- one\n- two",
    "**Yes.** ",
    '"quoted"',
    "(1)",
    "{'a': 1}",
    "Ça va 🙂",
    "你好",
    "```\nx",
)


@dataclass(frozen=True)
class TemplateFacts:
    structural: frozenset[str]  # added tokens the template writes around messages
    stop: tuple[int, ...]  # tokens that end a reply
    in_thinking: bool  # the generation prompt ends inside <think>
    tool_style: ToolStyle


def refusal(renderer: Renderer, property: str, detail: str) -> UsageError:
    return UsageError(f"chat template {renderer.template_name} does not hold '{property}': {detail}")


def learn(renderer: Renderer) -> TemplateFacts:
    """Raises UsageError when the template cannot render a plain conversation or puts no stop token after a reply."""
    try:
        history = renderer.render([ASK, ANSWER, ASK], None, prompt=True)
        prompt = renderer.render([ASK], None, prompt=True)
        single = renderer.render([ASK, ANSWER], None, prompt=False)
    except ValueError as error:
        raise refusal(renderer, "renders a plain conversation", str(error)) from error
    added = {str(token) for token in renderer.tokenizer.added_tokens_decoder.values()} - REPLY_TAGS
    structural = frozenset(token for token in added if token in history and not token.isspace())
    encoder = TextEncoder(renderer.tokenizer, structural)
    tail = single.rpartition(REPLY)[2]  # all of it when the reply is not in there
    stop, position = _first_control(encoder, tail)
    if stop is None or tail[:position].strip():
        raise refusal(renderer, "puts a stop token right after a reply", f"it puts {tail[:40]!r}")
    call_stop, tool_style = _learn_calls(renderer, encoder, stop)
    stops = (stop,) if call_stop in (None, stop) else (stop, call_stop)
    return TemplateFacts(structural, stops, prompt.rstrip().endswith("<think>"), tool_style)


def _learn_calls(renderer: Renderer, encoder: TextEncoder, stop: int) -> tuple[int | None, ToolStyle]:
    """Tool calls may end with a token of their own (gpt-oss); many templates know no tools at all."""
    try:
        prompt = renderer.render([ASK], [TOOL], prompt=True)
        text = renderer.render([ASK, CALL], [TOOL], prompt=False)
    except ValueError:
        return None, "hermes"
    call = text.removeprefix(prompt)
    if call == text or CITY not in call:
        return None, "hermes"
    is_json = call.lstrip().startswith("{") and '"parameters"' in call
    tail = encoder.encode(call.rpartition(CITY)[2])
    call_stop = stop if stop in tail.tokens or not tail.controls else tail.tokens[tail.controls[0][0]]
    return call_stop, "json" if is_json else "hermes"


def _first_control(encoder: TextEncoder, text: str) -> tuple[int | None, int]:
    encoded = encoder.encode(text)
    if not encoded.controls:
        return None, len(text)
    index, position = encoded.controls[0]
    return encoded.tokens[index], position


def check(renderer: Renderer) -> None:
    """Raises UsageError that names the property which a fixed conversation does not hold."""
    system: list[Message] = [{"role": "system", "content": "Be brief."}]
    try:
        renderer.render([*system, ASK], None, prompt=True)
    except ValueError:  # Gemma: no system turns
        system = []
    thought = {"reasoning_content": "Two and two."} if renderer.facts.in_thinking else {}
    for number, text in enumerate(CHECKED_REPLIES):
        turns = [ASK, {"role": "assistant", "content": text, **thought}]
        _check_conversation(renderer, (system if number % 2 else []) + turns * (1 + number % 3))


def _check_conversation(renderer: Renderer, messages: Sequence[Message]) -> None:
    try:
        model_input, _ = renderer.build_supervised_examples(messages, "last")[0]
        prompt = renderer.build_generation_prompt(messages[:-1]).to_ints()
    except ValueError as error:
        raise refusal(renderer, "a reply continues its generation prompt", str(error)) from error
    tokens = model_input.to_ints()
    if tokens[: len(prompt)] != prompt:
        raise refusal(renderer, "a reply continues its generation prompt", f"not with {messages[-1]['content']!r}")
    if tokens != renderer.reference_tokens(messages):
        said = messages[-1]["content"]
        raise refusal(
            renderer, "equals apply_chat_template", f"prompt and reply share a token when the reply is {said!r}"
        )
