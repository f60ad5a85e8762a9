"""The four primitives as a recipe sees them: a service, training clients, futures. In process, always."""

from __future__ import annotations

import atexit
import json
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from core import checkpoints
from core.datum import AdamParams, Datum, ForwardBackwardOutput, LoraConfig, ModelInfo, OptimStepOutput, SaveOutput
from core.door import check_adam, check_config, check_custom, check_data, check_rank
from core.engine import Engine, Tenant
from core.futures import Future
from core.lora import Adapter
from core.machine import EngineOptions
from core.request import Call, CustomLoss, PassRequest
from core.sampling_client import SamplingClient

T = TypeVar("T")

_engines: dict[tuple, tuple[Engine, int]] = {}  # (base model, options, dtype, device) -> engine and its number of clients
_loads: dict[tuple, threading.Event] = {}  # bases being loaded; set when they are there, or could not be
_engines_lock = threading.RLock()  # re-entered when a collected client's finalizer runs in a thread that holds it


@atexit.register
def _stop_engines() -> None:
    """A thread inside torch while the interpreter is torn down aborts the process: wait for it."""
    for engine, _ in list(_engines.values()):
        engine.drop_queue()
    for thread in threading.enumerate():  # an engine whose last client has just left may still be ending
        if thread.name.startswith("engine "):
            thread.join()


def _acquire(base_model: str, options: EngineOptions) -> tuple[tuple, Engine]:
    key = (base_model, replace(options, dtype="", device=""), *options.resolve())  # auto and what it comes to are one
    while True:
        with _engines_lock:  # not held while loading, which others need not wait for
            if (found := _engines.get(key)) and found[0].alive:
                _engines[key] = (found[0], found[1] + 1)
                return key, found[0]
            if (loading := _loads.get(key)) is None:
                loaded = _loads[key] = threading.Event()
                break
        loading.wait()
    try:
        engine = Engine(base_model, options)
        with _engines_lock:
            _engines[key] = (engine, 1)
    finally:
        with _engines_lock:
            del _loads[key]
        loaded.set()
    return key, engine


def _release(key: tuple, engine: Engine, tenant: Tenant, adapter: Adapter | None) -> None:
    engine.leave(tenant, adapter)
    with _engines_lock:
        found, count = _engines.get(key, (None, 0))
        if found is not engine:  # it had ended, and another took its place
            return
        if count > 1:
            _engines[key] = (engine, count - 1)
            return
        del _engines[key]
    engine.stop()


class ServiceClient:
    """Where training clients come from. `store` is the directory of their checkpoints."""

    def __init__(self, store: str | Path = "checkpoints", options: EngineOptions | None = None) -> None:
        self.store = Path(store)
        self.options = options or EngineOptions()
        self._unique = secrets.token_hex(4)
        self._count = 0
        self._lock = threading.Lock()

    def create_lora_training_client(
        self, base_model: str, rank: int = 32, seed: int = 0,
        train_mlp: bool = True, train_attn: bool = True, train_unembed: bool = True,
    ) -> Future[TrainingClient]:  # fmt: skip
        """A new adapter, equal to the base model (B = 0). Loading the base happens in the background."""
        config = LoraConfig(rank, seed, train_unembed, train_mlp, train_attn)
        return self._in_background(lambda: TrainingClient(self, base_model, config))

    def create_training_client_from_state(self, path: str | Path, base_model: str | None = None) -> Future[TrainingClient]:
        """The weights of a checkpoint (URI or directory) with fresh moments."""
        return self._in_background(lambda: self._restore(path, base_model, with_optimizer=False))

    def create_training_client_from_state_with_optimizer(self, path: str | Path) -> Future[TrainingClient]:
        """A checkpoint as it was saved: weights, moments, step count and any accumulated gradient."""
        return self._in_background(lambda: self._restore(path, None, with_optimizer=True))

    def create_sampling_client(
        self, model_path: str | Path | None = None, base_model: str | None = None
    ) -> Future[SamplingClient]:
        """The base model, or a saved adapter (URI or directory)."""
        if model_path is None and base_model is None:
            raise ValueError("create_sampling_client needs model_path or base_model")
        return self._in_background(lambda: self._sampling_client(model_path, base_model))

    def _sampling_client(self, path: str | Path | None, base_model: str | None) -> SamplingClient:
        if path is not None:
            trainer = self._restore(path, base_model, with_optimizer=False)
            try:
                return trainer.save_weights_and_get_sampling_client().result()
            finally:
                trainer.close()
        assert base_model is not None
        key, engine = _acquire(base_model, self.options)
        tenant = engine.join()
        return SamplingClient(engine, engine.base, tenant, partial(_release, key, engine, tenant, None))

    def _restore(self, path: str | Path, base_model: str | None, with_optimizer: bool) -> TrainingClient:
        directory = checkpoints.resolve(path, self.store)
        config = checkpoints.read_lora_config(directory)
        client = TrainingClient(self, base_model or checkpoints.read_base_model(directory), config)
        try:
            checkpoints.load(client.adapter, directory, client.engine.base_model, client.engine.fingerprint, with_optimizer)
        except BaseException:
            client.close()
            raise
        return client

    def _in_background(self, make: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        threading.Thread(target=future.resolve, args=(make,), daemon=True).start()
        return future

    def new_training_run_id(self) -> str:
        with self._lock:
            self._count += 1
            return f"{self._unique}:train:{self._count - 1}"


class TrainingClient:
    """One adapter. Verbs are submitted at once, run in order, and return futures; bad requests raise ValueError here."""

    def __init__(self, service: ServiceClient, base_model: str, config: LoraConfig) -> None:
        key, self.engine = _acquire(base_model, service.options)
        self.tenant = self.engine.join()
        try:
            geometry = self.engine.geometry(config)
            check_rank(config.rank, geometry)
            self.adapter = self.tenant.adapter = Adapter(config, geometry, self.engine.device)
        except BaseException:
            _release(key, self.engine, self.tenant, None)
            raise
        self.store, self.options = service.store, service.options
        self.training_run_id = service.new_training_run_id()
        self._finalizer = weakref.finalize(self, _release, key, self.engine, self.tenant, self.adapter)
        self._finalizer.atexit = False  # at exit _stop_engines must still find the engine, to wait for its thread

    def get_info(self) -> ModelInfo:
        engine, decoder = self.engine, self.engine.decoder
        return ModelInfo(
            base_model=engine.base_model,
            model_type=decoder.model.config.model_type,
            hidden_size=decoder.embedding.shape[1],
            vocab_size=decoder.vocab_size,
            max_length=decoder.max_length,
            num_parameters=decoder.num_parameters,
            dtype=str(engine.dtype).removeprefix("torch."),
            device=str(engine.device),
            token_budget=engine.token_budget,
        )

    def close(self) -> None:
        """Leave the engine; the last client frees the base model."""
        self._finalizer()

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        logprobs: str = "all",
    ) -> Future[ForwardBackwardOutput]:
        """Add the gradient of the summed loss over `data`; nothing moves until optim_step.

        logprobs="weighted" skips the head at positions of weight 0 (and mask 0, for gspo) and returns 0.0 there.
        """
        return self._pass(data, loss_fn, loss_fn_config, logprobs, train=True)

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
        logprobs: str = "all",
    ) -> Future[ForwardBackwardOutput]:
        """The same numbers without a gradient."""
        return self._pass(data, loss_fn, loss_fn_config, logprobs, train=False)

    def forward_backward_custom(
        self, data: Sequence[Datum], fn: CustomLoss, logprobs: Literal["all", "weighted"] = "all"
    ) -> Future[ForwardBackwardOutput]:
        """`fn(data, logprobs)` -> (scalar loss, metrics), logprobs one tensor per datum of target_tokens' shape.

        Exact: fn sees the logprobs of all data, whatever micro-batches they were computed in; data that fit one take one
        forward and one backward, others two forwards. `logprobs="weighted"`: as in forward_backward, 0.0 at positions
        whose `weights` are 0 (what fn does with these has no gradient); weights have no other meaning here.
        """
        weighted = _only_weighted(logprobs)
        checked = check_custom(data, self.engine.decoder.vocab_size, self.engine.decoder.max_length, weighted)
        request = PassRequest(self.adapter, checked, "cross_entropy", {}, True, weighted, Future(), fn, list(data))
        self.engine.submit(self.tenant, request)
        return request.future

    def _pass(self, data, loss_fn: str, loss_fn_config, logprobs: str, train: bool) -> Future[ForwardBackwardOutput]:
        weighted = _only_weighted(logprobs)
        config = check_config(loss_fn, loss_fn_config)
        checked = check_data(data, loss_fn, self.engine.decoder.vocab_size, self.engine.decoder.max_length)
        request = PassRequest(self.adapter, checked, loss_fn, config, train, weighted, Future())
        self.engine.submit(self.tenant, request)
        return request.future

    def optim_step(self, adam: AdamParams) -> Future[OptimStepOutput]:
        """AdamW on the accumulated gradient, which is then cleared. ValueError (future) without one."""
        check_adam(adam)

        def step() -> OptimStepOutput:
            if not self.adapter.has_grad:
                raise ValueError("optim_step without a gradient: call forward_backward first")
            return OptimStepOutput(self.adapter.optim_step(adam))

        return self._call(step)

    def save_state(self, name: str, overwrite: bool = False) -> Future[SaveOutput]:
        """Weights, moments and any accumulated gradient as tinker://<training_run_id>/weights/<name>."""
        return self._save("weights", name, overwrite, with_optimizer=True)

    def _save(self, kind: str, name: str, overwrite: bool, with_optimizer: bool) -> Future[SaveOutput]:
        checkpoints.check_name(name)
        target = self.store / self.training_run_id / kind / name

        def save() -> SaveOutput:
            if target.exists() and not overwrite:
                raise ValueError(
                    f"checkpoint '{name}' of {self.training_run_id} exists already; choose another name or overwrite=True"
                )
            self._describe()
            checkpoints.save(self.adapter, target, self.engine.base_model, self.engine.fingerprint, with_optimizer)
            return SaveOutput(f"tinker://{self.training_run_id}/{kind}/{name}", str(target))

        return self._call(save)

    def save_weights_for_sampler(self, name: str, overwrite: bool = False) -> Future[SaveOutput]:
        """The weights alone as tinker://<training_run_id>/sampler_weights/<name>, for create_sampling_client."""
        return self._save("sampler_weights", name, overwrite, with_optimizer=False)

    def save_weights_external(self, name: str, overwrite: bool = False) -> Future[SaveOutput]:
        """An export as tinker://<training_run_id>/external_weights/<name>: PEFT's two files and what they were made of."""
        return self._save("external_weights", name, overwrite, with_optimizer=False)

    def save_weights_and_get_sampling_client(self) -> Future[SamplingClient]:
        """A client that samples from the weights as they are after the verbs submitted so far. Nothing is copied."""
        if self.tenant.left:
            raise RuntimeError("this client is closed")
        key, engine = _acquire(self.engine.base_model, self.options)  # here: the engine's thread must not wait for a load
        tenant = engine.join()
        release = partial(_release, key, engine, tenant, None)
        try:
            return self._call(lambda: SamplingClient(engine, self.adapter.snapshot(), tenant, release))
        except BaseException:
            release()
            raise

    def load_state(self, path: str | Path, with_optimizer: bool = False) -> Future[None]:
        """Replace this adapter's weights by a checkpoint of the same geometry; moments are its own or, if not asked, fresh."""
        directory = checkpoints.resolve(path, self.store)
        theirs = checkpoints.read_lora_config(directory)
        ours = self.adapter.config
        if replace(theirs, seed=0) != replace(ours, seed=0):
            raise ValueError(f"checkpoint {directory} holds {theirs}, this client has {ours}")
        return self._call(
            lambda: checkpoints.load(self.adapter, directory, self.engine.base_model, self.engine.fingerprint, with_optimizer)
        )

    def _describe(self) -> None:
        run_file = self.store / self.training_run_id / "run.json"
        if not run_file.exists():
            run_file.parent.mkdir(parents=True, exist_ok=True)
            about = {"training_run_id": self.training_run_id, "base_model": self.engine.base_model}
            run_file.write_text(json.dumps({**about, "lora": asdict(self.adapter.config)}, indent=2))

    def _call(self, work) -> Future:
        call = Call(work, Future())
        self.engine.submit(self.tenant, call)
        return call.future


def _only_weighted(logprobs: str) -> bool:
    if logprobs not in ("all", "weighted"):
        raise ValueError(f"logprobs={logprobs!r}, expected 'all' or 'weighted'")
    return logprobs == "weighted"
