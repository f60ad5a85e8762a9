"""Tinker's protocol: sessions, promises, training. (tinker_sampling.py: sampling; tinker_rest.py: listing, deleting.)"""

from __future__ import annotations

import json
import secrets
import time

from fastapi import APIRouter, Request, Response

from cookbook.serving import bodies, proto, wire_convert
from cookbook.serving.completions import group_of
from cookbook.serving.door import Owner, Serving, StrictRoute, body_digest, raw_body
from cookbook.serving.futures import HOLD_SECONDS
from cookbook.serving.refusal import Refusal
from cookbook.serving.server import Run, Sampler, Server
from cookbook.serving.store import checked_name
from core import AdamParams, ForwardBackwardOutput, Future, TrainingClient
from core.models import EMBEDDED, local_model

router = APIRouter(prefix="/api/v1", route_class=StrictRoute)
TTL_SECONDS = (3600, 10 * 366 * 86400)


# ---- configuration, sessions


@router.post("/client/config")
async def client_config(server: Serving, owner: Owner) -> dict:
    """Chunks come in order, and not compressed, which would take longer than sending them; zstd is accepted."""
    return {
        "parallel_fwdbwd_chunks": False, "proto_compress_fwdbwd": False,
        "sample_use_retrieve_futures": server.poll_together,
    }  # fmt: skip


@router.post("/client/dynamic_config")
async def dynamic_config(owner: Owner) -> dict:
    return {"sample_cancel_enabled": True}


@router.post("/create_session")
async def create_session(body: bodies.CreateSession, request: Request, server: Serving, owner: Owner) -> dict:
    """A retry of the same call, by its idempotency key, gets the same session."""
    key = request.headers.get("x-idempotency-key")
    if key is not None and (known := server.session_keys.get((owner, key))):
        return {"session_id": known}
    if (open_ones := server.num_sessions(owner)) >= server.limits.sessions:
        raise Refusal(429, f"{open_ones} sessions are open (limits.sessions): finish some")
    session_id, now = secrets.token_hex(8), time.time()
    metadata = json.dumps({"tags": body.tags, "user_metadata": body.user_metadata or {}, "project_id": body.project_id})
    server.store.run_sql(
        "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, NULL)", session_id, owner, now, now, body.display_name, metadata
    )
    if key is not None:
        server.session_keys[owner, key] = session_id
    return {"session_id": session_id}


@router.post("/session_heartbeat")
async def heartbeat(body: bodies.Heartbeat, server: Serving, owner: Owner) -> dict:
    server.session(body.session_id, owner)
    server.store.note_seen("sessions", body.session_id)
    return {"type": "session_heartbeat"}


@router.post("/sessions/{session_id}/finish")
async def finish(session_id: str, body: bodies.Finish, server: Serving, owner: Owner) -> dict:
    try:
        server.session(session_id, owner)
    except Refusal as refusal:
        if refusal.status != 410:  # to finish twice is no mistake
            raise
        return {}
    server.finish(session_id, str(body.reason.get("type", "success"))[:100])
    return {}


@router.post("/telemetry")
async def telemetry(owner: Owner) -> dict:
    """Accepted and forgotten: without an answer the client waits half a minute before it raises an error."""
    return {"status": "accepted"}


# ---- promises


@router.post("/retrieve_future")
async def retrieve_future(body: bodies.RetrieveFuture, server: Serving, owner: Owner) -> Response:
    return await server.promises.retrieve(body.request_id, owner)


@router.post("/retrieve_futures")
async def retrieve_futures(body: bodies.RetrieveFutures, server: Serving, owner: Owner) -> dict:
    """What has finished of all samples of one client; each is then fetched by retrieve_future."""
    target, promises = body.target, server.promises
    server.sampler(target.sampling_session_id, owner)
    group = group_of(target.sampling_session_id, target.cloned_sampler_id)
    promises.acknowledge(group, body.retrieved_request_ids, owner)
    hold = HOLD_SECONDS if body.timeout is None else min(body.timeout, HOLD_SECONDS)
    return await promises.completions.after(group, body.prev_cursor, hold)


@router.post("/cancel_future")
async def cancel_future(body: bodies.RetrieveFuture, server: Serving, owner: Owner) -> dict:
    server.promises.cancel(body.request_id, owner)
    return {}


# ---- training clients


@router.post("/create_model")
async def create_model(body: bodies.CreateModel, request: Request, server: Serving, owner: Owner) -> dict:
    session = server.session(body.session_id, owner)
    run_id = f"{session}:train:{body.model_seq_id}"
    _check_optimizer(body.optimizer_config)
    key, digest = f"{run_id}:open", await body_digest(request)
    if not server.promises.known(key):
        base_model, lora = server.check_model(body.base_model), body.lora_config
        if lora.rank > server.limits.rank:
            raise Refusal(400, f"lora_config.rank is {lora.rank}, expected at most {server.limits.rank} (limits.rank)")
        if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
            raise Refusal(400, "lora_config trains nothing: one of train_attn, train_mlp, train_unembed must be true")
        server.check_new_run(run_id, owner)
        seed = secrets.randbits(31) if lora.seed is None else lora.seed
        opening = server.service.create_lora_training_client(
            base_model, lora.rank, seed % 2**63, lora.train_mlp, lora.train_attn, lora.train_unembed
        )
        run = Run(run_id, session, owner, base_model, server.meter)
        server.add_run(run, {**lora.model_dump(), "seed": seed}, body.user_metadata, opening)
    return server.promises.begin(owner, key, digest, lambda _: _open(server, run_id, owner, "create_model"), model_id=run_id)


async def _open(server: Server, run_id: str, owner: str, kind: str) -> dict:
    try:
        await server.run(run_id, owner).opened()
    except BaseException:
        server.forget_run(run_id)
        raise
    return {"model_id": run_id, "type": kind}


@router.post("/get_info")
async def get_info(body: bodies.GetInfo, server: Serving, owner: Owner) -> dict:
    run = server.run(body.model_id, owner)
    trainer = await run.opened()
    info = trainer.get_info()
    return {
        "type": "get_info", "model_id": run.id, "is_lora": True, "lora_rank": trainer.adapter.config.rank,
        "model_name": run.base_model, "optimizer_config": {"type": "adamw"},
        "model_data": {"arch": info.model_type, "model_name": run.base_model, "tokenizer_id": tokenizer_id(run.base_model)},
    }  # fmt: skip


def tokenizer_id(base_model: str) -> str:
    """What AutoTokenizer takes in the client's process; for a model without hub id this works on the same machine alone."""
    return local_model(base_model) if base_model in EMBEDDED or base_model.endswith(".gguf") else base_model


@router.post("/forward_backward")
async def forward_backward(request: Request, server: Serving, owner: Owner) -> dict:
    body = await raw_body(request, server.limits.body_mb << 20)
    try:
        message = proto.parse("ForwardBackwardRequest", body)
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    if message.seq_id < 0:
        raise Refusal(400, f"seq_id is {message.seq_id}, expected 0 or more")

    num_tokens = 0

    def verb(trainer: TrainingClient) -> Future[ForwardBackwardOutput]:
        nonlocal num_tokens
        data = wire_convert.data(message, server.limits.body_mb)
        num_tokens = sum(one.model_input.length for one in data)
        begin = trainer.forward if message.forward_only else trainer.forward_backward
        return begin(data, message.loss_fn, wire_convert.loss_config(message))

    async def work(_: str) -> bytes:
        output = await run.submit("forward" if message.forward_only else "forward_backward", verb)
        if not message.forward_only:
            run.count_trained(num_tokens)
        return wire_convert.forward_backward_output(output)

    run = server.run(message.model_id, owner)
    _check_loss(message.loss_fn)
    return await _begin(request, server, run, message.seq_id, work, len(body))


def _check_loss(loss_fn: str) -> None:
    if loss_fn == "custom":
        raise Refusal(400, "loss_fn 'custom' would run a graph of yours here; forward_backward_custom runs it on your side")
    if loss_fn == "stable_reinforce":
        raise Refusal(400, "loss_fn 'stable_reinforce' is not supported by this server")


@router.post("/create_custom_loss")
async def create_custom_loss(owner: Owner) -> dict:
    raise Refusal(400, "this server runs no losses sent to it; forward_backward_custom runs yours on your side")


@router.post("/optim_step")
async def optim_step(body: bodies.OptimStep, request: Request, server: Serving, owner: Owner) -> dict:
    run = server.run(body.model_id, owner)
    if body.adam_params is None:
        _check_optimizer(body.optimizer_params or {})
        raise Refusal(400, "optim_step lacks adam_params")
    adam = AdamParams(**body.adam_params.model_dump())

    async def work(_: str) -> dict:
        output = await run.submit("optim_step", lambda trainer: trainer.optim_step(adam))
        return {"metrics": output.metrics, "type": "optim_step"}

    return await _begin(request, server, run, body.seq_id, work)


def _check_optimizer(config: dict | None) -> None:
    if config is not None and config.get("type", "adamw") != "adamw":
        raise Refusal(400, f"optimizer {config.get('type')!r} is not supported by this server, expected 'adamw'")


# ---- checkpoints


@router.post("/save_weights")
async def save_weights(body: bodies.SaveWeights, request: Request, server: Serving, owner: Owner) -> dict:
    return await _save(body, "weights", request, server, owner)


@router.post("/save_weights_external")
async def save_weights_external(body: bodies.SaveWeights, request: Request, server: Serving, owner: Owner) -> dict:
    if body.age_encryption_recipients:
        raise Refusal(400, "age_encryption_recipients: this server writes exports unencrypted only")
    return await _save(body, "external_weights", request, server, owner)


async def _save(body: bodies.SaveWeights, kind: str, request: Request, server: Server, owner: str) -> dict:
    """The rows of the index follow the rename of the files: what is acknowledged is whole and stays."""
    run, name, ttl = server.run(body.model_id, owner), checked_name(body.path), checked_ttl(body.ttl_seconds)
    server.store.remove_expired(run.id)  # their names are free again

    def verb(trainer: TrainingClient) -> Future:
        if kind == "weights":
            return trainer.save_state(name, body.overwrite)
        save = trainer.save_weights_external if kind == "external_weights" else trainer.save_weights_for_sampler
        return save(name, body.overwrite)

    async def work(request_id: str) -> dict:
        uri = (await run.submit("save", verb)).path
        server.store.add_checkpoint(run.id, kind, name, owner, ttl, body.user_metadata)
        result = {"path": uri, "type": request.url.path.rsplit("/", 1)[-1]}
        server.promises.remember_save(request_id, result)
        return result

    return await _begin(request, server, run, body.seq_id, work)


def checked_ttl(ttl: int | None) -> int | None:
    if ttl is not None and not TTL_SECONDS[0] <= ttl <= TTL_SECONDS[1]:
        raise Refusal(400, f"ttl_seconds is {ttl}, expected {TTL_SECONDS[0]} to {TTL_SECONDS[1]}")
    return ttl


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(body: bodies.SaveForSampler, request: Request, server: Serving, owner: Owner) -> dict:
    """Named: a checkpoint. Else a sampling session over the weights as they are at this point, which are not saved."""
    if body.path is not None:
        named = bodies.SaveWeights.model_validate(body.model_dump())
        return await _save(named, "sampler_weights", request, server, owner)
    run = server.run(body.model_id, owner)
    if body.sampling_session_seq_id is None:
        raise Refusal(400, "save_weights_for_sampler needs path or sampling_session_seq_id")
    sampler_id = f"{run.session}:sample:{body.sampling_session_seq_id}"

    async def work(_: str) -> dict:
        client = await run.submit("save", lambda trainer: trainer.save_weights_and_get_sampling_client())
        if run.closed:
            raise Refusal(410, f"session {run.session} ended before its sampler was there")
        sampler = Sampler(client, run.id)
        if body.kind == "inflight":
            run.inflight.add(sampler)
            for one in run.inflight:
                one.client = client
        server.keep_sampler(sampler_id, run.session, owner, run.base_model, "", sampler)
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

    return await _begin(request, server, run, body.seq_id, work)


@router.post("/load_weights")
async def load_weights(body: bodies.LoadWeights, request: Request, server: Serving, owner: Owner) -> dict:
    """Into a training client that is there, or (without model_id) as a new one."""
    _check_optimizer(body.optimizer_config)
    if body.model_id is None:
        return await _create_from(body, request, server, owner)
    run, checkpoint = server.run(body.model_id, owner), server.store.checkpoint(body.path, owner)
    directory = server.store.directory_of(checkpoint.run, checkpoint.kind, checkpoint.name)

    async def work(_: str) -> dict:
        await run.submit("load", lambda trainer: trainer.load_state(directory, body.optimizer))
        return {"model_id": run.id, "path": body.path, "type": "load_weights"}

    return await _begin(request, server, run, body.seq_id or 0, work)


async def _create_from(body: bodies.LoadWeights, request: Request, server: Server, owner: str) -> dict:
    if body.session_id is None or body.model_seq_id is None:
        raise Refusal(400, "load_weights needs model_id and seq_id, or session_id and model_seq_id")
    session = server.session(body.session_id, owner)
    run_id = f"{session}:train:{body.model_seq_id}"
    key, digest = f"{run_id}:open", await body_digest(request)
    if not server.promises.known(key):
        checkpoint = server.store.checkpoint(body.path, owner)
        base_model = server.base_model_of(checkpoint)
        server.check_new_run(run_id, owner)
        directory = server.store.directory_of(checkpoint.run, checkpoint.kind, checkpoint.name)
        if body.optimizer:
            opening = server.service.create_training_client_from_state_with_optimizer(directory)
        else:
            opening = server.service.create_training_client_from_state(directory, base_model)
        run = Run(run_id, session, owner, base_model, server.meter)
        server.add_run(run, server.lora_of(checkpoint), body.user_metadata, opening)
    return server.promises.begin(owner, key, digest, lambda _: _open(server, run_id, owner, "load_weights"), model_id=run_id)


async def _begin(request: Request, server: Server, run: Run, seq_id: int, work, unpacked: int = 0) -> dict:
    """Accept an operation of a training client once; a full queue asks the client to wait."""
    key = f"{run.id}:{seq_id}"
    digest, size = await body_digest(request), max(unpacked, len(await request.body()))
    if not server.promises.known(key) and key not in run.done:
        if server.promises.waiting_of(run.id) >= server.limits.queued:
            raise Refusal(429, f"{server.limits.queued} operations of {run.id} wait (limits.queued)")
        server.check_room(run.owner, size)
    server.store.note_seen("runs", run.id)
    return server.promises.begin(run.owner, key, digest, work, size, run.done, model_id=run.id)
