"""Questions over a corpus behind a search tool: a made-up world, or documents of yours."""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from envs.answers import text_of
from envs.env import Env, Message, Problem, StepResult
from envs.facts import Asked, Document, world
from envs.streams import Row, check_split, generator, read_jsonl, reshuffled, split_rows
from envs.tools import ToolError

INSTRUCTION = "Look it up with the tool `search`, then reply with the answer only."
MAX_WORDS = 32  # of a query; SQLite's expressions have a depth
_ARTICLES = {"a", "an", "the"}


@dataclass
class Config:
    path: str | None = None  # jsonl: documents {"text", "title"}, questions {"question", "answer"}, or all in one row
    people: int = 200  # of the made-up world, 20 or more; companies and towns come with them
    two_steps: float = 0.5  # share of its questions that need two searches
    results: int = 3  # passages that a search shows
    passage_words: int = 120  # longer documents are cut into passages
    eval_rows: int = 200  # questions held out, at most a fifth


@final
class Index:
    """Full-text search in memory, made at the first search; threads take turns. A query is words, never SQLite's syntax."""

    def __init__(self, documents: Sequence[Document], passage_words: int) -> None:
        self._documents, self._passage_words = documents, passage_words
        self._connection: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def search(self, query: str, limit: int) -> list[Document]:
        words = re.findall(r"\w+", query)[:MAX_WORDS]
        if not words:
            raise ToolError("failed", "search: there is no word in the query")
        match = " OR ".join(f'"{word}"' for word in words)
        with self._lock:
            if self._connection is None:
                self._connection = self._made()
            sql = "SELECT title, text FROM passages WHERE passages MATCH ? ORDER BY rank, rowid LIMIT ?"
            return [Document(title, text) for title, text in self._connection.execute(sql, (match, limit))]

    def _made(self) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.execute("CREATE VIRTUAL TABLE passages USING fts5(title, text, tokenize='porter unicode61')")
        for document in self._documents:
            rows = [(document.title, passage) for passage in _passages(document.text, self._passage_words)]
            connection.executemany("INSERT INTO passages VALUES (?, ?)", rows)
        return connection


def _passages(text: str, num_words: int) -> list[str]:
    words = text.split()
    if len(words) <= num_words:
        return [text.strip()]
    return [" ".join(words[start : start + num_words]) for start in range(0, len(words), num_words)]


@final
class SearchTool(Env):
    """Reward 1 when the reply ends on the answer; case, punctuation and articles do not count. `searched` counts searches."""

    def __init__(self, asked: Asked, index: Index, num_results: int) -> None:
        self.asked, self.index, self.num_results = asked, index, num_results
        self.num_searches = 0
        self.tools = [self.search]

    def reset(self) -> list[Message]:
        return [{"role": "user", "content": f"{self.asked.question} {INSTRUCTION}"}]

    def search(self, query: str) -> str:
        """Search the documents and read the passages that fit best.

        Args:
            query: Words to look for, such as a name
        """
        self.num_searches += 1
        found = self.index.search(query, self.num_results)
        return "\n\n".join(f"{each.title}\n{each.text}".strip() for each in found) or "nothing found"

    def step(self, reply: Message) -> StepResult:
        text = text_of(reply)
        correct = float(any(ends_on(text, answer) for answer in self.asked.answers))
        metrics = {"correct": correct, "format": float("\n" not in text), "searched": float(self.num_searches)}
        return StepResult(correct, metrics=metrics)


def ends_on(text: str, answer: str) -> bool:
    said, wanted = _plain(text), _plain(answer)
    return bool(wanted) and said[-len(wanted) :] == wanted


def _plain(text: str) -> list[str]:
    """The words that count: 'The Orla, in 1,250.' is orla in 1250."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", text)
    return [word for word in re.findall(r"\w+(?:\.\w+)*", text) if word not in _ARTICLES]


@final
@dataclass(frozen=True)
class SearchProblem(Problem):
    asked: Asked
    index: Index
    num_results: int
    tag: str = "search"

    def make(self, group_size: int) -> list[Env]:
        return [SearchTool(self.asked, self.index, self.num_results) for _ in range(group_size)]

    def solve(self, messages: Sequence[Message]) -> Message:
        num_searches = sum(message["role"] == "tool" for message in messages)
        if num_searches == len(self.asked.queries):
            return {"role": "assistant", "content": self.asked.answers[0]}
        function = {"name": "search", "arguments": {"query": self.asked.queries[num_searches]}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": "1", "function": function}]}


def problems(config: Config, split: str, seed: int) -> Iterator[SearchProblem]:
    check_split(split)
    for name in ("results", "passage_words", "eval_rows"):
        if getattr(config, name) < 1:
            raise ValueError(f"env.{name}={getattr(config, name)}: expected 1 or more")
    if not _has_fts5():
        raise ValueError("this Python's SQLite has no full-text search (FTS5), which the env search is made of")
    if config.path is None:
        documents, questions = _made_up(config)
    else:
        documents, questions = _of_file(config.path)
    index = Index(documents, config.passage_words)
    chosen = split_rows(questions, lambda asked: asked.question, config.eval_rows, split)
    return reshuffled([SearchProblem(asked, index, config.results) for asked in chosen], split, seed)


def _has_fts5() -> bool:
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE x USING fts5(y)")
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()
    return True


def _made_up(config: Config) -> tuple[list[Document], list[Asked]]:
    """The same world in every run: which questions are held out does not depend on a run's seed."""
    if not 20 <= config.people <= 20_000:
        raise ValueError(f"env.people={config.people}: expected 20 to 20000")
    if not 0 <= config.two_steps <= 1:
        raise ValueError(f"env.two_steps={config.two_steps}: expected a share, 0 to 1")
    rng = generator("search", 0)
    documents, one_step, two_steps = world(config.people, rng)
    share = config.two_steps
    count = int(min(len(one_step) / (1 - share) if share < 1 else 1e9, len(two_steps) / share if share > 0 else 1e9))
    num_two = min(round(count * share), len(two_steps))
    return documents, rng.sample(one_step, min(count - num_two, len(one_step))) + rng.sample(two_steps, num_two)


def _of_file(path: str) -> tuple[list[Document], list[Asked]]:
    rows = read_jsonl(path, ["text|context|question"])
    texts = {str(text): str(row.get("title") or "") for row in rows if (text := row.get("text") or row.get("context"))}
    questions = [_question(row, path) for row in rows if row.get("question")]
    if not texts or not questions:
        raise ValueError(f"env.path={path} has {len(texts)} documents (text) and {len(questions)} questions: expected both")
    return [Document(title, text) for text, title in texts.items()], questions


def _question(row: Row, path: str) -> Asked:
    given = row.get("answer", row.get("answers"))
    answers = [str(answer).strip() for answer in (given if isinstance(given, list) else [given]) if answer is not None]
    question = str(row["question"]).strip()
    if not any(map(_plain, answers)):
        raise ValueError(f"{path}: the question {question[:60]!r} has no answer: expected a text or a list of them")
    return Asked(question, tuple(filter(_plain, answers)), (question,))
