"""Composing: precedence, types, plain dataclasses out, and every user error word for word."""

import ast
import difflib
import os
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from cookbook.compose import Composed, compose, compose_file, load_recipe, recompose, to_yaml
from cookbook.errors import UsageError
from cookbook.keys import declared, group_files, group_options, nearest
from envs import MODULES, load

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"

RECIPE = '''"""A recipe of somebody's own."""
from __future__ import annotations
from dataclasses import dataclass, field
from cookbook.config import DataConfig, LoraConfig, ModelConfig

@dataclass
class Config:
    name: str | None = None
    run_dir: str | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 32
    max_length: int = 2048
    eval_every: int = 20
    save_every: int = 50
    learning_rate: float | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)

def main(config: Config) -> None:
    print("steps", config.steps)
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path / "mine.py"


def config(composed: Composed) -> SimpleNamespace:
    return composed.config  # type: ignore[return-value]  # a Config; SimpleNamespace lets the tests read any field


def error(mine: Path, *overrides: str, config_dir: Path | None = None) -> str:
    with pytest.raises(UsageError) as raised:
        compose_file(mine, list(overrides), config_dir)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# What comes out.


def test_a_recipe_gets_a_plain_dataclass_of_its_own(mine: Path) -> None:
    composed = compose_file(mine, ["model=qwen3-8b", "lora.rank=4"])
    assert is_dataclass(composed.config) and type(composed.config).__name__ == "Config"
    assert (config(composed).model.name, config(composed).lora.rank) == ("Qwen/Qwen3-8B", 4)
    assert composed.choices["model"] == "qwen3-8b"


def test_the_command_line_beats_the_experiment_beats_the_data_file_beats_the_schema(mine: Path) -> None:
    def steps(*overrides: str) -> object:
        return config(compose_file(mine, list(overrides))).steps

    assert steps() is None
    assert steps("data=gsm_symbolic") == 60
    assert steps("experiment=smoke", "data=gsm_symbolic") == 3
    assert steps("steps=7", "experiment=smoke", "data=gsm_symbolic") == 7


def test_an_experiment_may_choose_groups_and_the_command_line_may_choose_others(mine: Path) -> None:
    chosen = config(compose_file(mine, ["experiment=speedrun", "model=qwen3-0.6b"]))
    assert (chosen.model.name, chosen.data.name) == ("Qwen/Qwen3-0.6B", "no_robots")


def test_any_hub_id_goes_without_a_file(mine: Path) -> None:
    assert config(compose_file(mine, ["model.name=some/other-model"])).model.name == "some/other-model"


def test_a_text_is_taken_as_typed(mine: Path) -> None:
    for path in ("s3://b/k=1", "a (1).jsonl", "007", "1e5", "off", "it's.jsonl", "C:\\data\\", "[a].jsonl", ""):
        assert config(compose_file(mine, [f"data.path={path}"])).data.path == path
    assert config(compose_file(mine, ["data.path=null"])).data.path is None
    assert config(compose_file(mine, ['data.path="a,b.jsonl"'])).data.path == "a,b.jsonl"


def test_mappings_take_new_entries_whose_names_may_hold_dots(mine: Path) -> None:
    data = config(compose_file(mine, ["data.columns.prompt=question", "data.sources.my.jsonl=0.5"])).data
    assert (data.columns, data.sources) == ({"prompt": "question"}, {"my.jsonl": 0.5})


def test_a_plus_before_a_known_key_is_harmless(mine: Path) -> None:
    assert config(compose_file(mine, ["+steps=3", "+experiment=smoke", "++lora.rank=2"])).steps == 3


def test_files_of_the_users_own_directory_come_first(mine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "qwen3-8b.yaml").write_text("name: /weights/qwen\n")
    (folder / "ours.yaml").write_text("name: ours/model\n")

    def name(option: str) -> str:
        return config(compose_file(mine, [f"model={option}"], tmp_path / "conf")).model.name

    assert [name(option) for option in ("qwen3-8b", "ours", "qwen3-4b")] == [
        "/weights/qwen",
        "ours/model",
        "Qwen/Qwen3-4B",
    ]


def test_composing_twice_gives_the_same_and_leaves_no_trace(mine: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir()), os.getcwd()
    first, second = (compose_file(mine, ["data=gsm_symbolic"]).yaml for _ in range(2))
    assert first == second
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before[0] and os.getcwd() == before[1]


def test_an_earlier_run_is_composed_again_with_changes(mine: Path) -> None:
    saved = {"steps": 9, "model": {"name": "a/b", "thinking": True}, "lora": {"rank": 2}}
    again = config(recompose(str(mine), saved, ["lora.train_mlp=false", "model=qwen3-8b"]))
    assert (again.steps, again.lora.rank, again.lora.train_mlp) == (9, 2, False)
    assert (again.model.name, again.model.thinking) == ("Qwen/Qwen3-8B", None)  # the chosen group replaces the section


def test_config_yaml_composes_to_itself(mine: Path) -> None:
    import yaml

    composed = compose_file(mine, ["data=gsm_symbolic", "data.columns.text=body", "name=off"])
    assert to_yaml(composed.config) == composed.yaml
    assert recompose(str(mine), yaml.safe_load(composed.yaml), []).yaml == composed.yaml


# An env adds its own keys.


LEARNER = '''"""A recipe of the shape of `cook rl`."""
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any
from cookbook.config import JudgeConfig, ModelConfig, PromptsConfig

@dataclass
class Evals:
    every: int = 5
    env: dict[str, Any] = field(default_factory=dict)

@dataclass
class Config:
    name: str | None = None
    run_dir: str | None = None
    steps: int | None = None
    groups_per_batch: int = 64
    group_size: int = 16
    max_tokens: int = 512
    learning_rate: float | None = None
    eval_every: int = 20
    save_every: int = 50
    reward: str | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    model: ModelConfig = field(default_factory=ModelConfig)
    env: dict[str, Any] = field(default_factory=lambda: DEFAULT_ENV)
    data: PromptsConfig = field(default_factory=PromptsConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    evals: Evals = field(default_factory=lambda: Evals(every=7))

def main(config: Config) -> None:
    pass
'''


def learner(folder: Path, env: str = "{}") -> Path:
    (folder / "learner.py").write_text(LEARNER.replace("DEFAULT_ENV", env))
    return folder / "learner.py"


def test_an_env_brings_its_own_keys_with_their_defaults_and_the_recipe_gets_a_mapping(tmp_path: Path) -> None:
    composed = compose_file(learner(tmp_path), ["env=arithmetic", "env.digits=3"])
    assert type(composed.config).__name__ == "Config" and composed.choices["env"] == "arithmetic"
    assert config(composed).env == {"name": "arithmetic", "operations": "+", "digits": 3, "terms": 2}
    assert config(composed).steps == 15  # the sizes of the demo come with this env and with no other
    other = config(compose_file(learner(tmp_path), ["env.name=guess_number"]))
    assert (other.env["name"], other.steps) == ("guess_number", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("env.digts=3", "unknown key env.digts (did you mean env.digits?); all keys: --cfg job"),
        ("digits=3", "unknown key digits (did you mean env.digits?); all keys: --cfg job"),
        ("+env.typo=1", "unknown key env.typo; all keys: --cfg job"),
        ("env.digits=many", "env.digits=many: expected int, got many"),
        ("env={name: arithmetic, digts: 3}", "env={name: arithmetic, digts: 3}: Key 'digts' not in 'env=arithmetic'"),
        ("evals.env.digits=3", "unknown key evals.env.digits (did you mean env.digits?); all keys: --cfg job"),
        ("evals.env.name=arithmetik", "evals.env.name=arithmetik: no such env (did you mean arithmetic?); there are "),
        ("experiment=smoke", "experiment=smoke is for another recipe: this one has no batch_size, lora, max_length; "),
        ("data=alpaca", "env=arithmetic and data=alpaca: a run learns from an env or from prompts of your own; give one"),
    ],
)
def test_the_keys_of_an_env_are_checked_like_all_others(tmp_path: Path, override: str, message: str) -> None:
    assert error(learner(tmp_path), "env=arithmetic", override).startswith(message)


def test_a_section_inside_another_may_hold_an_env_too(tmp_path: Path) -> None:
    evals = config(compose_file(learner(tmp_path), ["evals.env.name=arithmetic", "evals.env.digits=2"])).evals
    assert (type(evals).__name__, evals.every, evals.env["digits"]) == ("Evals", 7, 2)
    evals = config(compose_file(learner(tmp_path), ["env=arithmetic"])).evals
    assert (type(evals).__name__, evals.every, evals.env) == ("Evals", 7, {})


def test_a_recipe_may_have_an_env_of_its_own_choice(tmp_path: Path) -> None:
    mine = learner(tmp_path, env='{"name": "arithmetic", "digits": 2}')
    assert config(compose_file(mine, ["env.terms=3"])).env == {
        "name": "arithmetic", "operations": "+", "digits": 2, "terms": 3,
    }  # fmt: skip
    assert config(compose_file(mine, ["env=guess_number"])).env["name"] == "guess_number"


def test_passes_that_are_asked_for_take_the_place_of_the_steps_of_a_preset() -> None:
    assert compose("sft", []).config.steps == 60
    assert compose("sft", ["epochs=3"]).config.steps is None
    assert compose("sft", ["epochs=3", "steps=5"]).config.steps == 5
    saved = {"steps": 60, "epochs": 1.0}
    assert recompose("sft/chat", saved, ["epochs=2"]).config.steps is None


def test_prompts_of_ones_own_take_the_place_of_the_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = learner(tmp_path, env='{"name": "arithmetic", "digits": 2}')
    (tmp_path / "my.prompts.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    words = ["data=my.prompts.jsonl", "reward=my.py:score", "rewards.my.py:short=0.5", "rewards={judge: 1, a.b:c: 1e-1}"]
    chosen = config(compose_file(mine, words))
    assert (chosen.env, chosen.data.name, chosen.data.path) == ({}, "file", "my.prompts.jsonl")
    assert (chosen.reward, chosen.rewards) == ("my.py:score", {"my.py:short": 0.5, "judge": 1.0, "a.b:c": 0.1})
    assert config(compose_file(mine, ["data=alpaca"])).data.path == "tatsu-lab/alpaca"
    assert error(mine, "data=my.prmpts.jsonl").startswith("data=my.prmpts.jsonl: no such file (did you mean my.prompts.jsonl?)")


def test_composing_again_keeps_the_env_and_a_new_choice_replaces_what_was_learnt_from(tmp_path: Path) -> None:
    import yaml

    def again(first: list[str], *then: str) -> SimpleNamespace:
        saved = yaml.safe_load(compose_file(mine, first).yaml)
        return config(recompose(str(mine), saved, list(then)))

    mine = learner(tmp_path)
    assert again(["env=arithmetic", "env.digits=3"], "steps=3").env["digits"] == 3
    assert again(["env=arithmetic", "env.digits=3"], "env.terms=3").env["digits"] == 3
    assert again(["env=arithmetic", "env.digits=3"], "env=arithmetic").env["digits"] == 1
    prompts = ["data=alpaca", "reward=my.py:score", "rewards.judge=1"]
    now = again(["env=arithmetic"], *prompts)
    assert (now.env, now.data.name, now.reward) == ({}, "alpaca", "my.py:score")
    now = again(prompts, "env.name=guess_number")
    assert (now.env["name"], now.data.name, now.reward, now.rewards) == ("guess_number", None, None, {})
    assert again(prompts, "data.limit=3", "~rewards.judge").rewards == {}


# Errors, word for word.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1e-4", "unknown key lr (did you mean learning_rate?); all keys: --cfg job"),
        ("+typo=1", "unknown key typo; all keys: --cfg job"),
        ("lora.rnak=8", "unknown key lora.rnak (did you mean lora.rank?); all keys: --cfg job"),
        ("rank=8", "unknown key rank (did you mean lora.rank?); all keys: --cfg job"),
        ("modle=qwen3-8b", "unknown key modle (did you mean model?); all keys: --cfg job"),
        ("hydra.run.dir=x", "unknown key hydra.run.dir (did you mean run_dir?); all keys: --cfg job"),
        ("steps=abc", "steps=abc: expected int or null, got abc"),
        ("batch_size=null", "batch_size=null: expected int, got null"),
        ("batch_size=1.5", "batch_size=1.5: expected int, got 1.5"),
        ("batch_size=[1]", "batch_size=[1]: expected int, got [1]"),
        ("lora.train_mlp=maybe", "lora.train_mlp=maybe: expected bool, got maybe"),
        ("steps=1,2", "steps=1,2: several values for one run, give one"),
        (
            "data.path=a,b",
            (
                "data.path=a,b: several values for one run, give one; "
                "a text with commas is quoted twice: 'data.path=\"a,b\"'"
            ),
        ),
        ("data.sources.a=much", "data.sources.a=much: Value 'much' of type 'str' could not be converted to Float"),
        ("steps={", "steps={: cannot read the value '{'; quote it: 'steps=\"{\"'"),
        ("qwen3-8b", "'qwen3-8b' is not key=value (did you mean model=qwen3-8b?)"),
        ("steps", "'steps' has no value: steps=..."),
        ("what", "'what' is not key=value, as in steps=100 or model=qwen3-8b"),
        ("~steps", "~steps: only entries of a mapping can be taken out; to unset a key write steps=null"),
        (
            "lora=16",
            (
                "lora=16: lora is a group of keys; set one of "
                "lora.rank, lora.train_attn, lora.train_mlp, lora.train_unembed"
            ),
        ),
        ("lora={rnk: 4}", "lora={rnk: 4}: Key 'rnk' not in 'LoraConfig'"),
        ("experiment=smok", "experiment=smok: no such experiment (did you mean smoke?); there are smoke, speedrun"),
    ],
)
def test_a_mistyped_override_is_answered_in_one_line(mine: Path, override: str, message: str) -> None:
    assert error(mine, override) == message


def test_an_unknown_group_option_names_the_others_and_the_way_without_a_file(mine: Path) -> None:
    models, data = ", ".join(group_files("model")), ", ".join(group_files("data"))
    assert error(mine, "model=qwen3-9b") == (
        f"model=qwen3-9b: no such model (did you mean qwen3-8b?); there are {models}; "
        "a hub id or a directory: model.name=qwen3-9b"
    )
    assert error(mine, "data=my.jsonl") == (
        f"data=my.jsonl: no such file; there are {data}"
    )
    assert error(mine, "data=org/name") == f"data=org/name: no such file; a hub set: data.path=org/name; there are {data}"


def test_a_users_file_with_an_unknown_key_is_named_with_the_key_meant(mine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    (folder / "ours.yaml").write_text("nmae: ours/model\n")
    assert error(mine, "model=ours", config_dir=tmp_path / "conf") == (
        "In 'model/ours': ConfigKeyError raised while composing config: Key 'nmae' not in 'ModelConfig' "
        "(did you mean model.name?)"
    )
    assert error(mine, config_dir=tmp_path / "none") == f"--config-dir {tmp_path / 'none'}: no such directory"


def test_a_file_that_is_no_recipe_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty.py").touch()
    assert error(tmp_path / "empty.py") == (
        f"{tmp_path / 'empty.py'} is not a recipe: it needs a dataclass `Config` and a function `main(config)`"
    )
    assert error(tmp_path / "none.py") == f"no such recipe file: {tmp_path / 'none.py'}"


def test_an_unknown_recipe_file_names_the_others() -> None:
    with pytest.raises(UsageError) as raised:
        compose("sft", ["recipe=chatt"])
    assert str(raised.value) == "recipe=chatt: recipes/sft has chat (did you mean chat?)"


@pytest.mark.parametrize(
    ("word", "meant"),
    [("lr", "learning_rate"), ("bs", "batch_size"), ("rank", "lora.rank"), ("max_steps", "steps"), ("zzz", None)],
)
def test_did_you_mean_knows_last_parts_initials_and_spelling(word: str, meant: str | None) -> None:
    assert nearest(word, ["steps", "batch_size", "learning_rate", "lora.rank"]) == meant


# conf/.


CHOICES = {"sft": ("model", "data", "experiment"), "rl": ("env", "data", "experiment"), "dpo": ("data", "experiment")}


@pytest.mark.parametrize(("kind", "chosen"), CHOICES.items())
def test_every_config_file_composes_to_the_golden_configuration(kind: str, chosen: tuple[str, ...]) -> None:
    """Regenerate after a wanted change: COOK_GOLDEN=write uv run pytest tests/test_compose.py"""
    default = compose(kind, [])
    text = f"$ cook {kind} --cfg job\n{default.yaml}"
    for group in chosen:
        for option in group_options(group, type(default.config)):
            lines = difflib.ndiff(default.yaml.splitlines(), compose(kind, [f"{group}={option}"]).yaml.splitlines())
            changed = [line for line in lines if line[0] in "+-"]
            text += "\n".join([f"\n$ cook {kind} {group}={option} --cfg job", *changed]) + "\n"
    golden = GOLDEN / f"{kind}.txt"
    if os.environ.get("COOK_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_file_begins_with_what_it_is_for(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if "@package" not in line]
    assert lines[0].startswith("# ") and "_target_" not in path.read_text()


@pytest.mark.parametrize("recipe", ["sft/chat", "rl/reinforce"])
def test_every_key_is_read_somewhere(recipe: str) -> None:
    sources = [*(ROOT / "cookbook").glob("*.py"), *(ROOT / "recipes").rglob("*.py"), *(ROOT / "core").glob("*.py")]
    trees = [ast.parse(path.read_text()) for path in sources]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    read = {node.attr for node in nodes if isinstance(node.ctx, ast.Load)}
    unread = [key for key in declared(load_recipe(recipe).Config) if key.rsplit(".", 1)[-1] not in read]
    assert not unread


def test_each_env_has_a_file_of_its_name_and_a_docstring_line_that_fits_a_screen() -> None:
    assert set(group_files("env")) == set(MODULES)
    for name in MODULES:
        assert 0 < len((load(name).__doc__ or "").split("\n")[0]) < 90, name
