"""Tinker's protocol: sampling sessions and samples."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request

from cookbook.serving import bodies, wire_convert
from cookbook.serving.completions import CLONES, group_of
from cookbook.serving.door import Owner, Serving, StrictRoute, body_digest
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Server
from core import ModelInput, SampleResponse, SamplingClient, SamplingParams

router = APIRouter(prefix="/api/v1", route_class=StrictRoute)
Top = list[list[tuple[int, float]] | None]


@router.post("/create_sampling_session")
async def create_sampling_session(body: bodies.CreateSamplingSession, server: Serving, owner: Owner) -> dict:
    """Of a base model or a checkpoint; loaded before the answer, so that what is wrong is told here."""
    session = server.session(body.session_id, owner)
    sampler_id = f"{session}:sample:{body.sampling_session_seq_id}"
    known = server.store.row("SELECT base_model, path FROM samplers WHERE id = ?", sampler_id)
    if known is not None:  # a retry
        if known["path"] != body.model_path or known["base_model"] != (body.base_model or known["base_model"]):
            raise Refusal(400, f"sampling session {sampler_id} exists already, of {known['path'] or known['base_model']}")
        return {"sampling_session_id": sampler_id, "type": "create_sampling_session"}
    if body.model_path is not None:
        base_model = server.base_model_of(server.store.checkpoint(body.model_path, owner))
    elif body.base_model is not None:
        base_model = body.base_model
    else:
        raise Refusal(400, "create_sampling_session needs base_model or model_path")
    await server.add_sampler(sampler_id, session, owner, base_model, body.model_path)
    return {"sampling_session_id": sampler_id, "type": "create_sampling_session"}


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, server: Serving, owner: Owner) -> dict:
    sampler = server.sampler(sampler_id, owner)
    row = server.store.row("SELECT base_model, path FROM samplers WHERE id = ?", sampler_id)
    if row is None:  # of passing weights, made while the disk was full
        assert sampler is not None
        return {"sampler_id": sampler_id, "base_model": sampler.client.engine.base_model}
    about = {"sampler_id": sampler_id, "base_model": row["base_model"]}
    return {**about, "model_path": row["path"]} if row["path"] else about


@router.post("/join_sampling_session")
async def join_sampling_session(body: bodies.JoinSamplingSession, server: Serving, owner: Owner) -> dict:
    server.sampler(body.sampling_session_id, owner)
    server.joined[body.sampling_session_id] = counter = server.joined.get(body.sampling_session_id, 0) + 1
    return {"client_counter": counter, "type": "join_sampling_session"}


@router.post("/asample")
async def asample(body: bodies.Sample, request: Request, server: Serving, owner: Owner) -> dict:
    key, digest, size = f"{body.sampling_session_id}:{body.seq_id}", await body_digest(request), len(await request.body())
    if body.prompt_alt_tokens_k:
        raise Refusal(400, "prompt_alt_tokens_k is not supported by this server")
    if body.num_samples > server.limits.num_samples:
        raise Refusal(400, f"num_samples is {body.num_samples}, expected at most {server.limits.num_samples}")
    if not server.promises.known(key):
        if server.sampling.get(owner, 0) >= server.limits.samples:
            raise Refusal(429, f"{server.limits.samples} samples are in flight (limits.samples)")
        server.check_room(owner, size)
    sampler = server.sampler(body.sampling_session_id, owner)
    if sampler is None:
        sampler = await server.reopen(body.sampling_session_id, owner)

    async def work(_: str) -> bytes:
        server.sampling[owner] = server.sampling.get(owner, 0) + 1
        sampler.busy += 1
        try:
            return await _sample(server, owner, sampler.client, body)
        finally:
            server.sampling[owner] -= 1
            sampler.busy -= 1

    ids = [f"{key}:{i}" for i in range(body.num_samples)]
    group = group_of(body.sampling_session_id, body.seq_id // CLONES)
    return server.promises.begin(owner, key, digest, work, size, group=group, sample_sequence_ids=ids)


async def _sample(server: Server, owner: str, client: SamplingClient, body: bodies.Sample) -> bytes:
    prompt = wire_convert.prompt(body.prompt, client.engine.decoder.max_length)
    wants = body.prompt_logprobs or body.prompt_logprobs_last_n is not None
    params = sampling_params(client, body.sampling_params)
    targets, of = None, body.sampling_session_id
    if body.target_prompt_logprobs is not None:
        given = wire_convert.json_tensor(body.target_prompt_logprobs, "target_prompt_logprobs")
        with server.meter.operation("logprobs", owner, of) as operation:
            operation.future = asked = client.target_logprobs(prompt, given)
            targets = (await asked, body.target_prompt_logprobs)
    wire_convert.check_cells("topk_prompt_logprobs", body.topk_prompt_logprobs * prompt.length)
    with server.meter.operation("sample", owner, of) as operation:
        operation.future = sampling = client.sample(prompt, body.num_samples, params, wants, body.topk_prompt_logprobs)
        response = await sampling
    num_sampled = sum(len(sequence.tokens) for sequence in response.sequences)
    server.meter.count_sample(owner, client.engine.base_model, prompt.length, num_sampled)
    tops = None
    if body.topk_sample_logprobs:
        positions = sum(prompt.length + len(sequence.tokens) for sequence in response.sequences)
        wire_convert.check_cells("topk_sample_logprobs", body.topk_sample_logprobs * positions)
        tops = await top_of_samples(client, prompt, response, body.topk_sample_logprobs, params.temperature)
    return wire_convert.sample_response(
        response, body.prompt_logprobs_last_n, targets, tops, body.topk_sample_logprobs, body.topk_prompt_logprobs
    )


def sampling_params(client: SamplingClient, given: bodies.Sampling) -> SamplingParams:
    """A stop that is absent means the model's own ends; others come on top of them; an empty list means none at all."""
    stops = [given.stop] if isinstance(given.stop, str) else list(given.stop or [])
    if given.stop is None or stops:
        stops = [*stops, *client.end_tokens]
    seed = None if given.seed is None else given.seed % (2**63 - 1)
    return SamplingParams(given.max_tokens, seed, stops or None, given.temperature, given.top_k, given.top_p)  # type: ignore[arg-type]


async def top_of_samples(
    client: SamplingClient, prompt: ModelInput, response: SampleResponse, k: int, temperature: float
) -> list[Top]:
    """The likeliest tokens at each sampled position of each sequence, in a pass of their own."""
    start = prompt.length
    whole = [ModelInput.from_ints([*prompt.to_ints(), *sequence.tokens]) for sequence in response.sequences]
    tables = await asyncio.gather(*(client.top_logprobs(one, k, temperature or 1.0) for one in whole))
    return [table[start:] for table in tables]
