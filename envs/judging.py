"""Runs in the sandbox twice, beside an answer and beside its tests, which call the answer: what envs/code_problems.py starts.

Each is a process of its own, so that an answer finds neither tests nor expected results, whatever it reads. Two pipes join
them; JSON passes: None, bool, int, float and str as they are, other plain data as [kind, ...] (subclasses as their base).
Functions and iterators stay where they are and pass as a number to call. Nothing else passes: an object of the answer's own
class could say yes to every ==.
"""

from __future__ import annotations

import builtins
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator

TYPE_CHECKING = False  # typing takes long to load
if TYPE_CHECKING:
    from typing import Any, NoReturn

SMALL = 2**64  # integers above pass in hexadecimal: decimal ones of any length would take too long
GROUPS: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Peer:
    """The process at the other end of two pipes. It may call what is in `names`, and what it was lent."""

    def __init__(self, read: int, write: int, names: dict[str, Any]) -> None:
        self.incoming, self.outgoing = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self.names = names
        self.lent: list[Callable[..., Any]] = []

    def send(self, *message: Any) -> None:
        try:
            self.outgoing.write(json.dumps(message).encode() + b"\n")
            self.outgoing.flush()
        except BrokenPipeError:
            self.end()

    def receive(self) -> list[Any]:
        line = self.incoming.readline()
        if not line:
            self.end()
        return json.loads(line)

    def end(self) -> NoReturn:
        """Without the other there is nothing to do; no test may catch that."""
        print("the other process ended", file=sys.stderr)
        os._exit(1)

    def pack(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and -SMALL < value < SMALL):
            return value
        if isinstance(value, int):
            return ["int", hex(value)]
        if isinstance(value, complex):
            return ["complex", value.real, value.imag]
        if isinstance(value, bytes):
            return ["bytes", value.decode("latin-1")]
        if isinstance(value, range):
            return ["range", value.start, value.stop, value.step]
        if isinstance(value, dict):
            return ["dict", *([self.pack(key), self.pack(entry)] for key, entry in value.items())]
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                return [kind.__name__, *map(self.pack, value)]
        if isinstance(value, Iterator):
            return ["iterator", self.lend(lambda: list(itertools.islice(value, 1)))]
        if callable(value) and not isinstance(value, type):
            return ["function", self.lend(value)]
        raise TypeError(f"only plain data passes between an answer and its tests, not an object of {type(value).__name__}")

    def unpack(self, packed: Any) -> Any:
        if not isinstance(packed, list):
            return packed
        kind, *parts = packed
        if kind in GROUPS:
            return GROUPS[kind]([self.unpack(part) for part in parts])
        if kind == "dict":
            return {self.unpack(key): self.unpack(entry) for key, entry in parts}
        if kind == "iterator":
            return drawn(self.function(parts[0]))
        if kind == "function":
            return self.function(parts[0])
        if kind == "int":
            return int(parts[0], 16)
        if kind == "bytes":
            return parts[0].encode("latin-1")
        return {"complex": complex, "range": range}[kind](*parts)

    def lend(self, function: Callable[..., Any]) -> int:
        self.lent.append(function)
        return len(self.lent) - 1

    def function(self, known_as: str | int) -> Callable[..., Any]:
        """One of theirs. What it changes in a list or dict reaches whoever gave it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.send("call", known_as, [self.pack(value) for value in args], {key: self.pack(kwargs[key]) for key in kwargs})
            while (message := self.receive())[0] == "call":
                self.serve(message)
            if message[0] == "raised":
                raise error_of(message[1], [self.unpack(part) for part in message[2]])
            for given, left in zip((*args, *kwargs.values()), message[2], strict=True):
                if type(given) is list:
                    given[:] = self.unpack(left)
                elif type(given) is dict:
                    given.clear()
                    given.update(self.unpack(left))
            return self.unpack(message[1])

        return call

    def serve(self, message: list[Any]) -> None:
        """Answer a call of theirs, whatever comes of it."""
        try:
            _, known_as, args, kwargs = message
            function = self.names[known_as] if isinstance(known_as, str) else self.lent[known_as]
            args, kwargs = [self.unpack(value) for value in args], {key: self.unpack(kwargs[key]) for key in kwargs}
            result = self.pack(function(*args, **kwargs))
            left = [self.pack(given) if type(given) in (list, dict) else None for given in (*args, *kwargs.values())]
        except Exception as error:
            self.send("raised", [kind.__name__ for kind in type(error).__mro__], [str(error)])
        else:
            self.send("value", result, left)


def drawn(draw: Callable[[], list[Any]]) -> Iterator[Any]:
    while entries := draw():
        yield entries[0]


def error_of(names: list[str], args: list[Any]) -> Exception:
    """Of the first class in its ancestry that Python has."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(*args)
            except TypeError:  # it wants other arguments
                continue
    return Exception(*args)


def answer(peer: Peer, source: str) -> None:
    exec(compile(source, "answer.py", "exec"), peer.names)
    peer.send(*(name for name, value in peer.names.items() if callable(value)))
    while True:
        peer.serve(peer.receive())


def judge(peer: Peer, before: str, test: str, entry_point: str) -> None:
    """Calls `check` of the tests, which see what stands before the function in the prompt, and the answer's functions.

    The prompt's own and Python's go first: an answer with an `abs` of its own changes nothing for the tests.
    """
    names: dict[str, Any] = {"__name__": "test"}
    exec(compile(before, "prompt.py", "exec"), names)
    found = peer.receive()
    if entry_point not in found:
        raise NameError(f"there is no function {entry_point}")
    for name in found:
        if name not in names and not hasattr(builtins, name):
            names[name] = peer.function(name)
    names[entry_point] = peer.function(entry_point)
    exec(compile(test, "test.py", "exec"), names)
    names["check"](names[entry_point])
    print("\npassed")


if __name__ == "__main__":
    task = json.loads(sys.stdin.read())
    other = Peer(int(sys.argv[1]), int(sys.argv[2]), {"__name__": "answer"} if "source" in task else {})
    (answer if "source" in task else judge)(other, **task)
