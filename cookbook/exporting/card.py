"""The README.md of an export, which is the model card on the hub: base, data, settings, metrics before and after, use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cookbook.exporting.subject import Subject
from core.models import EMBEDDED

WITHIN = re.compile(r"(?:(?<=\w\.)|(?<![\w:/.~-]))[/~](?:[^\s/{}\[\]'\",]*/)+")  # folders of an absolute path in other text
HIDDEN = ("run_dir", "config_dir")  # paths of the machine, nobody else's business
USE = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
{more}
base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "{name}")  # do not merge_and_unload: it would change a tied embedding too
tokenizer = AutoTokenizer.from_pretrained("{name}")
```""",
    "merged": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```""",
    "gguf": """```
llama-server --jinja -m FILE.gguf
```""",
}


def card(subject: Subject, form: str, repository: str | None = None) -> str:
    """Markdown with the hub's front matter."""
    name = repository or "FOLDER"
    title = (repository or subject.name).rpartition("/")[2]
    parts = [_front_matter(subject, form), f"# {title}", _origin(subject, form), *_sections(subject)]
    parts += ["## Use", _use(subject, form, name), "## Licence", _licence(subject)]
    return "\n\n".join(parts) + "\n"


def _use(subject: Subject, form: str, name: str) -> str:
    """Code that loads it. The model that comes with cook has no name on a hub."""
    base, more = f'"{_without_folders(subject.model.name)}"', ""
    if subject.model.name in EMBEDDED:
        base, more = f"local_model({base})", "from core.models import local_model  # of cook, which brings the base\n"
    return USE[form].format(base=base, more=more, name=name)


def _front_matter(subject: Subject, form: str) -> str:
    library = {"peft": "peft", "merged": "transformers", "gguf": "gguf"}[form]
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if _is_hub_id(subject.model.name):
        lines.append(f"base_model: {subject.model.name}")
    return "\n".join([*lines, "tags:", "- cook", "- lora", "---"])


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".gguf")


def _origin(subject: Subject, form: str) -> str:
    what = {"peft": "A LoRA adapter for", "merged": "A LoRA adapter merged into", "gguf": "A LoRA adapter merged into"}[form]
    run = subject.run
    text = f"{what} `{_without_folders(subject.model.name)}`, trained with cook"
    if run is None:
        return text + "."
    step = f", step {subject.step}" if subject.step is not None else ""
    return f"{text} (`cook {run.recipe.partition('/')[0] or 'run'}`, run `{run.directory.name}`{step})."


def _sections(subject: Subject) -> Iterator[str]:
    run = subject.run
    if run is None:
        return
    if rows := list(_evaluations(run.result)):
        yield "## Metrics"
        yield "\n".join(["| | before | after |", "|---|---|---|", *rows])
    for title, key in (("Data", "data"), ("Environment", "env")):
        section = run.config.get(key)
        if isinstance(section, Mapping) and section.get("name"):
            yield f"## {title}"
            yield _yaml({key: _without_paths(section)})
    yield "## Training"
    yield f"```\n{_command(run.recipe, run.overrides)}\n```"
    others = {key: value for key, value in run.config.items() if key not in ("data", "env", "log", *HIDDEN)}
    yield _yaml(_without_paths(others))


def _evaluations(result: Mapping[str, Any] | None) -> Iterator[str]:
    evaluated = (result or {}).get("eval") or {}
    before, after = evaluated.get("before") or {}, evaluated.get("after") or {}
    for key in dict.fromkeys([*before, *after]):
        yield f"| {key} | {_shown(before.get(key))} | {_shown(after.get(key))} |"


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else str(value or "")


def _command(recipe: str, overrides: list[str]) -> str:
    kind, _, name = recipe.partition("/")
    pairs = [word.partition("=") for word in overrides]
    words = [f"{_without_folders(key)}{equals}{_without_folders(value)}" for key, equals, value in pairs if key not in HIDDEN]
    chosen = [] if not name or any(word.startswith("recipe=") for word in words) else [f"recipe={name.removesuffix('.py')}"]
    return " ".join(["cook", kind or "run", *chosen, *words])


def _without_paths(section: Mapping[str, Any]) -> dict[str, Any]:
    """Absolute paths lose their folders, in names (rewards, sources of a mixture) too."""
    kept: dict[str, Any] = {}
    for key, value in ((_without_folders(name), value) for name, value in section.items()):
        if isinstance(value, Mapping):
            kept[key] = _without_paths(value)
        else:
            kept[key] = _without_folders(value) if isinstance(value, str) else value
    return kept


def _without_folders(value: str) -> str:
    """/home/me/rows.jsonl -> rows.jsonl, {/home/me/a.jsonl: 0.5} -> {a.jsonl: 0.5}; a hub id and a URL stay."""
    return value.rpartition("/")[2] if value.startswith(("/", "~")) else WITHIN.sub("", value)


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return f"```yaml\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}```"


def _licence(subject: Subject) -> str:
    return (
        f"The base model `{_without_folders(subject.model.name)}` has a licence of its own, which binds this one too: read it,"
        " and set `license:` above, before you make this public. So may the data."
    )
