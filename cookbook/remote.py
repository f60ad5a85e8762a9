"""Training and sampling on a Tinker server: the verbs that recipes use of the engine's clients, through the tinker SDK.

The tokenizer, the chat template and the model's configuration are read on this machine; its weights are the server's.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tinker
import torch

from cookbook import records
from cookbook.errors import UsageError
from cookbook.remote_server import PATIENCE_SECONDS, Refused, Server, Watch
from cookbook.remote_wire import (
    from_metrics,
    from_output,
    from_samples,
    to_adam,
    to_datum,
    to_input,
    to_params,
    weighted,
)
from core import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    Future,
    ModelInfo,
    ModelInput,
    OptimStepOutput,
    SampleResponse,
    SamplingParams,
    SaveOutput,
    StreamedToken,
)

if TYPE_CHECKING:
    from core.request import CustomLoss

A = TypeVar("A")
T = TypeVar("T")

TOKEN_BUDGET = 32_768  # tokens that a recipe puts into one custom loss; the server cuts its own micro-batches
FIRST_PART, MOST_PART = 8, 64  # tokens of a reply that is shown as it comes
_parting: set[concurrent.futures.Future[None]] = set()


@atexit.register
def _wait_for_parting() -> None:
    """What is said to the server last, so that it tidies up, is said before the process ends."""
    concurrent.futures.wait(_parting, timeout=3)


def _in_parting(theirs: tinker.APIFuture[None]) -> None:
    future = theirs.future()
    _parting.add(future)
    future.add_done_callback(_parting.discard)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # where it fails nothing else is wrong


def _finish(client: tinker.ServiceClient) -> None:
    """End the session: the server lets its training clients go."""
    with contextlib.suppress(RuntimeError):  # the SDK's loop has ended before us
        _in_parting(client.close("success"))


class RemoteService:
    """Where training clients come from: one session on a server. UsageError when it is away or refuses the key."""

    def __init__(self, server: Server, token_budget: int | None = None, patience: float = PATIENCE_SECONDS) -> None:
        os.environ.setdefault("TINKER_TELEMETRY", "0")  # nothing leaves this machine unless asked
        self.server, self.token_budget = server, token_budget or TOKEN_BUDGET
        self.watch = Watch(server, patience)
        server.knock()
        self._rest, self.contexts = self._greet()
        self._infos: dict[str, ModelInfo] = {}
        self._trained_here: set[str] = set()
        self._client = tinker.ServiceClient(base_url=server.url, api_key=server.key)
        self._finalizer = weakref.finalize(self, _finish, self._client)

    def _greet(self) -> tuple[tinker.RestClient, dict[str, int | None]]:
        """The server's models with their contexts, in tokens where it tells."""
        with self.translated():
            rest = tinker.RestClient(base_url=self.server.url, api_key=self.server.key)
            supported = rest.get_server_capabilities().result().supported_models
        return rest, {model.model_name: model.max_context_length for model in supported if model.model_name}

    def close(self) -> None:
        """End the session; it ends by itself when nobody refers to this any more."""
        self._finalizer()

    def create_lora_training_client(
        self, base_model: str, rank: int = 32, seed: int = 0,
        train_mlp: bool = True, train_attn: bool = True, train_unembed: bool = True,
    ) -> Future[RemoteTrainer]:  # fmt: skip
        """A new adapter on one of the server's models. UsageError for a model that it does not have."""
        self._check_model(base_model)
        return self._opening(
            lambda: self._client.create_lora_training_client(
                base_model, rank=rank, seed=seed, train_mlp=train_mlp, train_attn=train_attn, train_unembed=train_unembed
            )
        )

    def create_training_client_from_state(self, path: str | Path, base_model: str | None = None) -> Future[RemoteTrainer]:
        """The weights of a checkpoint on the server, with fresh moments."""
        return self._opening(lambda: self._client.create_training_client_from_state(str(path)))

    def create_training_client_from_state_with_optimizer(self, path: str | Path) -> Future[RemoteTrainer]:
        """All of a checkpoint on the server. ValueError (future) for one that it does not have or cannot load."""
        future = Future[RemoteTrainer]()
        opening = self._opening(lambda: self._client.create_training_client_from_state_with_optimizer(str(path)))

        def work() -> RemoteTrainer:
            try:
                return opening.result()
            except Refused as error:
                raise ValueError(str(error)) from error

        opening.add_done_callback(lambda: future.resolve(work))
        return future

    def create_sampling_client(self, path: str | None, base_model: str) -> Future[RemoteSampler]:
        """Of a checkpoint on the server, or (None) of one of its models."""
        self._check_model(base_model)
        theirs = self._client.create_sampling_client(model_path=path, base_model=None if path else base_model)
        return self.bridge(theirs, lambda client: RemoteSampler(self, client))

    def _opening(self, begin: Callable[[], Any]) -> Future[RemoteTrainer]:
        """In a thread of its own: the session is made on first use, which takes a few round trips."""
        future = Future[RemoteTrainer]()

        def work() -> None:
            try:
                trainer = RemoteTrainer(self, begin().result())
                self._trained_here.add(trainer.training_run_id)
            except BaseException as error:
                future.set_exception(self.server.meaning(error))
            else:
                future.set_result(trainer)

        threading.Thread(target=work, daemon=True).start()
        self.watch.add(future)
        return future

    def _check_model(self, base_model: str) -> None:
        if base_model not in self.contexts:
            there = ", ".join(sorted(self.contexts)) or "none"
            raise UsageError(f"model.name={base_model} is not served by {self.server.service}, which has: {there}")

    def start_of(self, init_from: str) -> str:
        """The URI that `init_from` means to the server: itself, or the newest checkpoint of a run that was trained there."""
        if init_from.startswith("tinker://"):
            return init_from
        directory = next((d for d in (Path(init_from).expanduser(), Path("runs") / init_from) if d.is_dir()), None)
        if directory is None:
            raise UsageError(f"init_from={init_from}: no such directory, and no such run under ./runs")
        rows = records.read_rows(directory / "checkpoints.jsonl")
        if not rows or rows[-1].get("path") is not None:
            raise UsageError(
                f"init_from={init_from} lies on this machine, and {self.server.service} takes no weights from outside:"
                " start from a run that was trained there or a tinker:// URI, or train with service=local"
            )
        return str(rows[-1]["uri"])

    def delete_checkpoint(self, uri: str) -> None:
        """One that a run lets go of, if this session saved it: an earlier one's may belong to a copy of the run as well."""
        if uri.removeprefix("tinker://").partition("/")[0] in self._trained_here:
            _in_parting(self._rest.delete_checkpoint_from_tinker_path(uri))

    def download_urls(self, exported: str) -> Mapping[str, str]:
        """File name -> where to get it, of an export."""
        with self.translated():
            return self._rest.get_external_weights_urls(exported).result().urls

    def info_of(self, base_model: str) -> ModelInfo:
        """What recipes want to know of a model; its width and kind come from its configuration, read here."""
        if base_model not in self._infos:
            self._infos[base_model] = self._read_info(base_model)
        return self._infos[base_model]

    def _read_info(self, base_model: str) -> ModelInfo:
        from transformers import AutoConfig

        from core.models import local_model

        self._check_model(base_model)
        try:
            config = AutoConfig.from_pretrained(local_model(base_model))
        except (OSError, ValueError) as error:
            told = f"model.name={base_model}: tokenizer and configuration are read here, not there"
            raise UsageError(f"{told}: {str(error).strip().splitlines()[0]}") from error
        return ModelInfo(
            base_model=base_model,
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            max_length=self.contexts[base_model] or config.max_position_embeddings,
            num_parameters=None,
            dtype="served",
            device=self.server.service,
            token_budget=self.token_budget,
        )

    def bridge(self, theirs: tinker.APIFuture[A], change: Callable[[A], T], cancellable: bool = False) -> Future[T]:
        """Our future of what `change` makes of the SDK's result, or of its error in our words."""
        ours, inner = Future[T](cancellable), theirs.future()

        def settle(done: concurrent.futures.Future[A]) -> None:
            try:
                value = change(done.result())
            except BaseException as error:
                ours.set_exception(self.server.meaning(error))
            else:
                ours.set_result(value)

        if cancellable:
            ours.add_done_callback(lambda: inner.cancel() and None)
        self.watch.add(ours)
        inner.add_done_callback(settle)
        return ours

    @contextlib.contextmanager
    def translated(self):
        try:
            yield
        except Exception as error:
            meaning = self.server.meaning(error)
            if meaning is error:
                raise
            raise meaning from error


class RemoteTrainer:
    """One adapter on the server. Verbs are submitted at once, run there in order, and return futures."""

    def __init__(self, service: RemoteService, client: tinker.TrainingClient) -> None:
        self.service, self._client = service, client

    @property
    def training_run_id(self) -> str:
        return self._client.model_id

    def get_info(self) -> ModelInfo:
        return self.service.info_of(str(self._client.get_info().model_data.model_name))

    def close(self) -> None:
        """The server lets go of a training client when its session ends."""

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None, logprobs: str = "all"
    ) -> Future[ForwardBackwardOutput]:
        """Add the gradient of the summed loss over `data`; logprobs="weighted" gives 0.0 at positions of weight 0."""
        return self._pass(self._client.forward_backward, data, loss_fn, loss_fn_config, logprobs)

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, float] | None = None, logprobs: str = "all"
    ) -> Future[ForwardBackwardOutput]:
        """The same numbers without a gradient."""
        return self._pass(self._client.forward, data, loss_fn, loss_fn_config, logprobs)

    def _pass(
        self, verb: Callable[..., tinker.APIFuture[Any]], data: Sequence[Datum], loss_fn: str,
        config: Mapping[str, float] | None, logprobs: str,
    ) -> Future[ForwardBackwardOutput]:  # fmt: skip
        ours = list(data)
        theirs = verb([to_datum(datum, loss_fn) for datum in ours], loss_fn, dict(config) if config else None)
        return self.service.bridge(theirs, lambda output: from_output(output, ours, logprobs == "weighted"))

    def forward_backward_custom(
        self, data: Sequence[Datum], fn: CustomLoss, logprobs: str = "all"
    ) -> Future[ForwardBackwardOutput]:
        """`fn(data, logprobs)` runs here; its gradient goes back as weights of a cross-entropy. Two round trips."""
        ours, only_weighted = list(data), logprobs == "weighted"

        def loss(_: object, lps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            value, metrics = fn(ours, weighted(ours, lps) if only_weighted else lps)
            if not bool(torch.isfinite(value.detach()).all()):
                raise ValueError(f"the custom loss is {float(value.detach())}, expected a finite number")
            return value, metrics

        theirs = self._client.forward_backward_custom([to_datum(datum, "cross_entropy") for datum in ours], loss)
        return self.service.bridge(theirs, lambda output: from_output(output, ours, only_weighted))

    def optim_step(self, adam: AdamParams) -> Future[OptimStepOutput]:
        """AdamW on the accumulated gradient, which is then cleared."""
        theirs = self._client.optim_step(to_adam(adam))
        return self.service.bridge(theirs, lambda response: OptimStepOutput(from_metrics(response.metrics)))

    def save_state(self, name: str, overwrite: bool = False) -> Future[SaveOutput]:
        """Weights and moments in the server's store, as tinker://<training_run_id>/weights/<name>."""
        theirs = self._client.save_state(name, overwrite=overwrite)
        return self.service.bridge(theirs, lambda response: SaveOutput(response.path, None))

    def save_weights_external(self, name: str, ttl_seconds: int | None = None) -> Future[SaveOutput]:
        """An export in the server's store, to be downloaded."""
        theirs = self._client.save_weights_external(name, ttl_seconds=ttl_seconds)
        return self.service.bridge(theirs, lambda response: SaveOutput(response.path, None))

    def save_weights_and_get_sampling_client(self) -> Future[RemoteSampler]:
        """A client that samples from the weights as they are after the verbs submitted so far."""
        theirs = self._client.save_weights_and_get_sampling_client()
        return self.service.bridge(theirs, lambda client: RemoteSampler(self.service, client))


class RemoteSampler:
    """A snapshot on the server: later optim_steps do not change what it samples."""

    def __init__(self, service: RemoteService, client: tinker.SamplingClient) -> None:
        self.service, self._client = service, client

    def close(self) -> None:
        """The server lets go of a snapshot when newer ones have taken its place, or its session ends."""

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int = 1,
        sampling_params: SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> Future[SampleResponse]:
        """`num_samples` continuations of `prompt`. The future can be cancelled."""
        params = to_params(sampling_params or SamplingParams())
        theirs = self._client.sample(to_input(prompt), num_samples, params, include_prompt_logprobs, topk_prompt_logprobs)
        return self.service.bridge(theirs, from_samples, cancellable=True)

    @contextlib.contextmanager
    def stream(self, prompt: ModelInput, num_samples: int, params: SamplingParams) -> Iterator[Iterator[StreamedToken]]:
        """The tokens of one continuation as they come: in parts, since the protocol has no streams."""
        assert num_samples == 1
        parts = _parts(self, prompt.to_ints(), params)
        try:
            yield parts
        finally:
            parts.close()

    def together(self) -> contextlib.AbstractContextManager[None]:
        """The server decides which requests it decodes together."""
        return contextlib.nullcontext()

    def compute_logprobs(self, prompt: ModelInput) -> Future[list[float | None]]:
        """The logprob (T = 1) of each prompt token given those before it; None for the first."""
        return self.service.bridge(self._client.compute_logprobs(to_input(prompt)), lambda logprobs: logprobs)


def _parts(sampler: RemoteSampler, prompt: list[int], params: SamplingParams) -> Generator[StreamedToken]:
    """Each part goes on from the tokens before it, twice as long as the one before."""
    left, size, number = params.max_tokens, FIRST_PART, 0
    while left is None or left > 0:
        now = size if left is None else min(size, left)
        seed = None if params.seed is None else params.seed + number
        future = sampler.sample(ModelInput.from_ints(prompt), 1, replace(params, max_tokens=now, seed=seed))
        try:
            (sequence,) = future.result().sequences
        except BaseException:  # Ctrl-C
            future.cancel()
            raise
        for token, logprob in zip(sequence.tokens, sequence.logprobs, strict=True):
            yield StreamedToken(0, token, logprob)
        if sequence.stop_reason == "stop":
            return
        prompt = [*prompt, *sequence.tokens]
        left, size, number = None if left is None else left - now, min(2 * size, MOST_PART), number + 1
