"""Where rows come from: a generated set, a local file, a hub data set, or several of them mixed by weight."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from cookbook.config import DataConfig
from cookbook.errors import UsageError
from cookbook.generated import GENERATED, generated_rows
from cookbook.keys import did_you_mean, group_files
from cookbook.row_formats import check_columns
from cookbook.rows import ENDINGS, RawRow, as_object, read_file


@dataclass(frozen=True)
class Source:
    """Rows that can be read any number of times, always in the same order."""

    name: str
    rows: Callable[[], Iterator[RawRow]]
    columns: Mapping[str, str]
    limit: int | None = None  # usable rows
    weight: float = 1.0


def open_sources(config: DataConfig) -> list[Source]:
    """One source, or those of a mixture; everything that can be checked before reading is checked."""
    if config.name != "mixture":
        if config.sources:
            raise UsageError(f"data.sources is for data=mixture, but data.name={config.name}; add data=mixture")
        return [_open(config, config.streaming, 1.0)]
    if not config.sources:
        raise UsageError("data=mixture wants data.sources, e.g. 'data.sources={no_robots: 0.7, my.jsonl: 0.3}'")
    sources = []
    for name, weight in config.sources.items():
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"data.sources.{name}={weight:g}: a weight is a positive number; to drop it, leave it out")
        sources.append(_open(_component(name, config.columns), config.streaming, weight))
    return sources


def _component(name: str, columns: dict[str, str]) -> DataConfig:
    """The DataConfig of a mixture's source: a file, a generated set or a preset of conf/data."""
    if Path(name).suffix.lower() in ENDINGS:
        return DataConfig(name="file", path=name, columns=columns)
    presets = group_files("data")
    if name in ("file", "mixture") or name not in presets:
        if name in GENERATED:
            return DataConfig(name=name)
        known = [p for p in presets if p not in ("file", "mixture")]
        hint = did_you_mean(name, known)
        raise UsageError(f"data.sources.{name}: no such file or preset{hint}; presets: {', '.join(known)}")
    return _preset(presets[name])


def _preset(path: Path) -> DataConfig:
    """The data part of conf/data/<name>.yaml; root keys of a `_global_` file (steps, ...) are not a source's."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(values, dict)
    if "@package _global_" in path.read_text(encoding="utf-8"):
        values = values.get("data", {})
    known = {field.name for field in fields(DataConfig)}
    return DataConfig(**{str(key): value for key, value in values.items() if key in known})


def _open(config: DataConfig, streaming: bool, weight: float) -> Source:
    check_columns(config.columns)
    if config.limit is not None and config.limit < 1:
        raise UsageError(f"data.limit={config.limit}: expected at least 1 row, or null for all")
    if config.name == "file" and config.path is None:
        raise UsageError("data=file wants a path: data.path=my.jsonl (or .json, .parquet, .csv)")
    if config.path is None:
        if config.name not in GENERATED:
            hint = did_you_mean(config.name, GENERATED)
            raise UsageError(
                f"data.name={config.name}: no generated set of that name{hint};"
                " give the file or hub data set: data.path=..."
            )
        name, rows = config.name, _generated(config)
    elif config.name == "file" or Path(config.path).suffix.lower() in ENDINGS:
        path = Path(config.path)
        read_file(path)  # refuses a bad file now; nothing is read before the first row is asked for
        name, rows = path.name, lambda: read_file(path)
    else:
        name, rows = config.name, _hub(config, config.path, streaming)
    return Source(name, rows, config.columns, config.limit, weight)


def _generated(config: DataConfig) -> Callable[[], Iterator[RawRow]]:
    values = generated_rows(config.name, config.size)
    return lambda: (RawRow(f"{config.name}[{i}]", value) for i, value in enumerate(values))


def _hub(config: DataConfig, path: str, streaming: bool) -> Callable[[], Iterator[RawRow]]:
    """Rows of a hub data set, loaded (or opened, when streaming) once."""
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it announces each of five retries
    try:
        with _offline_when_unreachable():
            from datasets import load_dataset

            load: Callable[..., Iterable[object]] = load_dataset  # its overloads want a literal `streaming`
            loaded = load(path, name=config.config, split=config.split, streaming=streaming)
    except Exception as error:
        raise _hub_problem(error, config) from error

    def rows() -> Iterator[RawRow]:
        try:
            for i, value in enumerate(loaded):
                yield RawRow(f"{config.name}[{i}]", as_object(value))
        except Exception as error:
            raise _hub_problem(error, config) from error

    return rows


def _hub_problem(error: Exception, config: DataConfig) -> Exception:
    """One line for what goes wrong between us and the hub; anything else stays as it is."""
    what = f"hub data set {config.path}" + (f" ({config.config})" if config.config else "")
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if "DatasetNotFoundError" in kinds:
        gated = "; if it is gated, accept its terms on the hub and `hf auth login`" if "gated" in text else ""
        return UsageError(f"{what} does not exist or needs a login: check data.path{gated}")
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "HTTPError", "TransportError", "Timeout"}:
        return UsageError(
            f"{what} cannot be reached and is not in the cache (no network?);"
            " try again online, or use a local file: data=file data.path=my.jsonl"
        )
    if isinstance(error, ValueError):  # unknown split or configuration: the library lists what there is
        return UsageError(f"{what}, split {config.split}: {text[:300]}; check data.split and data.config")
    return error


@contextlib.contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Without a way to the hub go straight to the cache: five retries would cost 23 seconds before saying the same."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _hub_resolves(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _hub_resolves(endpoint: str) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # then the proxy looks up names
    host = endpoint.split("://")[-1].split("/")[0].split(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
