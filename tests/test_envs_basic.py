"""Environments that need nothing beyond a reply: gold scores 1, junk does not, seeds fix problems, answers are found."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from envs import arithmetic, calculator, gsm8k, guess_number, gym_tasks, math_problems
from envs.answers import boxed, final_number, first_number, is_number, numbers, tagged, text_of
from envs.checker import Checker
from envs.env import Env, Message, Problem, StepResult
from envs.streams import EVAL_SHARE, digest, held_apart, hub_rows, read_jsonl, reshuffled, split_rows
from envs.tools import ToolError, call


def say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def play(env: Env, policy: Callable[[Sequence[Message]], Message | None]) -> tuple[float, StepResult]:
    """Total reward and the last result, as a rollout driver would get them."""
    messages, total = list(env.reset()), 0.0  # type: ignore[arg-type]
    for _ in range(100):
        reply = policy(messages)
        assert reply is not None
        messages.append(reply)
        if calls := reply.get("tool_calls"):
            for each in (one["function"] for one in calls):
                text = asyncio.run(call(env.tools, each["name"], each["arguments"]))
                messages.append({"role": "tool", "name": each["name"], "content": text})
            continue
        result = env.step(reply)
        assert isinstance(result, StepResult)
        total += result.reward
        messages += result.messages
        if result.done:
            return total, result
    raise AssertionError("no end after 100 turns")


def first(problems: Iterator[Problem], count: int) -> list[Problem]:
    return list(itertools.islice(problems, count))


def questions(problems: Iterator[Problem], count: int) -> list[str]:
    return [asked(problem) for problem in first(problems, count)]


def asked(problem: Problem) -> str:
    if isinstance(problem, guess_number.Secret):  # whose question does not tell the secret
        return str(problem.new().secret)
    return json.dumps(problem.make(1)[0].reset())


GSM_ROWS = [{"question": f"What is {i} and 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(60)]
MATH_ROWS = [{"problem": f"Halve {i}.", "solution": rf"So it is $\boxed{{\frac{{{i}}}{{2}}}}$."} for i in range(60)]


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def available(tmp_path: Path) -> list[tuple]:
    """(module, config) of every env here whose package is installed."""
    found = [
        (arithmetic, arithmetic.Config()),
        (arithmetic, arithmetic.Config(operations="+-*", digits=3, terms=3)),
        (calculator, calculator.Config()),
        (guess_number, guess_number.Config()),
        (gsm8k, gsm8k.Config(path=write(tmp_path / "gsm.jsonl", GSM_ROWS))),
        (gym_tasks, gym_tasks.Config()),
        (gym_tasks, gym_tasks.Config(tasks={"chain_sum": 2, "spell_backward": 1}, params={"chain_sum": {"max_terms": 3}})),
        (math_problems, math_problems.Config(path=write(tmp_path / "math.jsonl", MATH_ROWS))),
    ]
    packages = ((gym_tasks, "reasoning_gym"), (math_problems, "math_verify"))
    missing = {module for module, package in packages if not has(package)}
    return [(module, config) for module, config in found if module not in missing]


def has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_gold_scores_1_and_junk_0(tmp_path):
    for module, config in available(tmp_path):
        for split in ("train", "eval"):
            for problem in first(module.problems(config, split, 0), 4):
                for env in problem.make(2):
                    reward, result = play(env, problem.solve)
                    assert (reward, result.metrics["correct"]) == (1.0, 1.0), module.__name__
                for text in ("", "I do not know.", "-1234567", "<answer></answer>", "\\boxed{}", "#### "):
                    reward, result = play(problem.make(1)[0], lambda _, text=text: say(text))
                    assert (reward, result.metrics["correct"]) == (0.0, 0.0), (module.__name__, text)


def test_a_seed_fixes_the_problems(tmp_path):
    for module, config in available(tmp_path):
        for split, count in (("train", 80), ("eval", 3)):
            one = questions(module.problems(config, split, 1), count)
            assert one == questions(module.problems(config, split, 1), count)
            assert one != questions(module.problems(config, split, 2), count) or split == "eval"


def test_train_never_shows_what_eval_holds(tmp_path):
    for module, config in available(tmp_path):
        train = {q for seed in range(3) for q in questions(module.problems(config, "train", seed), 300)}
        held = {q for seed in range(3) for q in questions(module.problems(config, "eval", seed), 100)}
        assert train and held and not train & held, module.__name__


def test_an_eval_stream_has_each_problem_once_and_ends():
    sums = questions(arithmetic.problems(arithmetic.Config(), "eval", 0), 1000)
    assert 5 < len(sums) == len(set(sums)) < 40
    assert len(questions(arithmetic.problems(arithmetic.Config(), "train", 0), 1000)) == 1000


def test_the_split_word_is_checked_before_the_first_problem(tmp_path):
    for module, config in available(tmp_path):
        with pytest.raises(ValueError, match="split 'test': expected train or eval"):
            module.problems(config, "test", 0)


def test_importing_the_modules_is_light():
    names = ("arithmetic", "calculator", "guess_number", "gsm8k", "gym_tasks", "math_problems", "tools")
    code = f"import sys; [__import__('envs.' + n) for n in {names}]; print([m for m in sys.modules if m in {HEAVY}])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed == "[]\n"


ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "datasets", "reasoning_gym", "sympy", "math_verify", "pydantic", "numpy")


# ---- answers

FINAL = [
    ("#### 42", "42"), ("so 5 + 5 = 10\n#### 10\nThanks 3", "10"), ("#### 1 apple\n#### 2", "2"), ("#### $1,234.50", "1234.5"),
    ("####42.", "42"), ("#### The answer is 7", "7"), ("#### Answer: -3", "-3"), ("#### 3 * 4 = 12", "12"),
    ("#### Step 1\nadd 2 and 3\nto get 5", "5"), ("#### 50%", "50"), (r"\boxed{42} or 43", "42"), (r"\boxed{x = 42}", "42"),
    (r"first \boxed{1}, no: \boxed{2}", "2"), (r"$\boxed{\$12{,}000}$", "12000"), (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{-\dfrac{3}{4}}", "-3/4"), (r"\boxed{\frac12}", "1/2"), ("It is 12, no, 13.", "13"), ("He pays $18.", "18"),
    ("She has 1,000,000 left", "1000000"), ("**72**", "72"), ("-5", "-5"), ("−5", "-5"), ("x = -5 degrees", "-5"),
    ("it costs -$5", "-5"), ("37-48", "48"), ("about .5 of it", "1/2"), ("10am", "10"), ("3/4", "3/4"), ("2e3", "2000"),
    ("7/0", None), ("", None), ("none", None), ("CO2 and x1", None), ("1,23", "23"), ("between 1 and 2,000", "2000"),
    ("9" * 500, "9" * 400), ("1e999999", "1e999"), ("1" + "0" * 399, "1" + "0" * 399),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), FINAL)
def test_the_number_a_solution_ends_on(text, number):
    assert final_number(text) == (None if number is None else Fraction(number))


def test_numbers_in_order():
    assert list(numbers("37 + 48 = 85, not 8.5e1 or 1/3")) == [37, 48, 85, 85, Fraction(1, 3)]
    assert first_number("The sum: 85. It is 37 + 48.") == 85
    assert [is_number(text) for text in ("85", " 85.\n", "-$1,000.50", "85!", "it is 85", "")] == [True] * 3 + [False] * 3


def test_boxes_and_tags():
    assert boxed(r"\boxed{a_{1}} and \fbox{\frac{1}{2}} and \boxed{open") == r"\frac{1}{2}"
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert boxed("none") is None
    assert tagged("<answer>1</answer> no <answer>\n2 </answer> <answer>3") == "2"
    assert tagged("<answer>1") is tagged("1</answer>") is None


def test_thinking_is_no_answer():
    assert text_of(say("<think>5 or 6?</think>\n7 ")) == "7"
    assert text_of(say("<think>5 or 6?")) == ""
    assert text_of({"role": "assistant", "content": [{"type": "text", "text": "7"}]}) == "7"
    assert text_of({"role": "assistant", "content": None}) == ""


def test_answers_are_found_quickly_in_hostile_text():
    start = time.monotonic()
    for piece in ("\\boxed{", "9,999", "<answer>", "####", "\\frac{1}{", "1/", "1.", "-", "{", "\\boxed{" + "{" * 50):
        text = piece * (20_000 // len(piece))
        final_number(text), boxed(text), tagged(text), is_number(text)
    assert time.monotonic() - start < 2


# ---- the sets


def test_arithmetic_takes_the_last_number():
    env = arithmetic.Arithmetic("3 + 8", 11)
    assert env.reset() == [{"role": "user", "content": "What is 3 + 8? Reply with just the number."}]
    scores = [(env.step(say(text)).reward, env.step(say(text)).metrics["format"]) for text in
              ("11", "11.", "11 is the sum of 3 and 8", "3 + 8 = 11", "111", "1 1", "eleven")]  # fmt: skip
    assert scores == [(1, 1), (1, 1), (0, 0), (1, 0), (0, 1), (0, 0), (0, 0)]


def test_arithmetic_keeps_to_its_config():
    config = arithmetic.Config(operations="*-", digits=2, terms=3)
    for problem in first(arithmetic.problems(config, "train", 0), 50):
        expression = problem.make(1)[0].expression  # type: ignore[attr-defined]
        assert len(expression.split()) == 5 and "+" not in expression
        assert eval(expression) == int(problem.answer)  # type: ignore[attr-defined]


def test_guess_number_rewards_fewer_guesses_and_tells_what_it_wants():
    env = guess_number.GuessNumber(secret=7, low=1, high=20, max_turns=10)
    assert env.reset()[0]["content"].endswith("You have 10 guesses.")
    replies = ["10", "between 1 and 20 I say 5", "many", "99", "6.5", "8"]
    said = [env.step(say(text)).messages[0]["content"] for text in replies]
    wants = "reply with one whole number from 1 to 20"
    assert said == ["lower", "higher", wants, wants, wants, "lower"]
    last = env.step(say("7"))
    assert (last.reward, last.done) == (5 / 7, True)
    assert last.metrics == {"correct": 1.0, "format": 5 / 7}


def test_guess_number_ends_when_no_guesses_are_left():
    env = guess_number.GuessNumber(secret=7, low=1, high=20, max_turns=2)
    results = [env.step(say("8")), env.step(say("8"))]
    assert [(r.done, r.reward, len(r.messages)) for r in results] == [(False, 0, 1), (True, 0, 0)]


@pytest.mark.parametrize(("low", "high"), [(1, 20), (-3, 4), (0, 100)])
def test_halving_finds_every_secret_with_full_reward(low, high):
    config = guess_number.Config(low=low, high=high)
    for split in ("train", "eval"):
        for problem in first(guess_number.problems(config, split, 0), high - low + 1):
            assert play(problem.make(1)[0], problem.solve)[0] == 1.0


def test_calculator_says_whether_it_was_used_and_refuses_in_one_line():
    problem = first(calculator.problems(calculator.Config(), "train", 0), 1)[0]
    _, result = play(problem.make(1)[0], problem.solve)
    assert result.metrics == {"correct": 1.0, "format": 1.0, "calculated": 1.0}
    env = calculator.Calculation("What is 2 * 3?", Fraction(6))
    assert env.step(say("2 * 3 = 6")).metrics == {"correct": 1.0, "format": 0.0, "calculated": 0.0}
    for expression, said in (("9**9**9", "calculate: '9**9**9' is too large"), ("1/0", "calculate: '1/0' divides by zero")):
        with pytest.raises(ToolError, match=f"^{said.replace('*', '[*]')}$"):
            asyncio.run(call(env.tools, "calculate", {"expression": expression}))
    assert asyncio.run(call(env.tools, "calculate", {"expression": "10 / 4"})) == "2.5"


def test_gsm8k_reads_any_form_of_the_answer():
    env = gsm8k.WordProblem("?", Fraction(1200))
    texts = ("#### 1,200", "so $1200.00", r"\boxed{1200}", "1200 or 1300")
    assert [env.step(say(text)).reward for text in texts] == [1, 1, 1, 0]
    assert [env.step(say(text)).metrics["format"] for text in ("#### 1,200", "1200")] == [1, 0]


MATH_VERDICTS = [
    (r"\frac{1}{2}", r"\boxed{0.5}", 1), (r"\frac{1}{2}", r"It is $\frac12$.", 1), ("x^2+1", r"\boxed{1 + x^2}", 1),
    ("(1,2)", r"\boxed{(1, 2)}", 1), (r"\text{even}", r"\boxed{even}", 1), ("42", "so the answer is 42", 1),
    ("42", r"\boxed{43}", 0), ("42", r"42, that is \boxed{}", 0), ("5", "__import__('os').system('exit 1')", 0),
    ("5", r"\boxed{" + "(" * 600 + "}", 0),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "reply", "reward"), MATH_VERDICTS)
def test_math_compares_values(gold, reply, reward):
    pytest.importorskip("math_verify")
    env = math_problems.MathProblem("?", gold)
    assert asyncio.run(asyncio.to_thread(env.step, say(reply))).reward == reward  # as a rollout does, in a thread


def test_math_takes_the_answer_or_the_box_of_the_solution(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"problem": "a", "answer": 5}, {"question": "b", "answer": r"\boxed{6}"}]
    rows.append({"problem": "c", "solution": r"\boxed{7}"})
    config = math_problems.Config(path=write(tmp_path / "m.jsonl", rows))
    problems = first(math_problems.problems(config, "train", 0), 3)
    assert {p.answer for p in problems} == {r"\boxed{5}", r"\boxed{6}", r"\boxed{7}"}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_check_that_does_not_end_is_ended_and_the_next_one_works():
    pytest.importorskip("math_verify")
    checks = Checker("math", seconds=1)
    try:
        start = time.monotonic()
        assert checks.ask(r"\boxed{5}", r"\boxed{9^{9^{9^9}}}") is None
        assert checks.ask("x") is None  # an error inside
        assert checks.ask(r"\boxed{5}", "10/2") == 1.0
        assert time.monotonic() - start < 15
    finally:
        checks.close()


# ---- reasoning_gym


def gym(task: str, **settings) -> gym_tasks.GymTask:
    pytest.importorskip("reasoning_gym")
    problem = first(gym_tasks.problems(gym_tasks.Config(task=task, **settings), "train", 0), 1)[0]
    env = problem.make(1)[0]
    assert isinstance(env, gym_tasks.GymTask)
    return env


def test_the_table_of_tasks_is_the_package_s():
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    assert set(gym_tasks.TASKS) == set(DATASETS) - {"composite"}


def test_answers_stand_in_tags_or_are_the_whole_reply():
    env = gym("leg_counting")
    answer = env.entry["answer"]
    texts = (answer, f" {answer}\n", f"So <answer>{answer}</answer>.", f"It is {answer}", f"<answer>{answer}0</answer>")
    assert [env.step(say(text)).reward for text in texts] == [1, 1, 1, 0, 0]
    strict = gym("leg_counting", answer="tags")
    results = [strict.step(say(text)) for text in texts]
    assert [(r.reward, r.metrics["format"]) for r in results] == [(0, 0), (0, 0), (1, 1), (0, 0), (0, 1)]


def test_partial_credit_is_by_choice_and_never_for_junk():
    text = "{answer} legs"
    env = gym("leg_counting", partial=True)
    assert 0 < env.step(say(text.format(**env.entry))).reward < 1
    assert gym("leg_counting").step(say(text.format(**env.entry))).reward == 0
    for task in ("countdown", "spell_backward", "propositional_logic", "palindrome_generation", "game_of_life_halting"):
        assert gym(task, partial=True).step(say("I do not know")).reward == 0


def test_a_scorer_that_raises_gives_0_and_is_counted():
    env = gym("prime_factorization")
    assert env.step(say("two times three")).metrics == {"correct": 0.0, "score_error": 1.0}
    assert env.step(say(env.entry["answer"])).metrics == {"correct": 1.0, "score_error": 0.0}


def test_game_of_life_halting_wants_true_or_false():
    for problem in first(gym_tasks.problems(gym_tasks.Config(task="game_of_life_halting"), "train", 0), 6):
        env = problem.make(1)[0]
        truth = env.entry["answer"]  # type: ignore[attr-defined]
        scores = [env.step(say(text)).reward for text in (truth, truth.lower() + ".", "junk", str(truth != "True"))]  # type: ignore[union-attr]
        assert scores == [1, 1, 0, 0]


def test_a_task_without_one_answer_has_no_solve():
    pytest.importorskip("reasoning_gym")
    problem = first(gym_tasks.problems(gym_tasks.Config(task="graph_color"), "train", 0), 1)[0]
    assert problem.solve(problem.make(1)[0].reset()) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("task", sorted(gym_tasks._HARMLESS))
def test_scorers_that_evaluate_replies_run_nothing_and_end(task, tmp_path):
    env, trace = gym(task), tmp_path / "trace"
    start = time.monotonic()
    for text in (
        f"__import__('pathlib').Path({str(trace)!r}).touch()", f"open({str(trace)!r}, 'w')", "9**9**9**9", "1e999999999",
        "[" + "'a'for x in'aaaaaaaaaa'" + "for y in'aaaaaaaaaa'" * 20 + "]", "(" * 400 + ")" * 400, "x" * 5000,
    ):  # fmt: skip
        assert env.step(say(text)).reward == 0
    assert not trace.exists()
    assert env.step(say(env.entry["answer"])).reward == 1
    assert time.monotonic() - start < 20


def test_a_mixture_keeps_its_weights_and_tags():
    pytest.importorskip("reasoning_gym")
    config = gym_tasks.Config(tasks={"chain_sum": 3, "leg_counting": 1}, params={"chain_sum": {"min_terms": 2, "max_terms": 2}})
    tags = Counter(problem.tag for problem in first(gym_tasks.problems(config, "train", 0), 400))
    assert set(tags) == {"chain_sum", "leg_counting"} and 270 < tags["chain_sum"] < 330


def test_a_system_prompt_is_a_text_or_a_name():
    assert gym("chain_sum", system_prompt=None).reset()[0]["role"] == "user"
    assert gym("chain_sum", system_prompt="Be brief.").reset()[0] == {"role": "system", "content": "Be brief."}
    assert "<answer>" in gym("chain_sum", system_prompt="direct").reset()[0]["content"]


# ---- mistakes

TAKES = "it takes max_animals, max_instances, min_animals, min_instances"
MISTAKES = [
    (arithmetic, {"operations": "+/"}, "env.operations='+/': expected some of + - *, e.g. '+-'"),
    (arithmetic, {"digits": 0}, "env.digits=0 env.terms=2: expected 1 to 9 digits and 2 to 9 terms"),
    (calculator, {"digits": 1}, "env.digits=1: expected 2 to 12"),
    (calculator, {"stories": 2.0}, "env.stories=2.0: expected a share, 0 to 1"),
    (guess_number, {"low": 5, "high": 5}, "env.low=5 env.high=5: expected five numbers or more to choose from"),
    (guess_number, {"max_turns": 0}, "env.max_turns=0: expected at least 1 guess"),
    (gym_tasks, {"task": "leg_count"},
     "reasoning_gym has no task 'leg_count' (did you mean leg_counting?)"),
    (gym_tasks, {"tasks": {"chain_sum": 0.0}},
     "env.tasks.chain_sum=0: a weight is a positive number; to drop it, leave it out"),
    (gym_tasks, {"params": {"animals": 3}},
     f"env.params of leg_counting: LegCountingConfig.__init__() got an unexpected keyword argument 'animals'; {TAKES}"),
    (gym_tasks, {"params": {"min_animals": 0}}, f"env.params of leg_counting: min_animals must be positive; {TAKES}"),
    (gym_tasks, {"tasks": {"chain_sum": 1}, "params": {"max_terms": 3}},
     "env.params.max_terms: with env.tasks, params are given by task, one of chain_sum"),
    (gym_tasks, {"answer": "tag"}, "env.answer=tag: expected any or tags"),
    (gym_tasks, {"system_prompt": "simpel"},
     "env.system_prompt=simpel: expected a sentence, null, or one of default, simple, direct, chain_of_draft, DeepSeekZero"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "settings", "said"), MISTAKES)
def test_a_bad_config_is_refused_at_once_in_one_line(module, settings, said):
    if module is gym_tasks:
        pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError) as caught:
        module.problems(module.Config(**settings), "train", 0)
    assert str(caught.value) == said


def test_a_kind_of_problem_that_is_exhausted_ends_eval_and_is_refused_in_train():
    held = next(word for word in map(str, itertools.count()) if digest(word) % EVAL_SHARE == 0)
    trained = next(word for word in map(str, itertools.count()) if digest(word) % EVAL_SHARE != 0)
    assert list(held_apart(itertools.cycle([held, trained]), str, "eval")) == [held]
    assert first(held_apart(itertools.cycle([held, trained]), str, "train"), 3) == [trained] * 3
    with pytest.raises(ValueError, match="all problems of this kind are held out for evaluation"):
        next(held_apart(itertools.repeat(held), str, "train"))


def test_a_file_is_read_line_by_line_and_bad_ones_are_named(tmp_path):
    def said(text: str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            read_jsonl(str(path), ["problem|question", "answer"])
        return str(caught.value).replace(str(tmp_path), "")

    good = '{"question": "q\u2028", "answer": 0}\n'
    assert said(good + "\n{") == (
        "rows.jsonl:3 is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    )
    assert said("[1]") == "rows.jsonl:1 is not an object with problem|question, answer: [1]"
    has = "it has question, answer"
    assert said(good + '{"question": " ", "answer": 1}') == f"rows.jsonl:2 has no text in problem or question; {has}"
    assert said(good + '{"question": "q", "answer": null}') == f"rows.jsonl:2 has no text in answer; {has}"
    assert said("\n") == "env.path=/rows.jsonl has no rows"
    with pytest.raises(ValueError, match=r"^env.path=nowhere.jsonl cannot be read \(.*\): expected a file with one"):
        read_jsonl("nowhere.jsonl", [])


def test_an_answer_without_a_number_is_refused(tmp_path):
    path = write(tmp_path / "g.jsonl", [{"question": "Why?", "answer": "Because."}])
    with pytest.raises(ValueError, match=r"^the answer 'Because.' to 'Why\?' ends on no number: expected '... #### 42'$"):
        gsm8k.problems(gsm8k.Config(path=path), "train", 0)


def test_a_hub_set_without_network_is_one_line(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^hub data set nobody/none cannot be loaded \(.*\); or use a file: "):
        hub_rows("nobody/none", None, "train")


def test_rows_are_split_once_and_reshuffled_each_epoch():
    rows = [*range(50), 7, 7]
    train, held = (split_rows(rows, str, 5, split) for split in ("train", "eval"))
    assert sorted(train + held) == sorted(rows) and len(held) == 5
    assert (7 in held) is (held.count(7) == 3)
    assert split_rows(rows, str, 100, "eval") and len(split_rows(rows, str, 100, "eval")) <= 10
    epochs = list(itertools.islice(reshuffled(train, "train", 0), 3 * len(train)))
    parts = [epochs[i : i + len(train)] for i in range(0, len(epochs), len(train))]
    assert all(sorted(part) == sorted(train) for part in parts) and parts[0] != parts[1] != parts[2]
    assert sorted(reshuffled(held, "eval", 0)) == sorted(held)
    assert list(reshuffled([], "train", 0)) == []
