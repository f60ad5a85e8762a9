"""The real openai SDK against a real server: texts, logprobs, streams, checkpoints, errors."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the openai SDK is not installed (uv sync --group serving)")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
import openai

from cookbook.serving import keys
from cookbook.serving.openai_text import Deltas, Reply, Style, message_of
from cookbook.serving.server import Server
from core import ModelInput, SamplingParams
from tests.live_server import MODEL, serving
from tests.tiny import data, randomise, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
ASK: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "add", "description": "a + b", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>'


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    with serving(tmp_path_factory.mktemp("store"), samples=3, num_samples=8) as (url, server):
        yield url, server


@pytest.fixture(scope="module")
def client(live: tuple[str, Server]) -> openai.OpenAI:
    return client_of(live[0], "tml-anything")


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)


def saved(server: Server, name: str, owner: str, run: str = "training") -> str:
    """The URI of a sampler checkpoint of a client that goes on training, in the server's store."""
    trainer = server.service.create_lora_training_client(MODEL, 4, 1).result(30)
    trainer.training_run_id = run
    trainer.forward_backward(data([20]), "cross_entropy").result(30)
    randomise(trainer, 5)
    path = trainer.save_weights_for_sampler(name).result(30).path
    server.store.add_checkpoint(run, "sampler_weights", name, owner, None, None)
    trainer.close()
    return path


def test_a_completion_is_what_the_engine_samples(client: openai.OpenAI, live: tuple[str, Server]) -> None:
    sampler, prompt = live[1].base[MODEL], tiny_tokenizer().encode("Once upon")
    reply = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=24, seed=4, n=2, logprobs=3, temperature=0.8)
    params = SamplingParams(24, 4, list(sampler.end_tokens), 0.8)
    expected = sampler.sample(ModelInput.from_ints(prompt), 2, params).result(30).sequences
    sampled = 0
    for choice, sequence in zip(reply.choices, expected, strict=True):
        kept = [t for t in sequence.tokens if t not in sampler.end_tokens]
        sampled += len(sequence.tokens)
        assert choice.text == tiny_tokenizer().decode(kept, clean_up_tokenization_spaces=False)
        assert choice.finish_reason == sequence.stop_reason
        assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(sequence.logprobs[: len(kept)], abs=1e-5)
        assert len(choice.logprobs.top_logprobs) == len(kept)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), sampled)
    by_ids = client.completions.create(model=MODEL, prompt=[prompt, prompt[:4]], max_tokens=24, seed=4, temperature=0.8)
    assert [choice.index for choice in by_ids.choices] == [0, 1]
    assert by_ids.choices[0].text == reply.choices[0].text != by_ids.choices[1].text


@pytest.mark.parametrize("stop", [None, "e", ["zz", "o"]])
def test_a_stream_of_completions_joins_to_the_whole(client: openai.OpenAI, stop: str | list[str] | None) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "prompt": "ab",
        "max_tokens": 120,
        "seed": 1,
        "n": 2,
        "logprobs": 0,
        "stop": stop,
    }
    whole = client.completions.create(**options)
    parts = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert parts[-1].usage == whole.usage and not parts[-1].choices
    for choice in whole.choices:
        mine = [one for part in parts for one in part.choices if one.index == choice.index]
        assert "".join(one.text for one in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason and len(mine) > 1
        streamed = [value for one in mine if one.logprobs for value in one.logprobs.token_logprobs or []]
        assert choice.logprobs is not None
        assert streamed == pytest.approx(choice.logprobs.token_logprobs, abs=1e-5)  # other kernels where a prefix is known


def test_texts_and_tokens_stop_a_reply_and_are_no_part_of_it(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "ab", "temperature": 0, "max_tokens": 60}
    free = client.completions.create(**options).choices[0].text
    stop = next(free[i : i + 2] for i in range(3, len(free)) if free[i : i + 2].isascii() and len(free[i : i + 2]) == 2)
    by_text = client.completions.create(**options, stop=stop).choices[0]
    assert (by_text.text, by_text.finish_reason) == (free[: free.index(stop)], "stop")
    token = tiny_tokenizer().encode(stop[0])
    by_token = client.completions.create(**options, extra_body={"stop_token_ids": token}).choices[0]
    assert (by_token.text, by_token.finish_reason) == (free[: free.index(stop[0])], "stop")


def test_a_chat_is_rendered_sampled_and_streamed(client: openai.OpenAI, live: tuple[str, Server]) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": ASK,
        "max_completion_tokens": 40,
        "seed": 7,
        "n": 2,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**options, top_logprobs=2)
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    prompt = tiny_tokenizer().encode(rendered)
    assert whole.usage is not None and whole.usage.prompt_tokens == len(prompt)
    params = SamplingParams(40, 7, list(live[1].base[MODEL].end_tokens))
    expected = live[1].base[MODEL].sample(ModelInput.from_ints(prompt), 2, params).result(30).sequences
    parts = list(client.chat.completions.create(**options, stream=True))
    for choice, sequence in zip(whole.choices, expected, strict=True):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        logprobs = [one.logprob for one in choice.logprobs.content]
        assert logprobs == pytest.approx(sequence.logprobs[: len(logprobs)], abs=1e-5)
        assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)
        mine = [one for part in parts for one in part.choices if one.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert mine[-1].finish_reason == choice.finish_reason
        streamed = [one.logprob for part in mine if part.logprobs for one in part.logprobs.content or []]
        assert streamed == pytest.approx(logprobs, abs=1e-5)


def test_tools_and_their_results_are_told_to_the_model(client: openai.OpenAI) -> None:
    call = message_of(CALL, Style(False, "hermes"))
    turns = [*ASK, call, {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "3"}]
    offered: dict[str, Any] = {"tools": TOOLS}
    none: dict[str, Any] = {"tools": TOOLS, "tool_choice": "none"}
    sizes = []
    for messages, more in ((ASK, {}), (ASK, offered), (turns, offered), (turns, {}), (turns, none)):
        reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, **more)
        assert reply.usage is not None
        sizes.append(reply.usage.prompt_tokens)
    assert sizes[0] + 20 < sizes[1] < sizes[2] - 20
    assert sizes[3] == sizes[4] == sizes[2] - (sizes[1] - sizes[0])  # calls that were made are told without the tools


@pytest.mark.parametrize(
    ("text", "style", "content", "reasoning", "calls"),
    [
        (f"Sure.\n{CALL}", Style(False, "hermes"), "Sure.", None, 1),
        (f"{CALL}\n{CALL}", Style(False, "hermes"), None, None, 2),
        (f"<think>\nhm\n</think>\n\n{CALL}", Style(False, "hermes"), None, "hm", 1),
        ("hm\n</think>\n\nYes <b>", Style(True, None), "Yes <b>", "hm", 0),
        ("<think>\ncut off", Style(False, None), "", "cut off", 0),
        ('{"name": "add", "parameters": {"a": 1}}', Style(False, "json"), None, None, 1),
        ('{"neither": 1}', Style(False, "json"), '{"neither": 1}', None, 0),
        ("A <tool_call> that is none", Style(False, "hermes"), "A <tool_call> that is none", None, 0),
        (CALL, Style(False, None), CALL, None, 0),
    ],
)
def test_replies_become_messages_whole_and_in_parts(
    text: str, style: Style, content: str | None, reasoning: str | None, calls: int
) -> None:
    message = message_of(text, style)
    assert (message["content"], message.get("reasoning_content")) == (content, reasoning)
    made = message.get("tool_calls", [])
    assert len(made) == calls
    for call in made:
        assert call["id"].startswith("call_") and json.loads(call["function"]["arguments"])["a"] == 1
    deltas = Deltas(style)
    parts = [*(deltas.of(text[:end]) for end in range(len(text))), deltas.last(text)]
    assert "".join(part.get("content", "") for part in parts) == (content or "")
    assert "".join(part.get("reasoning_content", "") for part in parts) == (reasoning or "")
    assert [call["function"] for part in parts for call in part.get("tool_calls", [])] == [one["function"] for one in made]


def test_a_stop_that_is_only_begun_is_held_back_and_given_in_the_end() -> None:
    reply = Reply(lambda tokens: [chr(token) for token in tokens], ["END", "\n\n"], [0])
    seen = []
    for letter in "aE\nENx":
        reply.add(ord(letter), -1.0, None)
        seen.append(reply.text)
    assert seen == ["a", "a", "aE", "aE\n", "aE\n", "aE\nENx"]
    for letter in "EN":
        reply.add(ord(letter), -1.0, None)
    assert reply.text == "aE\nENx"
    reply.finish()
    assert reply.text == "aE\nENxEN" and not reply.stopped and len(reply.take()) == 8


def test_a_reader_that_leaves_frees_its_place(client: openai.OpenAI, live: tuple[str, Server]) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "ab", "max_tokens": 900, "seed": 3, "n": 4}
    with client.completions.create(**options, stream=True) as stream:
        next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(**options)
    deadline = time.monotonic() + 10
    while any(live[1].sampling.values()) or live[1].base[MODEL].engine.sampler.busy:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_checkpoint_of_a_run_is_a_model(client: openai.OpenAI, live: tuple[str, Server]) -> None:
    uri = saved(live[1], "one", keys.ANYONE)
    assert [model.id for model in client.models.list()] == [MODEL, uri]
    assert client.models.retrieve(uri).id == uri and client.models.retrieve(MODEL).owned_by == "cook"
    options: dict[str, Any] = {"prompt": "ab", "max_tokens": 8, "temperature": 0, "logprobs": 0}
    base, tuned = (client.completions.create(model=name, **options).choices[0] for name in (MODEL, uri))
    assert base.logprobs is not None and tuned.logprobs is not None
    assert tuned.logprobs.token_logprobs != pytest.approx(base.logprobs.token_logprobs, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 5000}, "messages", "the model's context is 1024"),
        ({"n": 9}, "n", "limits.num_samples"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support"),
        ({"response_format": {"type": "json_object"}}, "response_format", "does not support"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"stop": [""]}, "stop", "empty"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "text parts"),
        ({"messages": [*ASK, {"role": "zzz", "content": "a"}]}, "messages", r"messages\[2\]\.role is 'zzz', expected one of"),
        ({"tools": [*TOOLS, {}]}, "tools", r"tools\[1\] is '\{\}', expected"),
        ({"extra_body": {"max_tokns": 3}}, "max_tokns", "not permitted"),
        ({"model": "tinker://no/uri"}, "model", "not of the form"),
    ],
)
def test_wrong_parameters_are_named(client: openai.OpenAI, change: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        client.chat.completions.create(**{"model": MODEL, "messages": ASK, "max_tokens": 4, **change})
    assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")


def test_more_requests_than_the_limit_are_told_to_wait(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError, match=r"limits\.samples"):
        client.completions.create(model=MODEL, prompt=["a"] * 4, max_tokens=2)


def test_models_and_checkpoints_have_owners(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, server):
        alice, bob = (client_of(url, keys.create(server.store, name)) for name in ("alice", "bob"))
        uri = saved(server, "hers", "alice")
        assert [model.id for model in alice.models.list()] == [MODEL, uri]
        assert [model.id for model in bob.models.list()] == [MODEL]
        ask: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
        assert alice.completions.create(model=uri, **ask).model == uri
        for name in (uri, "gpt-9"):
            with pytest.raises(openai.NotFoundError) as missing:
                bob.completions.create(model=name, **ask)
            assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        key = alice.api_key
        for scheme, status in (("bearer", 200), ("BEARER", 200), ("Basic", 401)):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": f"{scheme} {key}"}).status_code == status
        with pytest.raises(openai.AuthenticationError, match="no valid API key") as refused:
            client_of(url, "tml-wrong").models.list()
        assert refused.value.code == "invalid_api_key"
