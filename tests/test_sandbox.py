"""Hostile programs in the sandbox: each contained and explained in a line, by every mechanism that this machine has."""

import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from envs.sandbox import MECHANISMS, Limits, Outcome, Sandbox, detect, try_out

SMALL = Limits(cpu_seconds=1, seconds=4, memory_mb=200, disk_mb=2, output_bytes=10_000)
REPOSITORY = Path(__file__).resolve().parents[1]
REFUSED = "not allowed here (no network, no processes, no files outside the folder): "

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sandboxes are made of what Linux has")


@pytest.fixture(scope="module", params=MECHANISMS)
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    failure = try_out(request.param)
    if failure:
        pytest.skip(f"{request.param} does not work here: {failure}")
    return Sandbox(request.param)


def run(sandbox: Sandbox, source: str, stdin: str = "", limits: Limits = SMALL) -> Outcome:
    outcome = sandbox.run(textwrap.dedent(source), stdin, limits)
    assert "\n" not in outcome.explain()
    return outcome


MARK = 1000 + os.getpid() % 1000  # open files: a limit that tells our programs from those of others


def marked_processes() -> list[int]:
    """Programs with that limit, wherever they hang in the tree of processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/limits"):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        if any(line.startswith("Max open files") and line.split()[3:5] == [str(MARK)] * 2 for line in lines):
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


# ---- what a program may do


def test_a_program_reads_stdin_and_tells_its_exit_code(sandbox):
    outcome = run(sandbox, "import sys; print(sys.stdin.read() * 2); print('é', file=sys.stderr); sys.exit(3)", "ab")
    assert (outcome.stdout, outcome.stderr, outcome.exit_code) == ("abab\n", "é\n", 3)
    assert outcome.explain() == "exit code 3: é"


def test_the_standard_library_threads_and_files_of_its_own_work(sandbox):
    source = """
        import asyncio, decimal, json, math, sqlite3, tempfile, threading, zoneinfo
        thread = threading.Thread(target=lambda: open("a.txt", "w").write("mine"))
        thread.start(); thread.join()
        async def later(): return open("a.txt").read()
        print(asyncio.run(later()), tempfile.TemporaryFile().write(b"12"))
    """
    outcome = run(sandbox, source)
    assert (outcome.stdout, outcome.explain()) == ("mine 2\n", "")


def test_an_error_is_shown_as_python_shows_it_and_explained_by_its_last_line(sandbox):
    outcome = run(sandbox, "x = 1\n1 / 0")
    assert 'File "program.py", line 2' in outcome.stderr
    assert outcome.explain() == "exit code 1: ZeroDivisionError: division by zero"


def test_the_same_program_prints_the_same_each_time(sandbox):
    source = "import os; print({'a', 'b', 'c', 'd', 'e'}, hash('x'), os.path.basename(__file__))"
    assert run(sandbox, source) == run(sandbox, source)


def test_a_start_takes_little_time(sandbox):
    run(sandbox, "")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run(sandbox, "print(1)")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # 0.05 on an idle machine


def test_programs_in_many_threads_do_not_mix(sandbox):
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda i: run(sandbox, f"open('f', 'x').write('{i}'); print(open('f').read())"), range(16)))
    assert [outcome.stdout for outcome in outcomes] == [f"{i}\n" for i in range(16)]


# ---- limits


def test_an_endless_loop_ends_at_its_cpu_time(sandbox):
    outcome = run(sandbox, "print('begun')\nwhile True: pass")
    assert (outcome.stdout, outcome.timed_out) == ("begun\n", True)
    assert outcome.explain() == "stopped: it used more than 1 s of CPU time"


def test_sleep_ends_at_the_clock_whatever_signals_are_ignored(sandbox):
    source = """
        import os, signal, sys, time
        for number in range(1, 32):
            try: signal.signal(number, signal.SIG_IGN)
            except OSError: pass
        os.close(1); os.close(2)
        time.sleep(100)
    """
    outcome = run(sandbox, source, limits=Limits(cpu_seconds=1, seconds=0.5))
    assert outcome.explain() == "stopped: it was still running after 0.5 s"


def test_a_memory_hog_gets_a_memory_error(sandbox):
    assert run(sandbox, "x = bytearray(10 ** 9)").explain() == "out of memory: it may use 200 MB"
    outcome = run(sandbox, "x = []\nwhile True: x.append(bytearray(10 ** 6))")
    assert outcome.explain() == "out of memory: it may use 200 MB"


def test_memory_cannot_be_had_outside_the_limit(sandbox):
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print(libc.shmget(0, 1 << 28, 0o1600), hasattr(os, "memfd_create") and libc.memfd_create(b"x", 0))
    """
    assert run(sandbox, source).stdout == "-1 -1\n"


def test_a_disk_filler_is_stopped(sandbox):
    one = run(sandbox, "f = open('big', 'wb')\nwhile True: f.write(bytes(10 ** 6))")
    assert one.explain() in ("out of disk: it may write 2 MB", "stopped: it wrote more than 2 MB or 1000 files")
    source = """
        import itertools, time
        for i in itertools.count():
            open(f"file{i}", "wb").write(bytes(10 ** 5))
            time.sleep(0.005)
    """
    many = run(sandbox, source)
    assert many.explain() in ("out of disk: it may write 2 MB", "stopped: it wrote more than 2 MB or 1000 files")


def test_a_flood_of_output_is_cut_and_ends_the_program(sandbox):
    outcome = run(sandbox, "while True: print('x' * 1000)")
    assert outcome.explain() == "stopped: it printed more than 10,000 bytes"
    assert len(outcome.stdout) == 10_000
    assert len(run(sandbox, "print('x' * 9_999)").stdout) == 10_000


# ---- what is shut


def test_there_are_no_files_but_pythons_and_its_own(sandbox):
    with tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.write_text("hunter2")
        paths = [
            "/etc/passwd",
            str(REPOSITORY / "tests/test_sandbox.py"),
            str(secret),
            "/proc/self/environ",
            f"/proc/{os.getpid()}/mem",
        ]
        source = f"""
            import os
            for path in {paths}:
                try: print(open(path).read())
                except OSError as error: print(type(error).__name__)
            for path in ("/etc", {str(REPOSITORY)!r}, {folder!r}):
                try: print(set(os.listdir(path)) & {{"passwd", "pyproject.toml", "secret"}})
                except OSError as error: print(type(error).__name__)
        """
        output = run(sandbox, source).stdout
    assert set(output.split("\n")) <= {"PermissionError", "FileNotFoundError", "set()", ""}
    assert len(output.split()) == 8 and output.split()[:5].count("set()") == 0


def test_packages_beside_the_standard_library_cannot_be_read(sandbox):
    source = """
        import os, ssl, sqlite3, sys
        library = os.path.dirname(os.__file__)
        for folder in (f"{library}/site-packages", f"{library}/dist-packages", "/usr/lib/python3/dist-packages"):
            for path, _, names in os.walk(folder):
                for name in names:
                    try: print(open(os.path.join(path, name), "rb").read(1))
                    except OSError: pass
    """
    outcome = run(sandbox, source, limits=Limits(cpu_seconds=10))  # there may be very many
    assert (outcome.stdout, outcome.explain()) == ("", "")


def test_nothing_outside_can_be_changed(sandbox, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("whole")
    mine.chmod(0o600)
    source = f"""
        import os, shutil, sys
        def attempt(action):
            try: action()
            except OSError: return
            print("done", action)
        path = {str(mine)!r}
        attempt(lambda: open(path, "w"))
        attempt(lambda: os.truncate(path, 0))
        attempt(lambda: os.chmod(path, 0o777))
        attempt(lambda: os.utime(path))
        attempt(lambda: os.unlink(path))
        attempt(lambda: os.rename(path, path + "2"))
        attempt(lambda: os.link(path, "stolen"))
        attempt(lambda: open({str(tmp_path / "new")!r}, "w"))
        attempt(lambda: open(os.__file__, "r+"))
        attempt(lambda: open(os.path.dirname(os.__file__) + "/sitecustomize.py", "w"))
        attempt(lambda: open("/dev/sda", "rb"))
    """
    outcome = run(sandbox, source)
    assert (outcome.stdout, outcome.explain()) == ("", "")
    assert mine.read_text() == "whole" and mine.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_outside_is_explained_in_a_line(sandbox):
    assert run(sandbox, "open('/etc/passwd')").explain() in (
        "exit code 1: FileNotFoundError: [Errno 2] No such file or directory: '/etc/passwd'",
        f"{REFUSED}PermissionError: [Errno 13] Permission denied: '/etc/passwd'",
    )


def test_there_are_no_sockets(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        source = f"""
            import ctypes, socket
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
                    try: socket.socket(family, kind)
                    except PermissionError: continue
                    print("opened", family, kind)
            print(ctypes.CDLL(None).syscall(425, 8, bytes(120)))  # io_uring makes sockets too
            socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1)
        """
        outcome = run(sandbox, source)
    assert outcome.stdout == "-1\n"
    assert outcome.explain().startswith(REFUSED)


def test_a_fork_bomb_does_not_go_off(sandbox):
    source = """
        import ctypes, os, subprocess
        libc = ctypes.CDLL(None)
        clone, clone3 = 220 if os.uname().machine == "aarch64" else 56, 435
        for start in (os.fork, libc.fork, lambda: libc.syscall(clone, 17, 0), lambda: libc.syscall(clone3, bytes(88), 88)):
            try: print(start())
            except PermissionError: print(-1)
        subprocess.run(["ls"])
    """
    outcome = run(sandbox, source)
    assert outcome.stdout == "-1\n" * 4
    assert outcome.explain().startswith(REFUSED)


def test_a_bomb_of_threads_is_bounded(sandbox):
    source = """
        import threading, time
        threading.stack_size(32768)
        try:
            for _ in range(100_000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        except (RuntimeError, MemoryError): print("no more")
    """
    outcome = run(sandbox, source, limits=Limits(seconds=1, memory_mb=128))
    assert outcome.stdout == "no more\n" or outcome.timed_out


def test_nothing_outlives_a_program(sandbox):
    source = """
        import ctypes, os, signal, time
        libc = ctypes.CDLL(None)
        print(libc.prctl(1, 0), libc.setsid(), libc.setpgid(0, 0))  # to be neither in our group nor of our parent
        try:
            if os.fork() == 0 and os.fork() == 0: time.sleep(60)
        except PermissionError: pass
        time.sleep(60)
    """
    outcome = run(sandbox, source, limits=Limits(seconds=0.5, open_files=MARK))
    assert (outcome.stdout, outcome.stopped) == ("-1 -1 -1\n", "time")
    assert wait_for(lambda: not marked_processes())


def test_nothing_outlives_whoever_started_it(sandbox):
    starter = f"""
import sys; sys.path.insert(0, {str(REPOSITORY)!r})
from envs.sandbox import Limits, Sandbox
Sandbox({sandbox.mechanism!r}).run("import time; time.sleep(60)", limits=Limits(seconds=60, open_files={MARK}))
"""
    process = subprocess.Popen([sys.executable, "-S", "-c", starter])
    assert wait_for(marked_processes)
    process.kill()
    process.wait()
    assert wait_for(lambda: not marked_processes())


def test_two_programs_speak_through_pipes_and_end_with_the_first(sandbox):
    source = """
        import os, sys, time
        own, (read, write) = sys.stdin.read(), map(int, sys.argv[1:])
        os.write(write, own.encode())
        print(os.read(read, 100).decode(), os.listdir("."))
        time.sleep(60 if own == "last" else 0)
    """
    source = textwrap.dedent(source)
    first, last = sandbox.run_beside(source, "first", "last", Limits(seconds=20, open_files=MARK))
    assert (first.stdout, last.stdout) == ("last ['program.py']\n", "first ['program.py']\n")
    assert (first.explain(), last.explain()) == ("", "stopped: the program beside it ended")
    assert wait_for(lambda: not marked_processes())


def test_nobody_outside_can_be_signalled_or_slowed(sandbox):
    source = f"""
        import os, resource
        def attempt(action):
            try: action()
            except OSError: return
            print("done")
        for process in ({os.getpid()}, {os.getppid()}, 0, -1):
            attempt(lambda: os.kill(process, 0))
            attempt(lambda: os.sched_setaffinity(process, [0]))
        attempt(lambda: os.setpriority(os.PRIO_PROCESS, {os.getpid()}, 19))
        attempt(lambda: resource.prlimit({os.getpid()}, resource.RLIMIT_NOFILE))
        attempt(lambda: os.pidfd_open({os.getpid()}))
        os.kill(os.getpid(), 0)
    """
    assert run(sandbox, source).stdout == ""


def test_a_namespace_of_its_own_gives_no_rights(sandbox):
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None)
        print(libc.unshare(0x10000000), libc.mount(b"tmpfs", b"/", b"tmpfs", 0, None), libc.ptrace(0, 0))
        for change in (lambda: os.setuid(0), lambda: os.setgroups([0])):
            try: change()
            except PermissionError: continue
            print(os.getuid())
    """
    assert run(sandbox, source).stdout.split("\n")[0] == "-1 -1 -1"


def test_the_program_gets_no_settings_of_ours(sandbox):
    os.environ["MY_TOKEN"] = "hunter2"
    try:
        outcome = run(sandbox, "import os, sys; print(dict(os.environ)); print(os.listdir('.'), sys.path[:1])")
    finally:
        del os.environ["MY_TOKEN"]
    assert "hunter2" not in outcome.stdout
    assert "['program.py']" in outcome.stdout


# ---- choosing one


def test_detection_takes_the_first_that_holds():
    working = [mechanism for mechanism in MECHANISMS if not try_out(mechanism)]
    if working:
        assert detect().mechanism == working[0]
        assert detect(allow_unsandboxed=True).mechanism == working[0]


def test_what_does_not_hold_is_not_taken():
    assert try_out("none") != ""


def test_without_a_sandbox_limits_still_hold():
    open_one = Sandbox("none")
    assert run(open_one, "open('/etc/passwd'); print(1)").stdout == "1\n"
    assert run(open_one, "x = bytearray(10 ** 9)").explain() == "out of memory: it may use 200 MB"
    assert run(open_one, "import time; time.sleep(9)", limits=Limits(seconds=0.3)).stopped == "time"


FULL = "stopped: it wrote more than 2 MB or 1000 files"


@pytest.mark.parametrize(
    "source",
    [
        "os.mkdir('d')\nfor i in range(1000): open(f'd/{i}', 'wb').write(bytes(10 ** 6)); time.sleep(0.01)",
        "os.mkdir('d', 0o300)\nfor i in range(1000): open(f'd/{i}', 'wb').write(bytes(10 ** 6)); time.sleep(0.01)",
        "for i in range(1200): os.mkdir('d'); os.chdir('d')\ntime.sleep(9)",
        "for i in range(20): os.mkdir('d' * 250); os.chdir('d' * 250)\ntime.sleep(9)",
    ],
    ids=["below", "hidden", "deep", "long"],
)
def test_without_a_sandbox_folders_are_measured_to_their_bottom(source):
    assert run(Sandbox("none"), f"import os, time\n{source}").explain() == FULL


def test_whatever_a_program_leaves_is_removed():
    source = """
        import os
        print(os.getcwd())
        for i in range(2000): os.mkdir("d", 0o300); os.chdir("d"); open("f", "w").close(); os.symlink("/", "l")
    """
    outcome = run(Sandbox("none"), source)
    assert outcome.stdout.startswith(tempfile.gettempdir()) and not Path(outcome.stdout.strip()).exists()


def test_a_bad_limit_is_named():
    with pytest.raises(ValueError, match=r"memory_mb=1: expected 64 or more"):
        Limits(memory_mb=1)
