"""`cook chat`: a conversation with a trained policy, shown as it is written; tools run, the base model answers beside it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cookbook import event_loop
from cookbook.env_drive import seats, settled
from cookbook.environments import problem_stream
from cookbook.errors import UsageError
from cookbook.served_policy import Speaker, open_speaker
from cookbook.tool_calls import Calls, answer, read_reply
from cookbook.tool_prompt import told_of_tools
from core import ModelInput, SamplingParams
from envs.env import Env, Message

if TYPE_CHECKING:
    from rich.console import Console

MOST_CALLS = 8  # of tools, for one message of the person
HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops a reply; a line that ends in \\ goes on"


@dataclass
class Chat:
    """One conversation with one policy. `show` gets the pieces of text as they come."""

    policy: Speaker
    params: SamplingParams  # max_tokens bounds each reply
    opening: list[Message] = field(default_factory=list)  # the system message, if any
    tools: Sequence[Callable[..., Any]] = ()

    def __post_init__(self) -> None:
        self._opening, self._schemas = self.opening, None
        if self.tools:
            self._opening, self._schemas = told_of_tools(self.opening, self.tools, self.policy.renderer)
        self.reset()

    def reset(self) -> None:
        self.messages = list(self._opening)  # replies carry their tokens, which the renderer splices

    def say(self, text: str, show: Callable[[str], None]) -> None:
        """The replies to a message of the person, tools called on the way. What Ctrl-C cuts short stays in the conversation."""
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            for _ in range(MOST_CALLS + 1):
                calls = self._reply(show)
                if calls is None:
                    return
                for call in calls:
                    result, _ = event_loop.submit(answer(self.tools, call)).result()
                    self.messages.append(result)
                    name = f"{call['function']['name']}: " if call else ""
                    show(f"\n  [{name}{result['content']}]\n")
            show(f"\n  [no more than {MOST_CALLS} rounds of tool calls for one message]")
        except UsageError:
            del self.messages[before:]
            raise

    def _reply(self, show: Callable[[str], None]) -> Calls:
        renderer, tokens = self.policy.renderer, list[int]()
        prompt = self._prompt()
        room = self.policy.context - prompt.length
        if room < 1:
            raise UsageError(f"the conversation fills the context of {self.policy.context} tokens: /reset forgets it")
        params = replace(self.params, max_tokens=min(room, self.params.max_tokens or room))
        try:
            with self.policy.sampler.stream(prompt, 1, params) as stream:
                for piece in renderer.texts_of.pieces(self._kept(stream, tokens)):
                    show(piece)
        except (ValueError, FloatingPointError) as error:  # no room for keys and values; a diverged adapter
            raise UsageError(" ".join(str(error).split())) from error
        finally:
            reply = read_reply(renderer, tokens, bool(self.tools))
            self.messages.append(reply.in_conversation(tokens, bool(self.tools) and self._schemas is None))
        if reply.ended == "length":
            show(f" [cut at {len(tokens)} tokens]")
        return reply.calls

    def _kept(self, stream: Any, tokens: list[int]) -> Iterator[int]:
        """The tokens to show; all of them end up in `tokens`."""
        for found in stream:
            tokens.append(found.token)
            if found.token not in self.policy.renderer.stop:
                yield found.token

    def _prompt(self) -> ModelInput:
        try:
            return self.policy.renderer.build_generation_prompt(self.messages, self._schemas)
        except ValueError as error:
            raise UsageError(f"{' '.join(str(error).split())}: /reset begins anew") from error


def chat(
    target: str, checkpoint: str, base: bool, system: str | None, temperature: float, max_tokens: int, console: Console
) -> None:
    """Read messages from the terminal until its end."""
    if max_tokens < 1 or not 0 <= temperature < float("inf"):
        raise UsageError(f"--max-tokens {max_tokens}, --temperature {temperature:g}: expected at least 1 and at least 0")
    policy = open_speaker(target, checkpoint, console)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=policy.renderer.stop)
    with opened_env(policy, console) as (env, first):
        opening: list[Message] = [{"role": "system", "content": system}] if system else first
        tools = env.tools if env else ()
        chats = [Chat(policy, params, opening, tools)]
        if base:
            chats.append(Chat(policy.base(), params, opening, tools))
        console.print(f"{policy.name}, {policy.model.name}", style="bold", markup=False, highlight=False)
        if tools:
            console.print(f"tools: {', '.join(tool.__name__ for tool in tools)}", style="dim", markup=False, highlight=False)
        console.print(HELP, style="dim", markup=False, highlight=False)
        converse(chats, console)


def converse(chats: Sequence[Chat], console: Console) -> None:
    names = ["", *("base" for _ in chats[1:])] if len(chats) == 1 else ["trained", "base"]
    while (text := read_message(console)) is not None:
        if text == "/reset":
            for one in chats:
                one.reset()
            console.print("forgotten", style="dim")
        elif text in ("/quit", "/exit"):
            return
        elif text.startswith("/"):
            console.print(HELP, style="dim", markup=False, highlight=False)
        elif text.strip():
            for one, name in zip(chats, names, strict=True):
                _show_reply(one, name, text, console)


def _show_reply(one: Chat, name: str, text: str, console: Console) -> None:
    if name:
        console.print(f"{name}:", style="bold cyan" if name != "base" else "bold yellow", highlight=False)
    try:
        one.say(text, write)
    except KeyboardInterrupt:
        write(" [stopped]")
    except UsageError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
    write("\n")


def write(piece: str) -> None:
    """At once, and without what would steer the terminal."""
    sys.stdout.write("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in piece))
    sys.stdout.flush()


def read_message(console: Console) -> str | None:
    """What the person typed; None: they leave."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrows and history
    while True:
        try:
            text = input("> ")
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input(". ")
            return text
        except EOFError:
            console.print()
            return None
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D leaves", style="dim", highlight=False)


@contextlib.contextmanager
def opened_env(policy: Speaker, console: Console) -> Iterator[tuple[Env | None, list[Message]]]:
    """An env of the run whose tools are used, and the system message that it begins with; (None, []) without tools."""
    section = policy.run.config.get("env") if policy.run else None
    if not isinstance(section, dict) or not section.get("name"):
        yield None, []
        return
    try:
        env = seats(next(problem_stream(section, "eval", seed=0)))[0]
        messages = event_loop.submit(settled(env.reset)).result()
    except Exception as error:  # whatever an env may raise: one can talk without its tools
        said = " ".join(str(error).split())
        console.print(f"without the tools of env={section['name']}: {said}", style="yellow", markup=False, highlight=False)
        yield None, []
        return
    try:
        first = [message for message in messages[:1] if message["role"] == "system"]
        yield (env, first) if env.tools else (None, first)
    finally:
        event_loop.submit(settled(env.close)).result()
