"""`cook sample` and `cook chat` of a run that was trained on a server: there, or here when it is away."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tinker", reason="the tinker SDK is not installed (uv sync --extra remote)")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from rich.console import Console

from cookbook.chat import Chat
from cookbook.cli import main
from cookbook.past_policy import PastPolicy
from cookbook.served_policy import ServedPolicy, open_speaker
from core import ModelInput, SamplingParams
from tests.live_server import serving
from tests.small_runs import checkpoint_rows, train

pytestmark = pytest.mark.usefixtures("one_thread", "no_key")
GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def served(no_key: None, tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[tuple[Path, str]]:
    """A run, and the server that it was trained on."""
    directory = tmp_path_factory.mktemp("runs") / "there"
    with serving(tmp_path_factory.mktemp("store")) as (url, _):
        assert train(directory, rows, service=url) == 0
        yield directory, url


@pytest.fixture
def there(served: tuple[Path, str]) -> Iterator[ServedPolicy]:
    policy = open_speaker(str(served[0]), "newest", Console(file=io.StringIO()))
    assert isinstance(policy, ServedPolicy)
    yield policy
    policy.service.close()


def away(directory: Path, url: str) -> None:
    """The run's server is nowhere."""
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace(url, "http://127.0.0.1:1"))


def test_a_sample_comes_from_the_server_or_from_here(
    served: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, url = served
    assert main(["sample", str(directory), "say a, 1", *GREEDY]) == 0
    remote = capsys.readouterr()
    assert f"at {url}" in remote.err and "not on the server" not in remote.err
    config = (directory / "config.yaml").read_text()
    try:
        away(directory, url)
        assert main(["sample", str(directory), "say a, 1", *GREEDY]) == 0
    finally:
        (directory / "config.yaml").write_text(config)
    local = capsys.readouterr()
    assert "not on the server, but here: service=http://127.0.0.1:1: no server answers there" in local.err
    assert local.out == remote.out and local.out.strip()


def test_no_weights_are_fetched_to_sample_there(served: tuple[Path, str]) -> None:
    directory, _ = served
    oldest = checkpoint_rows(directory)[0]
    assert main(["sample", str(directory), "say a, 1", *GREEDY, "--checkpoint", str(oldest["step"])]) == 0
    assert not (directory / "checkpoints" / oldest["uri"].removeprefix("tinker://")).exists()


def test_a_reply_in_parts_is_the_reply_in_one(there: ServedPolicy) -> None:
    prompt, params = ModelInput.from_ints([5, 6, 7]), SamplingParams(max_tokens=45, temperature=0, stop=[])
    (whole,) = there.sampler.sample(prompt, 1, params).result().sequences
    with there.sampler.stream(prompt, 1, params) as stream:
        found = list(stream)
    assert [one.token for one in found] == list(whole.tokens) and len(found) == 45
    assert [one.logprob for one in found] == pytest.approx(whole.logprobs, abs=1e-4)


def test_a_conversation_there_is_the_one_here(there: ServedPolicy, served: tuple[Path, str]) -> None:
    from cookbook.past_policy import open_policy

    here = open_policy(str(served[0]))
    assert isinstance(here, PastPolicy)
    params = SamplingParams(max_tokens=20, temperature=0, stop=there.renderer.stop)
    said = {}
    for name, policy in (("there", there), ("here", here), ("base there", there.base()), ("base here", here.base())):
        pieces: list[str] = []
        talk = Chat(policy, params)
        for text in ("say a, 1", "say b, 2"):
            talk.say(text, pieces.append)
        said[name] = "".join(pieces)
    assert said["there"] == said["here"] != said["base there"] == said["base here"]
    here.close()
