"""What all tests share."""

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores, and none may spin on one
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """Clients that hold themselves in a circle of references leave their engine before the next file's tests."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """A tiny random Llama with a byte tokenizer, for `model.name=`; other kinds: tests.tiny.tiny_model_dir."""
    from tests.tiny import tiny_model_dir

    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models run faster, and repeat to the bit, on one torch thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX: the processor's own, or the same C code with tiles emulated where the rest of it runs."""
    import torch

    from core import native
    from tests.tiles import emulated

    if not native.packs(torch.bfloat16, 16):
        pytest.skip("no C compiler, or a processor without products in bf16")
    if not native.wide_rows():
        library, plain = emulated(), native._library
        monkeypatch.setattr(native, "_library", lambda dtype: library if dtype == torch.bfloat16 else plain(dtype))
        monkeypatch.setattr(native, "wide_rows", library.wide_rows)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 conversations of 31 to 38 tokens."""
    from tests.small_runs import chat, write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", map(chat, range(40)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, which root may mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(scope="module")
def no_key() -> Iterator[None]:
    """Clients of a server without one, that tell nobody anything."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TINKER_API_KEY", raising=False)
        environment.setenv("TINKER_TELEMETRY", "0")
        yield
