"""Environments whose policies write SQL, searches and programs: right ones are told from wrong ones, hostile ones contained."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs import code_problems, python_tool, search_tool, text_to_sql
from envs.database import Database, QueryError
from envs.env import Env, Message, Problem
from envs.sandbox import Unsandboxed, detect
from envs.tools import ToolError, call


def say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def first(problems: Iterator[Problem], count: int = 1) -> list[Problem]:
    return list(itertools.islice(problems, count))


def use(env: Env, tool: str, **arguments: object) -> str:
    return asyncio.run(call(env.tools, tool, arguments))


def refused(env: Env, tool: str, **arguments: object) -> str:
    with pytest.raises(ToolError) as caught:
        use(env, tool, **arguments)
    assert caught.value.kind == "failed"
    return str(caught.value)


def has_sandbox() -> bool:
    try:
        detect()
    except Unsandboxed:
        return False
    return True


sandboxed = pytest.mark.skipif(not has_sandbox(), reason="this machine can shut no program in")


# ---- text_to_sql


@pytest.fixture
def sql_env() -> Iterator[Env]:
    (problem,) = first(text_to_sql.problems(text_to_sql.Config(schemas=["shop"]), "train", 0))
    (env,) = problem.make(1)
    env.reset()
    yield env
    env.close()


def test_a_query_is_judged_by_its_rows_not_its_words() -> None:
    for problem in first(text_to_sql.problems(text_to_sql.Config(), "train", 3), 20):
        (env,) = problem.make(1)
        gold = env.question.sql  # type: ignore[attr-defined]
        asked = env.reset()
        assert isinstance(asked, list) and "SELECT" not in asked[0]["content"]
        for reply, reward in [(f"```sql\n{gold};\n```", 1.0), (f"SELECT * FROM ({gold})", 1.0), ("SELECT 17", 0.0), ("", 0.0)]:
            if reward == 1.0 and "ORDER BY" in gold and reply.startswith("SELECT"):
                continue
            assert env.step(say(reply)).reward == reward, (gold, reply)  # type: ignore[union-attr]
        env.close()


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DROP TABLE customers", "query: only reading is allowed: one SELECT"),
        ("INSERT INTO customers VALUES (1, 'x')", "query: only reading is allowed: one SELECT"),
        ("ATTACH DATABASE '/tmp/stolen.db' AS stolen", "query: only reading is allowed: one SELECT"),
        ("PRAGMA query_only = 0", "query: only reading is allowed: one SELECT"),
        ("SELECT load_extension('x')", "query: "),
        ("SELECT 1; SELECT 2", "query: one statement at a time"),
        ("SELECT anything FROM nowhere", "query: no such table: nowhere"),
        ("SELECT '\ud800'", "query: "),
        ("", "query: there is no SELECT"),
    ],
)
def test_a_hostile_query_is_one_line(sql_env: Env, sql: str, said: str) -> None:
    message = refused(sql_env, "query", sql=sql)
    assert message.startswith(said) and "\n" not in message


def test_a_query_without_end_is_stopped_and_a_large_result_is_cut(sql_env: Env) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
    started = time.monotonic()
    assert refused(sql_env, "query", sql=endless.format("max(i)")) == "query: stopped: the query takes too many steps"
    assert time.monotonic() - started < 5
    assert use(sql_env, "query", sql=endless.format("i")).endswith("... only the first 20 rows are shown")
    assert "too big" in refused(sql_env, "query", sql="SELECT zeroblob(1000000000)")
    assert sql_env.step(say(endless.format("i"))).reward == 0.0  # type: ignore[union-attr]


LONG = "printf('%.3900c', 'a')"
COUNTED = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
DOUBLED = "WITH c0 AS (SELECT 1 AS x)" + "".join(f", c{i} AS (SELECT 1 AS x FROM c{i - 1} a, c{i - 1} b)" for i in range(1, 40))


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        (f"SELECT replace({LONG}, 'a', 'aa')", "string or blob too big"),
        (COUNTED.format(f"sum({LONG} LIKE '%' || printf('%.1900c', 'a') || 'b' || i)"), "LIKE or GLOB pattern too complex"),
        (COUNTED.format(f"sum({LONG} || i GLOB '*[{'b' * 90}a]c')"), "more than 2 s of CPU time"),
        (COUNTED.format(f"count(DISTINCT {LONG} || i)"), "too much memory"),
        (f"{DOUBLED} SELECT * FROM c39", "too much memory"),
    ],
    ids=["value", "pattern", "slow", "distinct", "nesting"],
)
def test_no_query_takes_long(sql: str, said: str) -> None:
    database = Database("CREATE TABLE t (x)")
    started = time.thread_time()
    with pytest.raises(QueryError, match=said):
        database.query(sql, 5)
    assert time.thread_time() - started < 4


def test_a_database_does_not_change() -> None:
    database = Database("CREATE TABLE t (x); INSERT INTO t VALUES (1);")
    for sql in ("DELETE FROM t", "UPDATE t SET x = 2", "CREATE TABLE u (y)", "BEGIN", "VACUUM INTO '/tmp/x.db'"):
        with pytest.raises(QueryError):
            database.query(sql, 10)
    assert database.query("SELECT x FROM t", 10) == (["x"], [(1,)], False)


# ---- search


def test_a_search_finds_what_the_question_is_about() -> None:
    for problem in first(search_tool.problems(search_tool.Config(), "train", 1), 10):
        (env,) = problem.make(1)
        conversation = list(env.reset())  # type: ignore[arg-type]
        while calls := (reply := problem.solve(conversation) or {}).get("tool_calls"):
            found = use(env, "search", **calls[0]["function"]["arguments"])
            conversation += [reply, {"role": "tool", "name": "search", "content": found}]
        assert env.step(reply).reward == 1.0 and env.step(say("nobody knows")).reward == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize("query", ['" OR 1', "a NEAR/99999 b", "title:x AND", "*", "((((", "x" * 100_000, "'; DROP TABLE x"])
def test_a_query_is_words_and_never_syntax(query: str) -> None:
    (problem,) = first(search_tool.problems(search_tool.Config(people=20), "train", 0))
    (env,) = problem.make(1)
    env.reset()
    try:
        assert isinstance(use(env, "search", query=query), str)
    except ToolError as error:
        assert "\n" not in str(error)


# ---- python and code


def python_env(**changes: float) -> Env:
    config = python_tool.Config(cpu_seconds=1, seconds=4, memory_mb=256, disk_mb=2)
    for key, value in changes.items():
        setattr(config, key, value)
    (problem,) = first(python_tool.problems(config, "train", 0))
    return problem.make(1)[0]


@sandboxed
def test_a_program_runs_and_its_output_comes_back() -> None:
    env = python_env()
    assert use(env, "python", code="```python\nprint(6 * 7)\n```").strip() == "42"
    assert use(env, "python", code="x = 1") == "(the program printed nothing)"
    assert "ZeroDivisionError" in refused(env, "python", code="1 / 0")


@sandboxed
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "x = bytearray(1 << 31)",
        "open('big', 'wb').write(bytes(1 << 28))",
        "print(open('/etc/passwd').read())",
        "open('/tmp/cook-was-here', 'w').write('x')",
        "import socket; socket.create_connection(('1.1.1.1', 80), 2)",
        "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    ],
    ids=["loop", "sleep", "fork", "exec", "memory", "disk", "read", "write", "network", "kill"],
)
def test_a_hostile_program_is_contained(code: str) -> None:
    started = time.monotonic()
    assert refused(python_env(), "python", code=code)
    assert time.monotonic() - started < 10


CODE = "```python\n{}\n```"


@pytest.fixture(scope="module")
def coding() -> tuple[Env, str, str]:
    """An env, its gold reply, the name of the function."""
    (problem,) = first(code_problems.problems(code_problems.Config(cpu_seconds=2, seconds=6), "train", 0))
    (env,) = problem.make(1)
    gold = problem.solve([])
    assert gold
    return env, str(gold["content"]), env.task["entry_point"]  # type: ignore[attr-defined]


@sandboxed
def test_tests_decide_about_code(coding: tuple[Env, str, str]) -> None:
    env, gold, name = coding
    result = env.step(say(gold))
    assert (result.reward, result.metrics["format"]) == (1.0, 1.0)  # type: ignore[union-attr]
    assert env.step(say(f"def {name}(*args):\n    return None")).reward == 0.0  # type: ignore[union-attr]


@sandboxed
@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("(x for x in range(3))", "[0, 1, 2]"),
        ("__import__('collections').namedtuple('P', 'x y')(1, 2)", "(1, 2)"),
        ("{1.5: [None, True, b'x', 'y', 2j]}", "{1.5: [None, True, b'x', 'y', 2j]}"),
        ("lambda: {3}", "{3}"),
    ],
)
def test_plain_data_reaches_the_tests_as_it_is(result: str, expected: str, tmp_path: Path) -> None:
    test = f"def check(f):\n    r = f()\n    r = r() if callable(r) else r\n    assert type({expected})(r) == {expected}"
    assert reward_of(tmp_path, test, f"def f():\n    return {result}") == 1.0


def reward_of(folder: Path, test: str, answer: str, prompt: str = "def f():\n") -> float:
    """Of an answer to a problem in a file."""
    row = {"prompt": prompt, "test": test, "entry_point": "f"}
    lines = [json.dumps(row | {"prompt": f"# {number}\n{prompt}"}) + "\n" for number in range(6)]
    (folder / "tasks.jsonl").write_text("".join(lines))
    (problem,) = first(code_problems.problems(code_problems.Config(path=str(folder / "tasks.jsonl")), "train", 0))
    result = problem.make(1)[0].step(say(CODE.format(answer)))
    return result.reward  # type: ignore[union-attr]


@sandboxed
@pytest.mark.parametrize(
    ("check", "answer"),
    [
        ("x = [3, 1]; f(x); assert x == [1, 3]", "def f(x): x.sort()"),
        ("x = {1: 2}; f(x); assert x == {3: 4}", "def f(x): x.clear(); x[3] = 4"),
        ("assert f(lambda x: x + 1, iter([1, 2])) == [2, 3]", "def f(g, xs): return [g(x) for x in xs]"),
        ("assert [x for x, _ in zip(f(), 'abc')] == [0, 1, 2]", "import itertools\ndef f(): return itertools.count()"),
        ("assert f(7, times=2) == helper(7) * 2", "def helper(x): return x\ndef f(x, times): return x * times"),
        ("assert f() == 10 ** 5000 and f() is not True", "def f(): return 10 ** 5000"),
        (
            "\n    try: f()\n    except ValueError as e: assert str(e) == 'no'",
            "class E(ValueError): pass\ndef f(): raise E('no')",
        ),
        ("assert str(f()) == 'nan'", "def f(): return float('nan')"),
    ],
    ids=["list", "dict", "callback", "endless", "helper", "integer", "error", "nan"],
)
def test_what_tests_do_to_functions_works_across_the_pipe(check: str, answer: str, tmp_path: Path) -> None:
    assert reward_of(tmp_path, f"def check(f): {check}", answer) == 1.0


@sandboxed
def test_an_object_of_a_class_of_its_own_is_no_result(tmp_path: Path) -> None:
    answer = "class Any:\n    def __eq__(self, other): return True\ndef f(): return Any()"
    said = "try: f()\n    except TypeError as e: assert str(e).endswith('not an object of Any')\n    else: assert 0"
    assert reward_of(tmp_path, f"def check(f):\n    {said}", answer) == 1.0
    assert reward_of(tmp_path, "def check(f): assert f() == 1", answer) == 0.0


@sandboxed
def test_tests_keep_pythons_names_and_the_prompts(tmp_path: Path) -> None:
    prompt = "def size(x):\n    return len(x)\n\ndef f():\n"
    test = "def check(f): assert size('abc') == 3 and abs(f() - 4) < 1"
    for lie in ("def size(x): return 3", "def abs(x): return 0", "def len(x): return 3", "def check(f): pass"):
        assert reward_of(tmp_path, test, f"{lie}\ndef f(): return 9", prompt) == 0.0
    assert reward_of(tmp_path, test, "def f(): return 4", prompt) == 1.0


@sandboxed
@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('OK'); raise SystemExit(0)",
        "class Any:\n        def __eq__(self, other): return True\n    return Any()",
        "class Any(int):\n        def __eq__(self, other): return True\n    return [Any()]",
        "class Any:\n        def __eq__(self, other): return True\n    [a.append(Any()) for a in args if type(a) is list]",
        "while True: pass",
        "import builtins; builtins.AssertionError = type('E', (BaseException,), {}); return 0",
    ],
    ids=["exit", "_exit", "print", "eq", "subclass", "argument", "loop", "assert"],
)
def test_tricks_do_not_pass(coding: tuple[Env, str, str], body: str) -> None:
    env, _, name = coding
    assert env.step(say(CODE.format(f"def {name}(*args):\n    {body}"))).reward == 0.0  # type: ignore[union-attr]


FRAMES = """
import os, sys
def walk():
    frame = sys._getframe()
    while frame:
        for found in (frame.f_locals, frame.f_globals, frame.f_locals.get("task")):
            if isinstance(found, dict):
                yield found
        frame = frame.f_back
"""


@sandboxed
@pytest.mark.parametrize(
    "answer",
    [
        FRAMES
        + "for found in walk():\n    if 'token' in found: os.write(1, f\"\\n{found['token']}\\n\".encode()); os._exit(0)",
        FRAMES + "for found in walk():\n    if 'test' in found: found['test'] = 'def check(f): pass'",
        "import os\nfor number in range(32):\n    try: os.write(number, b'\\npassed\\n')\n    except OSError: pass",
        "print('\\npassed'); raise SystemExit(0)",
    ],
    ids=["token", "tests", "descriptors", "passed"],
)
def test_an_answer_finds_nothing_of_its_tests(coding: tuple[Env, str, str], answer: str) -> None:
    env, _, name = coding
    inside = answer.replace("\n", "\n    ")
    for reply in (f"{answer}\ndef {name}(*args): return None", f"def {name}(*args):\n    {inside}"):
        assert env.step(say(CODE.format(reply))).reward == 0.0  # type: ignore[union-attr]
