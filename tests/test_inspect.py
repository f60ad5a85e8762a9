"""Tasks of inspect-ai run against a policy of ours (extra `inspect`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cookbook.cli import main
from cookbook.inspect_model import as_model, scores_of
from core import SamplingParams
from tests.test_afterlife import scripted
from tests.tiny import tiny_model_dir

inspect_ai = pytest.importorskip("inspect_ai", reason="needs the extra: uv sync --extra inspect")
pytestmark = pytest.mark.usefixtures("one_thread")

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

@tool
def add():
    async def execute(a: int, b: int):
        '''Add two numbers.

        Args:
            a: One.
            b: The other.
        '''
        return a + b
    return execute

@task
def sums():
    data = [Sample(input=f"{i} + 3?", target=str(i + 3)) for i in range(4)]
    return Task(dataset=data, solver=[use_tools(add()), generate()], scorer=includes())

@task
def others():
    return Task(dataset=[Sample(input="hi", target="x")], solver=generate(), scorer=includes())
"""


def answer(prompt: str, params: SamplingParams) -> str:
    """Calls the tool for 0, 1 and 2, and says what came back."""
    if "<|im_start|>tool" in prompt:
        return "It is " + prompt.rpartition("<|im_start|>tool\n")[2].partition("<|im_end|>")[0] + "."
    number = prompt.rpartition(" + 3?")[0][-1]
    call = {"name": "add", "arguments": {"a": int(number), "b": 3}}
    return "I give up." if number == "3" else f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.py"
    file.write_text(TASK)
    return file


def test_a_task_with_tools_is_solved_by_calls_and_scored(task: Path, tmp_path: Path) -> None:
    policy = scripted(answer)
    model = as_model(policy, SamplingParams(max_tokens=200))
    (log,) = inspect_ai.eval(f"{task}@sums", model=model, display="none", log_dir=str(tmp_path / "logs"))
    assert log.status == "success"
    assert scores_of(log) == {"includes": [(1.0, 1.0)] * 3 + [(0.0, 1.0)]}
    assert [message.role for message in log.samples[0].messages][-4:] == ["user", "assistant", "tool", "assistant"]


def test_cook_eval_runs_a_task(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "figures.json"
    words = ["eval", f"model={tiny_model_dir()}", "--inspect", f"{task}@sums", "--max-tokens", "5", "--samples", "2"]
    assert main([*words, "--problems", "3", "--to", str(out)]) == 0
    figure = json.loads(out.read_text())["figures"]["sums/includes"]
    assert figure["num_items"] == 3 and 0 <= figure["value"] <= 1
    assert list((tmp_path / "inspect").glob("*"))
    capsys.readouterr()
    for wrong, said in [(f"{task}", "name one of"), ("none.py@x", "no such file"), (f"{task}@smus", "smus")]:
        assert main(["eval", f"model={tiny_model_dir()}", "--inspect", wrong]) == 2
        assert said in capsys.readouterr().err
