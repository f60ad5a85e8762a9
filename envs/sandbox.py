"""Untrusted Python in a process of its own: no network, no files but its folder's, limits on all it may use up.

`detect()` finds what this machine offers, best first: bubblewrap, namespaces, Landlock (each with a filter of system calls:
no processes, no sockets) and tries it for real. Where nothing holds it raises Unsandboxed.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import math
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeAlias, final

from envs.folders import holds_more, own_folder

Mechanism: TypeAlias = Literal["bubblewrap", "namespaces", "landlock", "none"]
Stopped: TypeAlias = Literal["cpu", "time", "output", "disk", "peer"]

MECHANISMS: tuple[Mechanism, ...] = ("bubblewrap", "namespaces", "landlock")
JAIL = Path(__file__).with_name("jail.py")
POLL_SECONDS = 0.02
MAX_FILES = 1000  # in the folder and below it
_running = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))  # more at a time would only run into their time limit

# Python without site-packages and the user's settings; sets of strings have the same order in every run.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PATH": "/nowhere"}
PYTHON_FLAGS = ("-P", "-s", "-S", "-B", "-u", "-X", "utf8")


class Unsandboxed(ValueError):
    """There is no way here to run untrusted code safely."""


class SandboxFailed(RuntimeError):
    """The sandbox did not come up; the program had no part in it."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. There are no child processes in a sandbox."""

    cpu_seconds: float = 5.0  # rounded up to whole seconds
    seconds: float = 20.0  # on the clock: sleeping counts, a busy machine too
    memory_mb: int = 512  # of address space; Python itself takes 20
    disk_mb: int = 16  # all files together, and each of them
    output_bytes: int = 64_000  # each of stdout and stderr
    open_files: int = 32
    threads: int = 32

    def __post_init__(self) -> None:
        for name, least in (("cpu_seconds", 0.1), ("seconds", 0.1), ("memory_mb", 64), ("disk_mb", 1), ("output_bytes", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)}: expected {least} or more")


@dataclass(frozen=True)
class Outcome:
    """What came of a program. `exit_code` below 0: the signal that ended it; `stopped`: the limit that we saw it pass."""

    stdout: str
    stderr: str
    exit_code: int
    stopped: Stopped | None
    limits: Limits

    @property
    def timed_out(self) -> bool:
        return self.stopped in ("cpu", "time")

    def explain(self) -> str:
        """Why the program did not end well, in one line; "" when it did."""
        limits, last = self.limits, (self.stderr.strip().splitlines() or [""])[-1]
        stopped = {
            "cpu": f"stopped: it used more than {math.ceil(limits.cpu_seconds)} s of CPU time",
            "time": f"stopped: it was still running after {limits.seconds:g} s",
            "output": f"stopped: it printed more than {limits.output_bytes:,} bytes",
            "disk": f"stopped: it wrote more than {limits.disk_mb} MB or {MAX_FILES} files",
            "peer": "stopped: the program beside it ended",
        }
        if self.stopped:
            return stopped[self.stopped]
        if self.exit_code == 0:
            return ""
        if self.exit_code < 0:
            return f"ended by {signal.Signals(-self.exit_code).name}"
        if "MemoryError" in last:
            return f"out of memory: it may use {limits.memory_mb} MB"
        if "No space left on device" in last or "File too large" in last:
            return f"out of disk: it may write {limits.disk_mb} MB"
        if "Operation not permitted" in last or "Permission denied" in last:
            return f"not allowed here (no network, no processes, no files outside the folder): {last}"
        return f"exit code {self.exit_code}" + (f": {last}" if last else "")


@final
@dataclass(frozen=True)
class Sandbox:
    """How programs are shut in; "none" leaves limits only."""

    mechanism: Mechanism

    def run(self, source: str, stdin: str = "", limits: Limits = Limits()) -> Outcome:
        """Run a program to its end or its limits; blocks, call it from a thread. SandboxFailed if it could not start."""
        with _running:
            return self._run(source, stdin, limits, (), threading.Event())

    def run_beside(self, source: str, stdin: str, other_stdin: str, limits: Limits = Limits()) -> tuple[Outcome, Outcome]:
        """Run a program twice, each shut in alone, until the first ends: it ends the other, its peer, too.

        Their arguments are two file descriptors, to read what the peer writes and to write to it; each has all of `limits`.
        """
        over = threading.Event()
        (own_read, peer_write), (peer_read, own_write) = os.pipe(), os.pipe()
        with _running, ThreadPoolExecutor(1) as pool:
            peer = pool.submit(self._run, source, other_stdin, limits, (peer_read, peer_write), over)
            try:
                outcome = self._run(source, stdin, limits, (own_read, own_write), threading.Event())
            finally:
                over.set()
            return outcome, peer.result()

    def _run(self, source: str, stdin: str, limits: Limits, pipes: tuple[int, ...], over: threading.Event) -> Outcome:
        with own_folder() as folder:
            try:
                Path(folder, "program.py").write_bytes(source.encode(errors="replace"))
                with _feed(stdin, folder) as feed:
                    read, write = os.pipe()
                    process = subprocess.Popen(
                        self._command(folder, limits, write, pipes), stdin=feed, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        cwd=folder, env=ENVIRONMENT, pass_fds=(write, *pipes), start_new_session=True,
                    )  # fmt: skip
                    os.close(write)
            finally:
                for pipe in pipes:
                    os.close(pipe)
            with os.fdopen(read, "rb") as status:
                watch = _Watch(process, folder, limits, over)
                try:
                    watch.until_the_end()
                finally:
                    watch.end()
                return self._outcome(watch, status.read(), folder)

    def _command(self, folder: str, limits: Limits, status: int, pipes: tuple[int, ...]) -> list[str]:
        program = [_python(), *PYTHON_FLAGS, "program.py", *map(str, pipes)]
        whole = {
            "cpu_seconds": math.ceil(limits.cpu_seconds), "memory_mb": limits.memory_mb, "disk_mb": limits.disk_mb,
            "open_files": limits.open_files, "threads": limits.threads,
        }  # fmt: skip
        spec = {
            "mechanism": self.mechanism, "folder": folder, "readable": _readable(), "hidden": _hidden(), "command": program,
            "limits": whole, "disk_mb": limits.disk_mb, "status": status,
        }  # fmt: skip
        jail = [_python(), "-I", "-S", str(JAIL), marshal.dumps(spec).hex()]
        return [*_bubblewrap(folder, limits), *jail] if self.mechanism == "bubblewrap" else jail

    def _outcome(self, watch: _Watch, status: bytes, folder: str) -> Outcome:
        code, stopped = watch.exit_code, watch.stopped
        if status != b"ok" and not stopped:
            said = status.decode(errors="replace").removeprefix("ok") or watch.text("stderr").strip() or f"exit code {code}"
            raise SandboxFailed(f"the sandbox ({self.mechanism}) did not start: {' '.join(said.split())[:300]}")
        if self.mechanism == "bubblewrap" and code > 128:
            code = 128 - code  # how it tells of a signal
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and watch.cpu_seconds > watch.limits.cpu_seconds - 0.5):
            stopped = stopped or "cpu"
        # a folder's random name is no part of what the program did
        stdout, stderr = (re.sub(rf"({re.escape(folder)}|/cook-box)/", "", watch.text(name)) for name in ("stdout", "stderr"))
        return Outcome(stdout, stderr, code, stopped, watch.limits)


@contextlib.contextmanager
def _feed(stdin: str, folder: str) -> Iterator[IO[bytes]]:
    """stdin as a file to read: a pipe would need somebody to fill it."""
    path = Path(folder, "stdin")
    path.write_bytes(stdin.encode(errors="replace"))
    with path.open("rb") as file:
        path.unlink()
        yield file


@final
class _Watch:
    """Reads what a process writes, no more than allowed, and ends it when it passes a limit."""

    def __init__(self, process: subprocess.Popen[bytes], folder: str, limits: Limits, over: threading.Event) -> None:
        self.process, self.folder, self.limits, self.over = process, folder, limits, over
        self.stopped: Stopped | None = None
        self.cpu_seconds, self.exit_code = 0.0, 0
        self._written = {"stdout": b"", "stderr": b""}
        self._deadline = time.monotonic() + limits.seconds

    def text(self, name: str) -> str:
        return self._written[name][: self.limits.output_bytes].decode(errors="replace")

    def until_the_end(self) -> None:
        with selectors.DefaultSelector() as selector:
            for name in self._written:
                pipe: IO[bytes] = getattr(self.process, name)
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, name)
            while not self.stopped and not self._ended():
                if selector.get_map():
                    for key, _ in selector.select(POLL_SECONDS):
                        self._read(selector, key)
                else:
                    time.sleep(POLL_SECONDS / 10)
                self._look()
            for key in list(selector.get_map().values()):
                self._read(selector, key)

    def end(self) -> None:
        """Whatever happened, nothing of it is left: it could not leave its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.returncode is None:
            self._wait(0)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()

    def _read(self, selector: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        room = self.limits.output_bytes + 1 - len(self._written[key.data])
        try:
            chunk = os.read(key.fd, room)
        except BlockingIOError:
            return
        self._written[key.data] += chunk
        if not chunk:
            selector.unregister(key.fileobj)
        elif len(chunk) == room:
            self.stopped = "output"
            selector.unregister(key.fileobj)

    def _look(self) -> None:
        if self.stopped:
            return
        if time.monotonic() > self._deadline:
            self.stopped = "time"
        elif self.over.is_set():
            self.stopped = "peer"
        elif holds_more(self.folder, self.limits.disk_mb << 20, MAX_FILES):
            self.stopped = "disk"

    def _ended(self) -> bool:
        return self._wait(os.WNOHANG)

    def _wait(self, flags: int) -> bool:
        """wait4 and not Popen's: it tells the CPU time."""
        pid, status, usage = os.wait4(self.process.pid, flags)
        if pid == 0:
            return False
        self.exit_code = self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return True


# ---- what the machine offers


@functools.cache
def detect(allow_unsandboxed: bool = False) -> Sandbox:
    """The best way to shut programs in that works here; the first call tries them out. Unsandboxed when there is none."""
    failures = []
    for mechanism in MECHANISMS:
        failure = try_out(mechanism)
        if not failure:
            return Sandbox(mechanism)
        failures.append(f"{mechanism}: {failure}")
    if allow_unsandboxed:
        return Sandbox("none")
    raise Unsandboxed(
        f"no safe way to run a policy's programs here ({'; '.join(failures)}); install bubblewrap,"
        " or accept the risk: env.allow_unsandboxed=true"
    )


# Ends with 7 when nothing that must be shut is open.
_PROBE = """
import os, socket, sys
def refused(action):
    try:
        action()
    except OSError:
        return True
sys.exit(7 if refused(lambda: open({canary!r})) and refused(lambda: open({canary!r} + "x", "w")) and refused(os.fork)
         and refused(socket.socket) and refused(lambda: os.kill({pid}, 0)) and not open("mine", "w").close() else 8)
"""


def try_out(mechanism: Mechanism) -> str:
    """Why a mechanism does not hold here; "" when it does."""
    if sys.platform != "linux":
        return "needs Linux"
    if mechanism == "bubblewrap" and not shutil.which("bwrap"):
        return "not installed"
    with tempfile.TemporaryDirectory(prefix="cook-") as elsewhere:
        canary = Path(elsewhere, "canary")
        canary.write_text("")
        try:
            outcome = Sandbox(mechanism).run(_PROBE.format(canary=str(canary), pid=os.getpid()))
        except (SandboxFailed, OSError) as error:
            return str(error).partition("did not start: ")[2] or str(error)
    return "" if outcome.exit_code == 7 else f"it does not hold ({outcome.explain()})"


@functools.cache
def _python() -> str:
    """The interpreter itself: a virtual environment's is a link to it."""
    return os.path.realpath(sys.executable)


@functools.cache
def _readable() -> list[str]:
    """What Python needs to run: itself, its library, the C library."""
    own = [_python(), os.path.join(os.path.realpath(sys.base_prefix), "lib"), _library()]
    shared = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store", "/usr/share/zoneinfo"]
    devices = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
    return [path for path in (*shared, *own, *devices) if os.path.exists(path)]


@functools.cache
def _library() -> str:
    return os.path.realpath(sysconfig.get_path("stdlib"))


@functools.cache
def _hidden() -> list[str]:
    """What people installed lies among what Python needs: data sets with their answers may be in it."""
    found = (f"{_library()}/site-packages", f"{_library()}/dist-packages", "/usr/lib/python3/dist-packages")
    return [path for path in found if os.path.isdir(path)]


def _bubblewrap(folder: str, limits: Limits) -> list[str]:
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
    for path in (*_readable(), str(JAIL)):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    for path in _hidden():
        command += ["--tmpfs", path]
    command += ["--size", str(limits.disk_mb << 20), "--tmpfs", "/cook-box", "--chdir", "/cook-box"]
    return [*command, "--ro-bind", f"{folder}/program.py", "/cook-box/program.py", "--remount-ro", "/"]
