"""Data sets made on the spot: no download, any size, the same rows for the same size and seed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from cookbook.errors import UsageError

SEED = 0  # of the problems; the run's seed only orders them, so that runs with different seeds stay comparable


def generated_rows(name: str, size: int) -> list[dict[str, object]]:
    """`size` rows of the generated set `name`, from the cache when it has them."""
    if size < 1:
        raise UsageError(f"data.size={size}: expected at least 1 row")
    return GENERATED[name](size)


def gsm_symbolic(size: int, seed: int = SEED) -> list[dict[str, object]]:
    """Grade-school word problems with worked solutions, all questions different: {"question", "answer"}."""
    try:
        version = importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            'data=gsm_symbolic needs the package reasoning-gym: `uv sync`, or `pip install "cook-post-training[gym]"`'
        ) from None
    path = cache_dir() / "generated" / f"gsm_symbolic-{size}-seed{seed}-reasoning-gym-{version}.jsonl"
    rows = _read_cache(path, size)
    if rows is None:
        rows = _generate_gsm_symbolic(size, seed)
        _write_cache(path, rows)
    return rows


def _pairs(size: int) -> list[dict[str, object]]:
    from cookbook.generated_pairs import gsm_symbolic_pairs

    return gsm_symbolic_pairs(size)


GENERATED: dict[str, Callable[[int], list[dict[str, object]]]] = {
    "gsm_symbolic": gsm_symbolic,
    "gsm_symbolic_pairs": _pairs,
}


def cache_dir() -> Path:
    """COOK_CACHE, else `cook` under the user's cache directory."""
    if own := os.environ.get("COOK_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cook"


def _generate_gsm_symbolic(size: int, seed: int) -> list[dict[str, object]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages it brings along, at their first import
        import reasoning_gym

    answers: dict[str, str] = {}  # by question: its templates repeat themselves now and then (2 % at 20,000)
    draws = size
    while len(answers) < size:
        draws += size // 10 + 10
        if draws > 20 * size + 1000:
            raise UsageError(
                f"data.size={size}: gsm_symbolic has only about {len(answers)} different problems; ask for fewer"
            )
        entries = reasoning_gym.create_dataset("gsm_symbolic", size=draws, seed=seed)
        for i in range(draws):  # entry i does not depend on the size
            entry = entries[i]
            answers.setdefault(entry["question"], entry["metadata"]["answer_cot"])
            if len(answers) == size:
                break
    return [{"question": question, "answer": answer} for question, answer in answers.items()]


def _read_cache(path: Path, size: int) -> list[dict[str, object]] | None:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    return rows if len(rows) == size else None


def _write_cache(path: Path, rows: list[dict[str, object]]) -> None:
    """Aside and rename; a cache that cannot be written (read-only home, full disk) costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            try:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.close()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
    except OSError:
        return
