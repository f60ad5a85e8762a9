"""A language model as a reward: asks an OpenAI-compatible API how good a reply is, for a number from 0 to 1."""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cookbook.config import JudgeConfig
from cookbook.errors import UsageError

if TYPE_CHECKING:
    import httpx

PROMPT = """\
Judge a reply.

This was asked:
{prompt}

This is the reply:
{reply}

Say in a sentence or two what is right and what is wrong with the reply. Then end with a line `Score: x`, where x is a
number from 0 (worthless) to 1 (perfect)."""
BACKOFF_SECONDS = 0.5  # before the first retry; doubled each time
LONGEST_WAIT_SECONDS = 60.0  # also where the server asks for more (Retry-After)
_NUMBER = r"(-?\d+(?:\.\d+)?|-?\.\d+)(?:\s*/\s*(\d+(?:\.\d+)?))?"
_SCORE = re.compile(r"\bscore\b(?: is| of)?\W{0,8}?" + _NUMBER, re.IGNORECASE)
_ALONE = re.compile(_NUMBER + r"\s*\.?")


class JudgeError(ValueError):
    """This reply could not be judged; one line that says why."""


class Judge:
    """Questions for one model at one URL. UsageError when it is not told where, whom or with which key to ask."""

    def __init__(self, config: JudgeConfig) -> None:
        if config.url is None or config.model is None:
            missing = "judge.url" if config.url is None else "judge.model"
            raise UsageError(f"the reward `judge` wants {missing}: judge.url=http://localhost:8000/v1 judge.model=<its name>")
        if not config.url.startswith(("http://", "https://")):
            raise UsageError(f"judge.url={config.url}: expected an address as http://localhost:8000/v1")
        if config.in_flight < 1 or config.retries < 0 or config.timeout <= 0:
            raise UsageError("judge.in_flight must be at least 1, judge.retries at least 0, judge.timeout above 0 seconds")
        self.config = config
        self.url = config.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.template = _template(config.prompt)
        self.headers = {"Authorization": f"Bearer {key}"} if (key := _api_key(config.api_key_env)) else {}
        # connections and waiting belong to the event loop they were opened in, and a run may use several loops
        self._loops: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, asyncio.Semaphore]
        ] = weakref.WeakKeyDictionary()

    async def score(self, prompt: str, reply: str, columns: Mapping[str, object]) -> float:
        """From 0 to 1. JudgeError when there is no answer, or none with a score in it."""
        values = {**{name: str(value) for name, value in columns.items()}, "prompt": prompt, "reply": reply}
        question = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.template)
        return read_score(await self._ask(question))

    async def _ask(self, question: str) -> str:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.config.max_tokens,
            "temperature": 0,
        }
        client, free = self._connection()
        for attempt in range(self.config.retries + 1):
            async with free:
                answer, why, wait = await self._post(client, body)
            if answer is not None:
                return answer
            if wait is None or attempt == self.config.retries:
                break
            await asyncio.sleep(min(max(wait, BACKOFF_SECONDS * 2**attempt), LONGEST_WAIT_SECONDS))
        raise JudgeError(f"judge at {self.url}: {why}")

    def _connection(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        import httpx

        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            client = httpx.AsyncClient(timeout=self.config.timeout, headers=self.headers)
            self._loops[loop] = client, asyncio.Semaphore(self.config.in_flight)
        return self._loops[loop]

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, object]) -> tuple[str | None, str, float | None]:
        """(answer, "", None), or (None, why there is none, seconds the server asks to wait; None: trying again is vain)."""
        import httpx

        try:
            response = await client.post(self.url, json=body)
        except httpx.TimeoutException:
            return None, f"no answer within judge.timeout={self.config.timeout:g} seconds", 0.0
        except httpx.TransportError as error:
            return None, str(error) or type(error).__name__, 0.0
        if response.status_code != 200:
            why = f"{response.status_code} {response.reason_phrase}: {' '.join(response.text.split())[:200]}"
            again = response.status_code == 429 or response.status_code >= 500
            return None, why, _retry_after(response.headers.get("retry-after")) if again else None
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return None, f"not the answer of a chat API: {' '.join(response.text.split())[:200]}", None
        return (answer, "", None) if isinstance(answer, str) else (None, "an answer without text", None)


def read_score(answer: str) -> float:
    """The last `Score: x` of an answer, or the number that is all of it; 7/10 is 0.7. JudgeError outside of [0, 1]."""
    said = answer.rsplit("</think>", 1)[-1].strip()
    found = list(_SCORE.finditer(said))
    match = found[-1] if found else _ALONE.fullmatch(said)
    if match is None:
        raise JudgeError(f"judge: no score in its answer {_short(said)}; its prompt should ask for a line 'Score: x'")
    whole = float(match[2] or 1)
    score = float(match[1]) / whole if whole else -1.0
    if not 0 <= score <= 1:
        raise JudgeError(f"judge: score {match[0]!r} is not within 0 and 1; its prompt may ask for x/10 instead")
    return score


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What a judge reads of a prompt: the text of a single message, else all of them with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _template(prompt: str | None) -> str:
    if prompt is None:
        return PROMPT
    looks_like_file = "\n" not in prompt and len(prompt) < 1000
    if looks_like_file and Path(prompt).is_file():
        prompt = Path(prompt).read_text(encoding="utf-8")
    if "{reply}" not in prompt:
        seen = f"{_short(prompt)} is no file, and as a text it" if looks_like_file else "the text"
        raise UsageError(f"judge.prompt: {seen} does not say where the reply stands: {{reply}}")
    return prompt


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UsageError(f"judge.api_key_env={variable}: no such environment variable; export {variable}=...")
    return os.environ[variable]


def _retry_after(header: str | None) -> float:
    return float(header) if header and header.isdecimal() else 0.0


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else text[:77] + "...")
