"""A trained policy as a model of inspect-ai, whose tasks then run against it in this process (extra `inspect`)."""

# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.errors import UsageError
from cookbook.estimates import Item
from cookbook.keys import did_you_mean
from cookbook.past_policy import PastPolicy
from cookbook.tool_prompt import knows_tools, with_tools_as_text
from core import SampleResponse, SamplingParams
from envs.env import Message

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog
    from inspect_ai.model import ChatMessage, GenerateConfig, Model, ModelOutput
    from inspect_ai.tool import ToolInfo

STOP_REASONS = {"stop": "stop", "length": "max_tokens", "malformed": "stop"}
NEEDED = "cook eval --inspect needs inspect-ai: uv sync --extra inspect"


def run_task(
    task: str, policy: PastPolicy, log_dir: Path, *, limit: int | None, samples: int, params: SamplingParams
) -> EvalLog:
    """The log of `file.py@task` (or of an installed task's name) with `samples` epochs. UsageError when it cannot run."""
    try:
        from inspect_ai import eval as inspect_eval
    except ImportError as error:
        raise UsageError(NEEDED) from error
    from inspect_ai._util.error import PrerequisiteError

    task = _one_task(task)
    try:
        logs = inspect_eval(
            task, model=as_model(policy, params), limit=limit, epochs=samples, log_dir=str(log_dir), display="none",
            fail_on_error=False, max_connections=256, log_level="warning",
        )  # fmt: skip
    except (PrerequisiteError, LookupError, ValueError) as error:
        raise UsageError(f"--inspect {task}: {' '.join(str(error).split())}") from error
    if not logs:
        raise UsageError(f"--inspect {task}: there is no task in it")
    log = logs[0]
    if log.status != "success":
        said = (log.error.message if log.error else log.status) or log.status
        raise UsageError(f"--inspect {task}: {' '.join(said.split())}; its log is {log.location}")
    return log


def _one_task(task: str) -> str:
    """A file with one task in it needs no @name; inspect itself would run them all."""
    file, _, name = task.partition("@")
    if not file.endswith(".py"):
        return task
    if not Path(file).is_file():
        raise UsageError(f"--inspect {task}: no such file {file}")
    from inspect_ai import list_tasks

    known = [info.name for info in list_tasks(os.path.relpath(file))]  # inspect's patterns are relative ones
    if name not in known and (name or len(known) != 1):
        there = ", ".join(f"{file}@{one}" for one in known) or "none"
        raise UsageError(f"--inspect {task}: name one of its tasks{did_you_mean(name, known) if name else ''}: {there}")
    return f"{file}@{name or known[0]}"


def scores_of(log: EvalLog) -> dict[str, list[Item]]:
    """Per scorer an item for each sample, in the task's order, the mean of its attempts; one that failed counts as 0."""
    from inspect_ai.scorer import value_to_float

    as_float = value_to_float()
    samples = log.samples or []
    names = list(dict.fromkeys(name for sample in samples for name in sample.scores or {}))
    ids = list(dict.fromkeys(sample.id for sample in samples))
    items: dict[str, list[Item]] = {}
    for name in names:
        found: dict[int | str, list[float]] = {one: [] for one in ids}
        for sample in samples:
            score = (sample.scores or {}).get(name)
            found[sample.id].append(as_float(score.value) if score is not None else 0.0)
        items[name] = [(sum(values) / len(values), 1.0) for values in found.values()]
    return items


def as_model(policy: PastPolicy, params: SamplingParams) -> Model:
    """For `inspect_ai.eval(..., model=...)`. A task's own settings of sampling go before `params`."""
    from inspect_ai.model import ModelAPI, get_model, modelapi

    @modelapi(name="cook")
    class Cook(ModelAPI):
        async def generate(self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: Any, config: GenerateConfig):
            return await _generate(policy, params, input, [] if tool_choice == "none" else tools, config)

        def max_tokens(self) -> int | None:
            return params.max_tokens

    return get_model(f"cook/{policy.name}", memoize=False)


async def _generate(
    policy: PastPolicy, params: SamplingParams, input: Sequence[ChatMessage], tools: Sequence[ToolInfo], config: GenerateConfig
) -> ModelOutput:
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage

    renderer = policy.renderer
    messages, schemas = [_message(one) for one in input], [_schema(tool) for tool in tools]
    if schemas and not knows_tools(renderer):
        messages, schemas = with_tools_as_text(messages, schemas), []
    prompt = renderer.build_generation_prompt(messages, schemas or None)
    room = policy.context - prompt.length
    if room < 1:
        return ModelOutput.from_content(policy.model.name, "", stop_reason="model_length")
    wanted = _params(config, params, room, renderer.stop)
    response: SampleResponse = await policy.sampler.sample(prompt, config.num_choices or 1, wanted)
    numbers = itertools.count()
    choices = []
    for sequence in response.sequences:
        message, ended = renderer.parse_response(sequence.tokens)
        text = _cut(str(message.get("content") or ""), config.stop_seqs or ())
        calls = [_call(f"call_{next(numbers)}", call) for call in message.get("tool_calls") or ()] if tools else []
        reply = ChatMessageAssistant(content=text, model=policy.model.name, source="generate", tool_calls=calls or None)
        reason = "tool_calls" if calls else STOP_REASONS[ended]
        choices.append(ChatCompletionChoice(message=reply, stop_reason=reason))  # pyright: ignore[reportArgumentType]
    made = sum(len(sequence.tokens) for sequence in response.sequences)
    usage = ModelUsage(input_tokens=prompt.length, output_tokens=made, total_tokens=prompt.length + made)
    return ModelOutput(model=policy.model.name, choices=choices, usage=usage)


def _params(config: GenerateConfig, params: SamplingParams, room: int, stop: Sequence[int]) -> SamplingParams:
    return SamplingParams(
        max_tokens=min(room, config.max_tokens or params.max_tokens or room),
        temperature=params.temperature if config.temperature is None else config.temperature,
        top_p=1.0 if config.top_p is None else config.top_p, top_k=-1 if config.top_k is None else config.top_k,
        seed=config.seed, stop=[*stop, *(config.stop_seqs or ())],
    )  # fmt: skip


def _cut(text: str, stops: Sequence[str]) -> str:
    """Without the string at which a task wanted the reply to end, as other providers give it."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _message(message: ChatMessage) -> Message:
    found: Message = {"role": message.role, "content": message.text}
    if message.role == "assistant" and message.tool_calls:
        functions = [{"name": call.function, "arguments": call.arguments} for call in message.tool_calls]
        found["tool_calls"] = [{"type": "function", "function": function} for function in functions]
    if message.role == "tool" and message.function:
        found["name"] = message.function
    if message.role == "tool" and message.error is not None:
        found["content"] = f"error: {message.error.message}"
    return found


def _schema(tool: ToolInfo) -> dict[str, Any]:
    parameters = tool.parameters.model_dump(exclude_none=True)
    return {"type": "function", "function": {"name": tool.name, "description": tool.description, "parameters": parameters}}


def _call(name: str, call: Mapping[str, Any]) -> Any:
    from inspect_ai.tool import ToolCall

    function = call["function"]
    return ToolCall(id=name, function=function["name"], arguments=dict(function["arguments"]))
