"""What one does with a trained run: talk to it, sample, measure and compare it, let it write data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cookbook import records
from cookbook.chat import Chat
from cookbook.cli import main
from cookbook.config import ModelConfig
from cookbook.errors import UsageError
from cookbook.past_policy import PastPolicy, open_policy
from core import Future, ModelInput, SamplingParams
from tests.past_runs import rl_run
from tests.scripted_sampler import CUT, ScriptedSampler, tiny_renderer
from tests.small_runs import ROOT, Processes, chat, read_lines, result, train, wait_until, write_rows
from tests.test_dpo import pair
from tests.tiny import service_at, tiny_model_dir

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def rows(home: Path) -> Path:
    return write_rows(home / "rows.jsonl", map(chat, range(40)))


@pytest.fixture(scope="module")
def run(home: Path, rows: Path) -> Path:
    assert train(home / "run", rows) == 0
    return home / "run"


def lines_of(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(words) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a mistake."""
    _, err = lines_of(words, capsys, status=2)
    return err


def json_of(words: list[str], capsys: pytest.CaptureFixture[str]):
    return json.loads(lines_of([*words, "--json"], capsys)[0])


# ---- sample


def test_replies_are_the_policys_and_repeat_with_their_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(run), "say a, 4", "-n", "3", "--seed", "5", "--max-tokens", "12"]
    found = json_of(words, capsys)
    assert found == json_of(words, capsys) and len(found) == 3
    policy = open_policy(str(run))
    prompt = policy.renderer.build_generation_prompt([{"role": "user", "content": "say a, 4"}])
    params = SamplingParams(max_tokens=12, seed=5, stop=policy.renderer.stop)
    expected = policy.sampler.sample(prompt, 3, params).result().sequences
    assert [row["logprob"] for row in found] == pytest.approx([sum(one.logprobs) for one in expected])
    assert found[0]["num_tokens"] == len(expected[0].tokens)
    policy.close()


def test_stdout_holds_nothing_but_the_reply(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = lines_of(["sample", str(run), "say b, 3", "--temperature", "0", "--max-tokens", "9"], capsys)
    assert set(out.strip()) <= set("ab") and "step 12" in err
    base = f"model={tiny_model_dir()}"
    raw, _ = lines_of(["sample", base, "bbb", "--raw", "--temperature", "0", "--max-tokens", "4"], capsys)
    assert raw != out


def test_a_run_that_goes_on_a_killed_one_and_a_torn_one_can_be_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = records.Lock(run)
    try:
        assert "still going" in lines_of(["sample", str(run), "hi", "--max-tokens", "3"], capsys)[1]
    finally:
        lock.release()
    copy = tmp_path / "killed"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    (copy / "result.json").unlink()
    with (copy / "checkpoints.jsonl").open("a") as file:
        file.write('{"step": 14, "uri": "tinker://half')
    assert "step 12 (killed" in lines_of(["sample", str(copy), "hi", "--max-tokens", "3"], capsys)[1]


def test_a_run_of_another_version_is_used_where_it_can_be_and_else_told_in_a_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Talking to it needs the model alone; going on with it needs every key, and leaves the run as it was."""
    old = tmp_path / "old"
    subprocess.run(["cp", "-r", str(run), str(old)], check=True)
    written = (run / "config.yaml").read_text().replace("lora:\n", "lora:\n  dropout: 0.1\n")
    (old / "config.yaml").write_text("\n".join(line for line in written.splitlines() if not line.startswith("save_minutes")))
    assert lines_of(["sample", str(old), "hi", "--max-tokens", "3"], capsys)[0]
    before = {path: path.read_bytes() for path in old.glob("*.json*")}
    for words in (["resume", str(old), "steps=14"], ["rerun", str(old), f"run_dir={tmp_path / 'new'}"], ["eval", str(old)]):
        found = refusal(words, capsys)
        assert "the run's config.yaml is of another version (Key 'dropout' not in 'LoraConfig'" in found
    assert before == {path: path.read_bytes() for path in old.glob("*.json*")} and not (tmp_path / "new").exists()
    (old / "config.yaml").write_text((old / "config.yaml").read_text().replace("  dropout: 0.1\n", ""))
    assert json_of(["eval", str(old)], capsys)["figures"]["held_out/nll"]["num_items"] == 6  # a key it lacks has its default
    (old / "run.json").rename(tmp_path / "kept.json")
    assert "is of an unknown recipe (run.json is missing or torn): say on what" in refusal(["eval", str(old)], capsys)
    assert "its record cannot be used: run.json is missing" in refusal(["resume", str(old)], capsys)
    (tmp_path / "kept.json").rename(old / "run.json")
    (old / "checkpoints.jsonl").write_text('{"step": 12, "uri": "tinker://a/weights/000012"}\n')
    assert "a row of another version, without loop, metrics, path" in refusal(["resume", str(old), "steps=14"], capsys)


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = rl_run(tmp_path / "bare", 5)
    for words, said in [
        (["sample", str(bare), "hi"], "has no checkpoint yet"),
        (["chat", str(bare)], "has no checkpoint yet"),
        (["eval", str(bare)], "has no checkpoint yet"),
        (["sample", str(tmp_path / "none"), "hi"], "no run"),
        (["sample", str(run), ""], "the prompt is empty"),
        (["sample", str(run), "hi", "--checkpoint", "99"], "there are those of steps"),
        (["sample", str(run), "hi", "--checkpoint", "lst"], "expected newest, best, or the step"),
        (["sample", str(run), "hi", "--raw", "--system", "x"], "leave --system out"),
        (["sample", str(run), "x" * 2000, "--max-tokens", "4"], "context"),
        (["sample", "model=no/such", "hi"], "no/such"),
        (["eval", f"model={tiny_model_dir()}"], "say on what"),
        (["eval", str(run), "batch_size=3"], "cook eval takes"),
        (["eval", str(run), "env=arithmetics"], "arithmetic"),
        (["eval", str(run), "--samples", "4", "--temperature", "0"], "would all be the same"),
        (["generate", str(run), "n=4"], "no prompts"),
        (["generate", str(run), "nn=4"], "nn=4"),
        (["generate", str(run), "env=arithmetic", "keep=bst"], "expected best or all"),
        (["export", f"model={tiny_model_dir()}", "--to", str(tmp_path / "out")], "no adapter"),
    ]:
        found = refusal(words, capsys)
        assert said in found and len(found.strip().splitlines()) <= 2, (words, found)


# ---- chat


def test_a_conversation_goes_on_token_for_token(run: Path) -> None:
    policy = open_policy(str(run))
    talk = Chat(policy, SamplingParams(max_tokens=8, temperature=0.0, stop=policy.renderer.stop))
    shown: list[str] = []
    talk.say("say a, 3", shown.append)
    first = list(talk.messages)
    talk.say("say b, 3", shown.append)
    assert talk.messages[:2] == first and len(talk.messages) == 4
    assert len(shown) > 2  # pieces, as they came
    prompt = policy.renderer.build_generation_prompt(talk.messages[:3]).to_ints()
    assert str(talk.messages[1]["tokens"])[1:-1] in str(prompt)
    talk.reset()
    assert talk.messages == []
    policy.close()


class Streaming(ScriptedSampler):
    """A scripted sampler whose replies come token by token."""

    def stream(self, prompt: ModelInput, num_samples: int, params: SamplingParams):
        import contextlib
        from types import SimpleNamespace

        answered: Future = self.sample(prompt, num_samples, params)
        tokens = answered.result().sequences[0].tokens
        return contextlib.nullcontext(iter([SimpleNamespace(token=token) for token in tokens]))


def scripted(answer) -> PastPolicy:
    renderer = tiny_renderer()
    sampler = Streaming(answer, renderer)
    policy = PastPolicy("scripted", ModelConfig(), None, renderer, sampler, None)  # type: ignore[arg-type]
    sampler.engine = type("Engine", (), {"decoder": type("Decoder", (), {"max_length": 4096})})  # type: ignore[attr-defined]
    return policy


def add(a: int, b: int) -> str:
    """The sum.

    Args:
        a: One number.
        b: The other.
    """
    return str(a + b)


def test_tools_are_called_and_their_answers_go_back_to_the_policy() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 19, "b": 23}}\n</tool_call>'
    policy = scripted(lambda prompt, _: "It is 42." if "42" in prompt else call)
    shown: list[str] = []
    talk = Chat(policy, SamplingParams(max_tokens=200), tools=[add])
    talk.say("19 + 23?", shown.append)
    assert "[add: 42]" in "".join(shown) and "".join(shown).endswith("It is 42.")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "tool", "assistant"]


def test_calls_without_end_are_ended_and_a_cut_reply_says_so() -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call>'
    shown: list[str] = []
    Chat(scripted(lambda *_: call), SamplingParams(max_tokens=200), tools=[add]).say("go", shown.append)
    assert "no more than 8 rounds" in "".join(shown)
    shown.clear()
    Chat(scripted(lambda *_: f"on and on{CUT}"), SamplingParams(max_tokens=200)).say("go", shown.append)
    assert "[cut at 9 tokens]" in "".join(shown)


def test_what_fills_the_context_is_refused_and_forgotten() -> None:
    talk = Chat(scripted(lambda *_: "yes"), SamplingParams(max_tokens=20))
    with pytest.raises(UsageError, match="/reset"):
        talk.say("x" * 5000, lambda _: None)
    assert talk.messages == []


def test_a_terminal_session(run: Path) -> None:
    typed = "say a, 3\n/help\n\n/reset\nsay b, 2\n/quit\nnever read\n"
    words = [sys.executable, "-m", "cookbook.cli", "chat", str(run), "--base", "--temperature", "0", "--max-tokens", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, input=typed, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("trained:") == ended.stdout.count("base:") == 2
    assert "forgotten" in ended.stdout and "/reset forgets" in ended.stdout


# ---- eval


def test_the_held_out_rows_of_a_run_give_its_own_last_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json_of(["eval", str(run), "--against", "base"], capsys)["figures"]["held_out/nll"]
    told = result(run)["eval"]
    assert found["value"] == pytest.approx(told["after"]["held_out/nll"], rel=1e-5)
    assert found["against"]["value"] == pytest.approx(told["before"]["held_out/nll"], rel=1e-5)
    assert found["difference"]["high"] < 0 and found["difference"]["lower"] == found["num_items"] == 6
    (file,) = (run / "evals").glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["figures"]["held_out/nll"] == found and len(kept["items"]["held_out/nll"]["values"]) == 6


def test_a_run_that_may_have_trained_on_these_rows_is_named(
    run: Path, home: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(home / "other", rows, seed=1, steps=2) == 0
    out, _ = lines_of(["eval", str(run), "--against", str(home / "other")], capsys)
    assert "may have trained on these" in out
    out, _ = lines_of(["eval", str(run), "--against", str(run)], capsys)
    assert "may have trained" not in out


def test_pairs_of_a_preference_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = home / "dpo"
    assert train(directory, write_rows(home / "pairs.jsonl", map(pair, range(40))), "dpo") == 0
    found = json_of(["eval", str(directory), "--to", str(home / "dpo.json")], capsys)["figures"]
    assert found["held_out/accuracy"]["value"] == result(directory)["eval"]["after"]["held_out/accuracy"]
    told = result(directory)["eval"]["after"]["held_out/margin"]
    assert 0.1 * found["held_out/margin_nats"]["value"] == pytest.approx(told, rel=1e-3)  # beta is .1
    assert (home / "dpo.json").is_file() and not (directory / "evals").exists()


@pytest.mark.parametrize("recipe", ["pairs", "ipo", "simpo", "kto"])
def test_accuracy_is_what_the_recipe_called_so(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sides of several lengths that no rule tells apart."""
    rows = []
    for number in range(40):
        chosen, rejected = "abc"[number % 3] * (1 + number % 7), "bac"[number % 3] * (1 + number % 11)
        rows.append({"prompt": f"say {number}", "chosen": chosen, "rejected": f"{rejected}."})
    run, data = tmp_path / "run", write_rows(tmp_path / "pairs.jsonl", rows)
    assert train(run, data, "dpo", recipe=recipe, steps=2, data_eval_rows=8, learning_rate=0.001) == 0
    told = result(run)["eval"]
    found = json_of(["eval", str(run), "--against", "base"], capsys)["figures"]["held_out/accuracy"]
    assert 0 < told["after"]["held_out/accuracy"] < 1
    assert found["value"] == pytest.approx(told["after"]["held_out/accuracy"])
    assert found["against"]["value"] == pytest.approx(told["before"]["held_out/accuracy"])


def test_rated_replies_are_compared_across_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"say {i}", "completion": "ab"[i % 2] * (2 + i % 7), "label": i % 3 == 0} for i in range(40)]
    run, data = tmp_path / "run", write_rows(tmp_path / "rated.jsonl", rows)
    assert train(run, data, "dpo", recipe="kto", steps=3, data_eval_rows=8, learning_rate=0.001) == 0
    found = json_of(["eval", str(run)], capsys)["figures"]
    told = result(run)["eval"]["after"]
    assert found["held_out/accuracy"]["value"] == pytest.approx(told["held_out/accuracy"]) != 1.0
    assert 0.1 * found["held_out/margin_nats"]["value"] == pytest.approx(told["held_out/margin"], rel=1e-3)
    low, high = (found["held_out/margin_nats"][end] for end in ("low", "high"))
    assert low < found["held_out/margin_nats"]["value"] < high and found["held_out/accuracy"]["num_items"] == 8


def test_an_env_scores_any_policy_with_pass_at_k(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(run), "env=arithmetic", "--problems", "5", "--samples", "4", "--max-tokens", "6", "--against", "base"]
    found = json_of(words, capsys)
    assert {"arithmetic/reward", "arithmetic/correct", "arithmetic/pass@2", "arithmetic/pass@4"} == set(found["figures"])
    assert all(figure["num_items"] == 5 for figure in found["figures"].values())
    assert json_of(words, capsys)["figures"] == found["figures"]
    rollouts = sorted((run / "evals").glob("*.rollouts.jsonl"))[-1]
    assert len(read_lines(rollouts)) == 5 * 4


def test_rows_given_here_are_all_measured(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = write_rows(home / "test.jsonl", map(chat, range(100, 107)))
    found = json_of(["eval", f"model={tiny_model_dir()}", f"data={test}", "--against", str(run)], capsys)
    assert found["figures"]["file/nll"]["num_items"] == 7 and found["figures"]["file/nll"]["difference"]["low"] > 0
    out, _ = lines_of(["eval", str(run), f"data={test}"], capsys)
    assert "file/nll" in out and ".." in out


def test_what_is_left_out_of_a_measurement_is_told(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = write_rows(home / "with-a-bad-one.jsonl", [*map(chat, range(20)), {"messages": []}])
    out, _ = lines_of(["eval", str(run), f"data={test}", "--against", "base"], capsys)
    assert out.count("21 rows: 20 usable, 1 rejected") == 1


def test_all_prompts_of_a_file_are_measured(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = home / "lengths.py"
    reward.write_text(REWARD)
    words = ["eval", str(run), f"data={prompts(home, 7)}", f"reward={reward}:short", "--max-tokens", "4"]
    assert json_of(words, capsys)["figures"]["prompts-7/reward"]["num_items"] == 7


# ---- generate

REWARD = "def short(completions, **columns):\n    return [-float(len(text)) for text in completions]\n"


def prompts(home: Path, number: int) -> Path:
    return write_rows(home / f"prompts-{number}.jsonl", ({"prompt": f"say {i}"} for i in range(number)))


def test_the_best_of_n_is_kept_and_can_be_trained_on(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward, out = home / "my.py", home / "best.jsonl"
    reward.write_text(REWARD)
    words = ["generate", str(run), f"data={prompts(home, 10)}", "n=4", f"reward={reward}:short", "max_tokens=16"]
    lines_of([*words, f"to={out}"], capsys)
    every = home / "all.jsonl"
    lines_of([*words, "keep=all", f"to={every}"], capsys)
    best, tried = read_lines(out), read_lines(every)
    assert [row["problem"] for row in best] == sorted({row["problem"] for row in tried})
    for row in best:
        assert row["reward"] == max(one["reward"] for one in tried if one["problem"] == row["problem"])
        assert row["messages"][0] == {"role": "user", "content": f"say {row['problem']}"}
    assert main(["data", "check", "data=file", f"data.path={out}", f"model.name={tiny_model_dir()}", "batch_size=2"]) == 0
    assert "exists already" in refusal([*words, f"to={out}"], capsys)


def test_a_killed_generation_goes_on_to_the_same_file(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run), f"data={prompts(home, 90)}", "n=2", "keep=all", "max_tokens=12"]
    whole, cut = home / "whole.jsonl", home / "cut.jsonl"
    processes = Processes(home / "screen.txt")
    try:
        processes.start([*words, f"to={cut}"])
        progress = cut.with_name("cut.jsonl.progress")
        wait_until(lambda: progress.exists() and json.loads(progress.read_text())["problems"] >= 32)
        processes.signal(9)
        assert processes.wait() == -9
        with cut.open("a") as file:
            file.write('{"messages": [{"ro')
        assert "other words" in refusal([*words[:-1], "max_tokens=13", f"to={cut}"], capsys)
    finally:
        processes.close()
    assert "going on after" in lines_of([*words, f"to={cut}"], capsys)[0] and not progress.exists()
    lines_of([*words, f"to={whole}"], capsys)
    assert cut.read_bytes() == whole.read_bytes() and len(read_lines(whole)) > 30


def test_why_attempts_failed_is_told(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward = home / "bad.py"
    reward.write_text(
        "def ouch(completions, prompts, **columns):\n    if prompts[0] > 'say 2':\n        raise RuntimeError('ouch')\n"
        "    return [1.0]\n\ndef nan(completions, **columns):\n    return [float('nan')]\n"
    )
    words = ["generate", str(run), f"data={prompts(home, 5)}", "n=4", "max_tokens=16", f"to={home / 'some.jsonl'}"]
    out, _ = lines_of([*words, f"reward={reward}:ouch"], capsys)
    assert "8 failed (RewardError 8 times)" in out and out.count("RuntimeError: ouch") == 1
    refused = refusal([*words[:-1], f"to={home / 'no.jsonl'}", f"reward={reward}:nan"], capsys)
    assert "20 of the attempts failed (RewardError 20 times, the first: " in refused and "nan" in refused
    assert refused.count("\n") == 1


def test_an_env_gives_problems_and_rewards(run: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = home / "sums.jsonl"
    words = ["generate", str(run), "env=arithmetic", "problems=6", "n=3", "max_tokens=12", f"to={out}"]
    assert "6 problems, 18 replies" in lines_of(words, capsys)[0]
    assert all(row["messages"][-1]["role"] == "assistant" for row in read_lines(out))
    assert "no row was kept" in refusal([*words[:-1], "min_reward=2", f"to={home / 'none.jsonl'}"], capsys)
    assert not (home / "none.jsonl").exists()


def test_a_policy_opens_in_the_engine_of_another(run: Path, tmp_path: Path) -> None:
    policy = open_policy(str(run), service=service_at(tmp_path))
    base = policy.base()
    assert base.sampler.engine is policy.sampler.engine and base.adapter is None
    base.close()
    policy.close()
