"""Rewards of one's own prompts: TRL's function shape, what may go wrong in it, splits of rows, and a judge over HTTP."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from cookbook.config import JudgeConfig, PromptsConfig
from cookbook.errors import UsageError
from cookbook.judge import Judge, JudgeError, read_score
from cookbook.prompts import prompt_stream, read_prompt
from cookbook.rewards import Prompt, PromptEnv, Reward, RewardError, function_reward, load_rewards
from cookbook.rows import RowProblem
from envs.env import Message, StepResult

TEXT = Prompt("p.jsonl:1", ({"role": "user", "content": "2+2="},), {"answer": "4", "level": 1}, True)
CHAT = Prompt("p.jsonl:2", ({"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}), {}, False)
FOUR = {"role": "assistant", "content": "4", "tokens": [7]}


def stepped(prompt: Prompt, *rewards: Reward, reply: Message = FOUR) -> StepResult:
    env = PromptEnv(prompt, rewards)
    env.reset()
    return asyncio.run(env.step(reply))


def failure(function: Callable[..., Any]) -> str:
    with pytest.raises(RewardError) as raised:
        stepped(TEXT, function_reward(function, "f"))
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Functions.


def test_a_function_gets_completions_prompts_and_columns_as_lists_of_one() -> None:
    def right(completions, prompts, answer, **columns):
        assert (completions, prompts, answer, columns) == (["4"], ["2+2="], ["4"], {"level": [1]})
        return [1.0]

    assert stepped(TEXT, function_reward(right, "right")) == StepResult(1.0, metrics={"reward/right": 1.0})


def test_the_function_in_the_docs_scores() -> None:
    docs = Path(__file__).parent.parent.joinpath("docs/rl.md").read_text(encoding="utf-8")
    written: dict[str, Any] = {}
    exec(docs.partition("```python\n")[2].partition("```")[0], written)
    assert stepped(TEXT, function_reward(written["score"], "score")).reward == 1.0


def test_message_prompts_give_message_completions_without_tokens() -> None:
    def right(completions, prompts):
        assert completions == [[{"role": "assistant", "content": "4"}]] and len(prompts[0]) == 2
        return [1]

    assert stepped(CHAT, function_reward(right, "right")).reward == 1.0


def test_rewards_are_summed_by_weight_and_logged_apart() -> None:
    async def short(completions):
        return [0.5]

    def silent(completions):
        return [None]

    rewards = [function_reward(lambda completions: [True], "long", 2.0), function_reward(short, "short", 0.5)]
    result = stepped(TEXT, *rewards, function_reward(silent, "silent"))
    assert result == StepResult(2.25, metrics={"reward/long": 1.0, "reward/short": 0.5})


def test_what_goes_wrong_in_a_function_is_an_error_of_that_reply_in_one_line() -> None:
    def raises(completions, **columns):
        return [columns["missing\nkey"]]

    def late(completions):
        raise ValueError("two\nlines")

    here = f"{Path(__file__).name}:{raises.__code__.co_firstlineno + 1}"
    assert failure(raises) == f"reward f failed at p.jsonl:1: KeyError: 'missing\\nkey' ({here})"
    assert "ValueError: two lines (" in failure(late)
    assert "RuntimeError: coroutine raised StopIteration" in failure(lambda completions: [next(iter(()))])
    assert "SystemExit: 3" in failure(lambda completions: exit(3))
    assert failure(lambda completions: [float("nan")]) == "reward f returned nan at p.jsonl:1; expected a finite number"
    assert failure(lambda completions: [1.0, 2.0]) == "reward f returned 2 rewards for 1 completion at p.jsonl:1"
    assert failure(lambda completions: 1.0) == "reward f returned float at p.jsonl:1; expected a list of one number"
    assert failure(lambda completions: ["good"]) == "reward f returned 'good' at p.jsonl:1; expected a number"
    assert failure(lambda completions: [None]) == "p.jsonl:1: no reward for this reply; None came from f"


def test_tensors_and_arrays_are_lists_too() -> None:
    import numpy as np

    assert stepped(TEXT, function_reward(lambda completions: np.array([0.25]), "f")).reward == 0.25


def test_functions_are_found_in_files_and_modules(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import neighbour\ndef score(completions): return [neighbour.VALUE]\n")
    (tmp_path / "neighbour.py").write_text("VALUE = 0.75\n")
    (part,) = load_rewards(f"{tmp_path}/mine.py:score", {}, JudgeConfig())
    assert (part.name, part.weight, stepped(TEXT, part).reward) == ("score", 1.0, 0.75)
    (part,) = load_rewards(None, {f"{tmp_path}/mine.py:score": 0.5}, JudgeConfig())
    assert stepped(TEXT, part).reward == 0.375


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (None, "prompts of your own want a reward: reward=my.py:score, rewards.my.py:score=0.5, or reward=judge"),
        ("score", "reward score: expected file.py:function, module:function, or judge"),
        ("{}/mine.py:scor", "reward {}/mine.py:scor: no function scor in {}/mine.py (did you mean score?)"),
        ("{}/mien.py:score", "reward: no such file {}/mien.py (did you mean {}/mine.py?)"),
        ("{}/broken.py:f", "reward {}/broken.py:f: {}/broken.py cannot be imported: ZeroDivisionError: division by zero"),
        ("no_such_module:f", "reward no_such_module:f: no_such_module cannot be imported: ModuleNotFoundError: "),
        ("{}/mine.py:nothing", "reward {}/mine.py:nothing: a reward function takes `completions`, as in def score("),
        ("judge", "the reward `judge` wants judge.url: judge.url=http://localhost:8000/v1 judge.model=<its name>"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_at_the_start(tmp_path: Path, reward: str | None, message: str) -> None:
    (tmp_path / "mine.py").write_text("def score(completions): return [1.0]\ndef nothing(): return [1.0]\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UsageError) as raised:
        load_rewards(reward and reward.replace("{}", str(tmp_path)), {}, JudgeConfig())
    assert str(raised.value).startswith(message.replace("{}", str(tmp_path)))


# Rows.


def written(folder: Path, rows: list[dict[str, Any]]) -> PromptsConfig:
    (folder / "p.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "length.py").write_text("def length(completions, answer): return [float(len(answer[0]))]\n")
    return PromptsConfig(name="file", path=str(folder / "p.jsonl"), eval_rows=5)


def asked(folder: Path, data: PromptsConfig, split: str, count: int, skip: int = 0, seed: int = 0) -> list[str]:
    scoring: dict[str, Any] = {"reward": f"{folder}/length.py:length", "rewards": {}, "judge": JudgeConfig()}
    problems = islice(prompt_stream(data, split, seed, skip, **scoring), count)
    starts: list[Any] = [problem.make(1)[0].reset() for problem in problems]
    return [str(start[-1]["content"]) for start in starts]


def test_train_prompts_come_reshuffled_each_epoch_and_eval_prompts_never_among_them(tmp_path: Path) -> None:
    data = written(tmp_path, [{"prompt": f"q{i}", "answer": "x"} for i in range(20)] + [{"prompt": "q0", "answer": "y"}])
    first, held_out = asked(tmp_path, data, "train", 34), asked(tmp_path, data, "eval", 99)
    assert len(held_out) == 4 and not set(held_out) & set(first)  # a fifth of 21
    assert sorted(first[:17]) == sorted(first[17:]) and first[:17] != first[17:]
    assert "q0" not in held_out  # it occurs twice
    assert asked(tmp_path, data, "train", 10, skip=12) == first[12:22]
    assert asked(tmp_path, data, "train", 17, seed=1) != first[:17]


def test_a_column_that_a_function_asks_for_must_be_there(tmp_path: Path) -> None:
    data = written(tmp_path, [{"prompt": f"q{i}", "anwser": "x"} for i in range(9)])
    with pytest.raises(UsageError) as raised:
        asked(tmp_path, data, "train", 1)
    assert str(raised.value) == (
        "reward length asks for 'answer', no column of p.jsonl (did you mean anwser?); beside the prompt it has anwser"
    )


def test_columns_may_be_renamed_and_bad_rows_are_counted(tmp_path: Path) -> None:
    data = written(tmp_path, [{"q": f"q{i}", "solution": "x"} for i in range(9)] + [{"q": "", "solution": "x"}])
    data.columns = {"prompt": "q", "answer": "solution"}
    with pytest.raises(UsageError, match=r"1 of 10 rows unusable, 10%.*nothing asked"):
        asked(tmp_path, data, "train", 1)
    data.max_bad = 0.1
    assert len(set(asked(tmp_path, data, "train", 8))) == 8


def test_a_prompt_may_be_text_messages_or_the_question_of_a_known_format() -> None:
    user = {"role": "user", "content": "hi"}
    assert read_prompt({"prompt": "hi", "x": 1}, "r:1") == Prompt("r:1", (user,), {"x": 1}, True)
    assert read_prompt({"prompt": [user], "x": 1}, "r:1") == Prompt("r:1", (user,), {"x": 1}, False)
    assert read_prompt({"question": "hi", "answer": "4"}, "r:1").columns == {"question": "hi", "answer": "4"}
    talk = [user, {"role": "assistant", "content": "ho"}]
    assert read_prompt({"messages": [*talk, user, talk[1]]}, "r:1").messages == (*talk, user)
    for row in ({"text": "hi"}, {"prompt": talk}, {"prompt": " "}, {"prompt": 3}, {"prompt": [{"content": "hi"}]}):
        with pytest.raises(RowProblem):
            read_prompt(row, "r:1")


# The judge.


class Server:
    """A chat API on this machine: answers with the given (status, text) pairs in turn, the last one for ever."""

    def __init__(self, answers: list[tuple[int, str]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                with lock:
                    self.at_once += 1
                    self.most_at_once = max(self.most_at_once, self.at_once)
                    status, text = answers[min(len(self.bodies), len(answers) - 1)]
                    self.bodies.append(json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))))
                    self.keys.append(handler.headers["Authorization"])
                threading.Event().wait(0.02)
                with lock:
                    self.at_once -= 1
                sent = json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else text
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(sent)))
                handler.end_headers()
                handler.wfile.write(sent.encode())

            def log_message(handler, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*answers: tuple[int, str]) -> Server:
        servers.append(Server(list(answers)))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def test_a_judge_reads_prompt_reply_and_columns_and_its_score_is_the_reward(serve, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server = serve((200, "It is right.\n**Score:** 0.8"))
    (tmp_path / "rubric.txt").write_text("{prompt} is {answer}; was said: {reply}; {unknown}")
    config = JudgeConfig(server.url, "big", str(tmp_path / "rubric.txt"), api_key_env="JUDGE_KEY")
    (part,) = load_rewards(None, {"judge": 0.5}, config)
    reply = {"role": "assistant", "content": "{answer}"}
    assert stepped(TEXT, part, reply=reply) == StepResult(0.4, metrics={"reward/judge": 0.8})
    assert server.bodies[0]["model"] == "big" and server.keys == ["Bearer secret"]
    assert server.bodies[0]["messages"][0]["content"] == "2+2= is 4; was said: {answer}; {unknown}"


def test_a_judge_is_asked_again_when_it_is_busy_but_not_when_it_refuses(serve) -> None:
    busy = serve((503, "starting"), (429, "slow down"), (200, "Score: 1"))
    assert stepped(TEXT, *load_rewards("judge", {}, JudgeConfig(busy.url, "m"))).reward == 1.0
    refusing = serve((401, "no\nkey"))
    with pytest.raises(JudgeError) as raised:
        stepped(TEXT, *load_rewards("judge", {}, JudgeConfig(refusing.url, "m")))
    assert str(raised.value) == f"judge at {refusing.url}/chat/completions: 401 Unauthorized: no key"
    assert len(refusing.bodies) == 1


def test_a_judge_that_is_not_there_or_slow_is_an_error_of_that_reply(serve) -> None:
    slow = JudgeConfig(serve((200, "Score: 1")).url, "m", timeout=0.001, retries=0)
    with pytest.raises(JudgeError, match=r"no answer within judge.timeout=0.001 seconds"):
        stepped(TEXT, *load_rewards("judge", {}, slow))
    with pytest.raises(JudgeError, match=r"^judge at http://127.0.0.1:9/chat/completions: "):
        stepped(TEXT, *load_rewards("judge", {}, JudgeConfig("http://127.0.0.1:9", "m", retries=0)))


def test_no_more_questions_than_allowed_are_asked_at_once_also_in_a_second_event_loop(serve) -> None:
    server = serve((200, "0.5"))
    judge = Judge(JudgeConfig(server.url, "m", in_flight=3))

    async def many() -> list[float]:
        return await asyncio.gather(*(judge.score("p", "r", {}) for _ in range(12)))

    assert asyncio.run(many()) == asyncio.run(many()) == [0.5] * 12
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("answer", "score"),
    [("0.25", 0.25), ("Score: 7/10", 0.7), ('{"score": 1}', 1.0), ("Score: 0.1, no: score is 0.9.", 0.9), (".5", 0.5)]
    + [("<think>Score: 0</think>Score: 1", 1.0)]
    + [(bad, None) for bad in ("good", "Score: 8", "Score: -1", "", "Score: 1/0")],
)
def test_a_score_is_read_from_the_end_of_an_answer_and_lies_within_0_and_1(answer: str, score: float | None) -> None:
    if score is not None:
        assert read_score(answer) == score
        return
    with pytest.raises(JudgeError):
        read_score(answer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (JudgeConfig("http://x"), "the reward `judge` wants judge.model: "),
        (JudgeConfig("localhost:8000", "m"), "judge.url=localhost:8000: expected an address"),
        (JudgeConfig("http://x", "m", api_key_env="NO_SUCH_KEY"), "judge.api_key_env=NO_SUCH_KEY: no such"),
        (JudgeConfig("http://x", "m", prompt="rubic.txt"), "judge.prompt: 'rubic.txt' is no file, and as a text it does"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_at_the_start(config: JudgeConfig, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_rewards("judge", {}, config)
    assert str(raised.value).startswith(message)
    with pytest.raises(UsageError, match="no reward asks the judge"):
        load_rewards("json:dumps", {}, JudgeConfig("http://x", "m"))


def test_runs_that_are_threads_may_load_one_file_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.2)\ndef score(completions): return [1.0]\n")
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: load_rewards(f"{tmp_path}/slow.py:score", {}, JudgeConfig()), range(4))
        assert [reward.name for (reward,) in found] == ["score"] * 4
