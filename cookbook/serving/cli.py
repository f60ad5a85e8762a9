"""`cook serve`: its words, its refusals, its start."""

from __future__ import annotations

import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cookbook.errors import UsageError
from cookbook.serving.settings import ServeConfig

if TYPE_CHECKING:
    from cookbook.serving.store import Store

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def main(words: list[str], console: Console) -> None:
    """`keys create|list|revoke`, or settings and then a server until Ctrl-C."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
        import zstandard  # noqa: F401
    except ImportError as error:
        raise UsageError(f"cook serve needs '{error.name}': pip install 'cook-post-training[serve]'") from error
    if words and words[0] == "keys":
        _keys(words[1:], console)
    else:
        _serve(parse(words), console)


def parse(words: list[str]) -> ServeConfig:
    """`key=value` words over the defaults."""
    import difflib

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(ServeConfig)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"'{word}': expected key=value, or keys create|list|revoke")
        try:
            OmegaConf.update(config, key, OmegaConf.create(f"value: {value}").value if value else None)
        except OmegaConfBaseException as error:
            known = [*_keys_of(OmegaConf.to_container(config))]
            close = difflib.get_close_matches(key, known, n=1)
            if key not in known:
                raise UsageError(f"unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else "")) from error
            raise UsageError(f"{word}: {str(error).splitlines()[0]}") from error
    found = OmegaConf.to_object(config)
    assert isinstance(found, ServeConfig)
    for name, value in asdict(found.limits).items():
        if not value > 0:
            raise UsageError(f"limits.{name} is {value}, expected more than 0")
    return found


def _keys_of(values: object, prefix: str = ""):
    for key, value in values.items() if isinstance(values, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys_of(value, f"{prefix}{key}.")


def model_names(model: str) -> list[str]:
    """The base models that `model=` means: choices of conf/model by their names, anything else as it is."""
    import yaml

    from cookbook.keys import group_files

    options = group_files("model", None)
    names = []
    for one in model.split(","):
        values = yaml.safe_load(options[one].read_text(encoding="utf-8")) if one in options else {}
        names.append(values.get("name", one))
    return names


def _serve(config: ServeConfig, console: Console) -> None:
    import uvicorn

    from cookbook.service import connect
    from cookbook.serving import keys
    from cookbook.serving.app import create_app
    from cookbook.serving.server import Server
    from cookbook.serving.store import Store

    store = Store(Path(config.store))
    if config.host not in LOOPBACK and not keys.any_valid(store):
        raise UsageError(
            f"host={config.host} is open to others and there is no key: make one with"
            f" `cook serve keys create NAME store={config.store}`, or leave host at 127.0.0.1"
        )
    service = connect("local", store.directory, config.engine)
    server = Server(service, model_names(config.model), store, config.limits, config.poll_together)
    listening = _listen(config.host, config.port)
    host, port = listening.getsockname()[:2]
    try:
        server.open()
    except ValueError as error:  # unknown model, unsupported architecture
        listening.close()
        raise UsageError(f"model={config.model}: {' '.join(str(error).split())}") from error

    def tell_ready() -> None:
        print(f"serving {', '.join(server.models)} at http://{host}:{port}, store {config.store}", flush=True)
        if not server.needs_key:
            print(f"no keys: whoever reaches this port is '{keys.ANYONE}'; any key that begins with tml- will do", flush=True)

    settings = uvicorn.Config(
        create_app(server, tell_ready), log_level="warning", timeout_keep_alive=75, timeout_graceful_shutdown=5
    )
    uvicorn.Server(settings).run([listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise UsageError(f"host={host} port={port} cannot be listened on: {error}") from error
    return listening


def _keys(words: list[str], console: Console) -> None:
    """create NAME | list | revoke ID, each with store=DIRECTORY if it is not ./serve."""
    from cookbook.serving import keys
    from cookbook.serving.store import Store

    config = parse([word for word in words if "=" in word])
    match [word for word in words if "=" not in word]:
        case ["create", owner]:
            print(keys.create(Store(Path(config.store)), owner))
        case ["list"]:
            table = Table("id", "owner", "made", "", box=None, pad_edge=False)
            for row in _known_store(config.store).rows("SELECT * FROM keys ORDER BY created"):
                made = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"]))
                table.add_row(row["id"], row["owner"], made, "revoked" if row["revoked"] else "")
            console.print(table)
        case ["revoke", key_id]:
            keys.revoke(_known_store(config.store), key_id)
        case other:
            raise UsageError(f"cook serve keys {' '.join(other)}: expected create NAME, list, or revoke ID")


def _known_store(store: str) -> Store:
    """One that is there: to look at keys makes none."""
    from cookbook.serving.store import Store

    if not (Path(store) / "serve.db").is_file():
        raise UsageError(f"store={store} holds no serve.db: name a server's store, or make a key with keys create NAME")
    return Store(Path(store))
