"""Checks in a process of their own: algebra over what a policy wrote may hang, fill memory or crash, and must not here.

Run as a file it is that process: questions and verdicts are JSON, one a line. It imports nothing of ours.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

SECONDS = 10.0  # for one question
START_SECONDS = 120.0  # for the imports, on a busy machine
MEMORY = 4 << 30  # bytes of address space


class Checker:
    """One process, started at the first question and again after each that it did not survive. Threads take turns."""

    def __init__(self, kind: str, seconds: float = SECONDS) -> None:
        self.kind, self.seconds = kind, seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, *question: object) -> float | None:
        """The score of an answer, 0 to 1; None where there is no verdict: too slow, too large, or an error on the way."""
        with self._lock:
            if self._process is None:
                self._process = self._start()
            line = self._exchange(self._process, json.dumps(question), self.seconds)
            if not line:
                self._stop()
                return None
            return json.loads(line)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__, self.kind],  # -P: envs/ is not to be a place of imports
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        if not self._exchange(process, json.dumps("ready?"), START_SECONDS):
            process.kill()
            raise RuntimeError(f"the process for {self.kind} checks does not start: python {__file__} {self.kind} says why")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @staticmethod
    def _exchange(process: subprocess.Popen[str], line: str, seconds: float) -> str:
        """The answering line, or "" when the process ended or had to be."""
        assert process.stdin and process.stdout
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:
            return ""
        finally:
            timer.cancel()


@functools.cache
def checker(kind: str) -> Checker:
    """The one of a kind that this process shares: it keeps nothing from one question to the next."""
    return Checker(kind)


# ---- the process


def _math() -> Callable[..., float]:
    """Question: gold and answer, LaTeX or plain; 1.0 when they are the same mathematically."""
    from math_verify import parse, verify

    def score(gold: str, answer: str) -> float:
        return float(verify(parse(gold), parse(answer), timeout_seconds=3))

    return score


def _gym() -> Callable[..., float]:
    """Question: a reasoning_gym task, its settings, an entry, an answer; the task's own score."""
    import reasoning_gym

    @functools.cache
    def dataset(task: str, settings: str) -> Any:
        return reasoning_gym.create_dataset(task, **json.loads(settings))

    def score(task: str, settings: dict[str, object], entry: dict[str, object], answer: str) -> float:
        return float(dataset(task, json.dumps(settings)).score_answer(answer, entry))

    return score


KINDS = {"math": _math, "gym": _gym}


def _serve(kind: str) -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no verdict
    _limit_memory()
    score = KINDS[kind]()
    for line in sys.stdin:
        question = json.loads(line)
        if question == "ready?":
            verdict: float | None = 1.0
        else:
            _die_after(2 * SECONDS)
            try:
                verdict = score(*question)
            except Exception:  # whatever a parser says of nonsense, MemoryError too
                verdict = None
            _die_after(0)
        replies.write(json.dumps(verdict) + "\n")
        replies.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _die_after(cpu_seconds: float) -> None:
    """Should whoever asked be gone: the kernel ends us, in the midst of a C function too. 0 calls it off."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)


if __name__ == "__main__":
    _serve(sys.argv[1])
