"""/metrics: what was counted and timed, and how things stand, as far as one owner may see it, in Prometheus' text format.

The engine's load is everybody's; training clients, checkpoints and the like are the owner's own. Series of a training client
are read off the client, so they go when it goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cookbook.serving.meter import KINDS
from cookbook.serving.server import Server

Rows = Iterable[tuple[tuple[str, ...], float]]  # values of the labels, value


def exposition(server: Server, owner: str) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Own(server.meter.registry, owner))
    registry.register(_Standing(server, owner))
    return generate_latest(registry)


class _Own(Collector):
    """The series of one owner, and of requests that were nobody's; without the time at which each was first written."""

    def __init__(self, registry: CollectorRegistry, owner: str) -> None:
        self.registry, self.owner = registry, owner

    def collect(self) -> Iterator[Metric]:
        for family in self.registry.collect():
            family.samples = [
                one for one in family.samples
                if one.labels["owner"] in (self.owner, "") and not one.name.endswith("_created")
            ]  # fmt: skip
            yield family


class _Standing(Collector):
    """How things stand at this moment."""

    def __init__(self, server: Server, owner: str) -> None:
        self.server, self.owner = server, owner

    def collect(self) -> Iterator[Metric]:
        yield from self._engines()
        yield from self._operations()
        yield from self._owner()
        yield from self._runs()

    def _engines(self) -> Iterator[Metric]:
        engines = {name: client.engine for name, client in self.server.base.items()}
        caches = {name: engine.sampler.cache for name, engine in engines.items()}
        of = ["model"]
        yield _gauge("cook_engine_up", "Whether the engine's thread runs.", of, (((n,), e.alive) for n, e in engines.items()))
        yield _gauge(
            "cook_kv_in_use_tokens", "Key-value room of sequences that are being sampled.", of,
            (((name,), cache.in_use) for name, cache in caches.items()),
        )  # fmt: skip
        yield _gauge(
            "cook_kv_kept_tokens", "Tokens whose keys and values are kept for prompts that begin with them.", of,
            (((name,), cache.kept) for name, cache in caches.items()),
        )  # fmt: skip
        yield _gauge(
            "cook_kv_capacity_tokens", "All the key-value room there is.", of,
            (((name,), cache.max_tokens) for name, cache in caches.items()),
        )  # fmt: skip
        free = shutil.disk_usage(self.server.store.directory).free
        kept = self.server.promises.results.size
        yield _gauge("cook_result_bytes", "Results of all owners that are kept in memory.", [], [((), kept)])
        yield _gauge("cook_store_free_bytes", "Room on the disk of the store.", [], [((), free)])

    def _operations(self) -> Iterator[Metric]:
        meter = self.server.meter
        everyone = {kind: meter.under_way(kind) for kind in KINDS}
        own = {kind: meter.under_way(kind, self.owner) for kind in KINDS}
        yield _gauge(
            "cook_queue_length", "Operations of all owners that wait for the engine.", ["kind"],
            (((kind,), waiting) for kind, (waiting, _) in everyone.items()),
        )  # fmt: skip
        yield _gauge(
            "cook_own_queue_length", "Operations of one owner that wait for the engine.", ["kind", "owner"],
            (((kind, self.owner), waiting) for kind, (waiting, _) in own.items()),
        )  # fmt: skip
        yield _gauge(
            "cook_running_operations", "Operations of all owners that the engine is at.", ["kind"],
            (((kind,), running) for kind, (_, running) in everyone.items()),
        )  # fmt: skip

    def _owner(self) -> Iterator[Metric]:
        server, owner, of = self.server, self.owner, ["owner"]
        clients = sum(run.owner == owner for run in server.runs.values())
        yield _gauge("cook_training_clients", "Training clients that are loaded.", of, [((owner,), clients)])
        samplers = sum(one == owner for one, _ in server.samplers.values())
        yield _gauge("cook_sampling_sessions", "Sampling sessions that are loaded.", of, [((owner,), samplers)])
        yield _gauge("cook_sessions", "Sessions that are not finished.", of, [((owner,), server.num_sessions(owner))])
        waiting = server.promises.waiting(owner)
        yield _gauge("cook_waiting_futures", "Promises whose result is not there yet.", of, [((owner,), waiting)])
        totals, each = server.store.totals(owner).items(), ["kind", "owner"]
        yield _gauge("cook_checkpoints", "Checkpoints in the store.", each, (((k, owner), n) for k, (n, _) in totals))
        yield _gauge("cook_checkpoint_bytes", "Their size.", each, (((k, owner), size) for k, (_, size) in totals))

    def _runs(self) -> Iterator[Metric]:
        runs, of = [run for run in self.server.runs.values() if run.owner == self.owner], ["run", "model", "owner"]
        names = [(run.id, run.base_model, run.owner) for run in runs]
        tokens = CounterMetricFamily("cook_run_trained_tokens", "Trained tokens of a client that is loaded.", labels=of)
        for name, run in zip(names, runs, strict=True):
            tokens.add_metric(name, run.trained_tokens)
        yield tokens
        steps = ((name, run.trainer.adapter.step) for name, run in zip(names, runs, strict=True) if run.trainer is not None)
        yield _gauge("cook_run_steps", "Optimizer steps behind a training client's weights.", of, steps)


def _gauge(name: str, text: str, labels: list[str], rows: Rows) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, number in rows:
        family.add_metric(values, float(number))
    return family
