"""What a run writes down when it begins: run.json, config.yaml, the words typed, how the code differs from its commit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from cookbook import provenance, records
from cookbook.errors import UsageError
from cookbook.overrides import key_of, typed_words


def prepare(run_dir: Path, *, recipe: str, config_yaml: str, overrides: list[str]) -> None:
    """Write run.json, config.yaml, overrides.yaml, code.diff; of a run that exists, run.json notes that it goes on."""
    run_dir.mkdir(parents=True, exist_ok=True)
    git, diff = provenance.git_state()
    session = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": provenance.versions(), "git": git}
    record_file = run_dir / "run.json"
    if record_file.exists():
        record = json.loads(record_file.read_text())
        record["resumed"] = [*record.get("resumed", []), {**session, "overrides": overrides}]
        overrides = typed_words(record)
        diff_file = run_dir / f"code-resumed-{len(record['resumed'])}.diff"
    else:
        record = {"recipe": recipe, "overrides": overrides, **session}
        diff_file = run_dir / "code.diff"
    if diff:
        records.replace(diff_file, diff)
    records.replace(run_dir / "overrides.yaml", "".join(f"- {json.dumps(item)}\n" for item in overrides) or "[]\n")
    records.replace(record_file, json.dumps(record, indent=1) + "\n")
    records.replace(run_dir / "config.yaml", config_yaml)  # last: a directory with this file holds a run


def typed_keys(run_dir: Path) -> set[str]:
    """Those of the command line that the run began with."""
    return {key_of(word) for word in json.loads((run_dir / "run.json").read_text())["overrides"]}


def note_data(run_dir: Path, found: Mapping[str, object], goes_on: bool) -> None:
    """Write the fingerprint of the data into run.json. UsageError when a run that `goes_on` began with another one."""
    file = run_dir / "run.json"
    before = json.loads(file.read_text()).get("data")
    if before == found:
        return
    if goes_on and before is not None:  # null: a run from before fingerprints
        change = f"{before['rows']:,} usable rows then, {found['rows']:,} with other tokens now"
        raise UsageError(
            f"the data has changed since the run began ({change}), and a resumed run keeps its batches: bring the old rows back"
            f", or train its weights on the new (cook rerun {run_dir} init_from={run_dir})"
        )
    records.amend(file, data=found)


def run_directory(run_dir: str | None, name: str | None, recipe: str) -> Path:
    """Where a run of these keys lies, absolute. UsageError when the place that its name leads to is taken."""
    if run_dir is not None:
        return Path(run_dir).expanduser().absolute()
    directory = Path("runs", name or f"{recipe.replace('/', '-')}-{time.strftime('%m%d-%H%M%S')}").absolute()
    if (directory / "config.yaml").exists():
        raise UsageError(f"{directory} holds a run already: resume it (run_dir={directory}) or choose another name=")
    return directory
