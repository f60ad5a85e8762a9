"""Shuts its own process in, then becomes the program: what envs/sandbox.py starts, as a file, with a marshalled specification.

Nothing is imported but the standard library, of which as little as possible: this runs at every call of a tool. Whatever
the mechanism, the program cannot start processes, open sockets, gain rights or signal anybody (a system call filter), and
has limits on CPU, memory, file sizes and open files. `namespaces` and `bubblewrap` hide all files but Python's, `landlock`
forbids them (their names and sizes can still be asked for).

Docs: landlock(7), seccomp(2), namespaces(7), mount_setattr(2) of the Linux manual.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import signal
import struct
import sys

TYPE_CHECKING = False  # typing and json take long to load
if TYPE_CHECKING:
    from typing import Any, NoReturn

MACHINE = os.uname().machine
libc = ctypes.CDLL(None, use_errno=True)

# ---- the system call filter

EPERM, ENOSYS = 1, 38
# name: (x86_64, aarch64), None where there is no such call
DENIED = {
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "setsid": (112, 157), "setpgid": (109, 154),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # Landlock does not look at these, which change files by name
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466),
}  # fmt: skip
NUMBERS = {"clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
           "prctl": (157, 167)}  # fmt: skip
COLUMN = {"x86_64": 0, "aarch64": 1}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
LOAD, IS, AT_LEAST, HAS_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: ld [k], jeq, jge, jset, ret
NUMBER, ARCH, ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of an argument comes first
ALLOW, FAIL, KILL = 0x7FFF0000, 0x00050000, 0x80000000
CLONE_THREAD = 0x00010000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 38, 22, 24


def filter_system_calls() -> None:
    column = COLUMN[MACHINE]
    code: list[tuple[int, int, int, int]] = []  # (operation, skip if true, skip if false, value)

    def deny(name: str, error: int = EPERM) -> None:
        number = (DENIED | NUMBERS)[name][column]
        if number is not None:
            code.extend([(IS, 0, 1, number), (RETURN, 0, 0, FAIL | error)])

    def allow_only(name: str, test: int, value: int, otherwise: bool = False) -> None:
        """By the first argument; with `otherwise` only where the test fails."""
        skips = (1, 0) if otherwise else (0, 1)
        found = [(LOAD, 0, 0, ARGUMENT), (test, *skips, value), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL | EPERM)]
        code.extend([(IS, 0, len(found), NUMBERS[name][column]), *found])

    code += [(LOAD, 0, 0, ARCH), (IS, 1, 0, AUDIT_ARCH[MACHINE]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if MACHINE == "x86_64":
        code += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, FAIL | EPERM)]
    for name in DENIED:
        deny(name)
    deny("clone3", ENOSYS)  # its flags cannot be seen from here; the C library falls back to clone
    allow_only("clone", HAS_BITS, CLONE_THREAD)
    allow_only("kill", IS, os.getpid())
    allow_only("tgkill", IS, os.getpid())
    allow_only("prlimit64", IS, 0)
    allow_only("prctl", IS, PR_SET_PDEATHSIG, otherwise=True)
    code.append((RETURN, 0, 0, ALLOW))
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(packed))
    check(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


# ---- namespaces

NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, BIND, REC, PRIVATE, DETACH = 1, 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
USER = 1000  # inside a user namespace


def enter_namespaces(spec: dict[str, Any]) -> None:
    """Returns in a child that sees Python's files and a folder in memory; the parent waits for it and ends as it does."""
    spaces = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    outside = os.geteuid(), os.getegid()
    unmapped = outside[0] == 0 and libc.unshare(spaces) == 0  # root that may: no need for a user namespace
    if not unmapped:
        check(libc.unshare(spaces | NEW_USER), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{USER} {outside[0]} 1"), ("gid_map", f"{USER} {outside[1]} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    die_with_parent()
    number = os.getpid()
    if child := os.fork():
        os.close(spec["status"])
        end_as(os.waitpid(child, 0)[1])
    check(libc.mount(None, b"/", None, REC | PRIVATE, None), "mount private")
    build_root(spec)
    if unmapped:
        user = 40000 + number % 20000  # one of its own, so that nobody else's processes count against its limit
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    die_with_parent()


def build_root(spec: dict[str, Any]) -> None:
    root = spec["folder"]
    with open(f"{root}/program.py", "rb") as file:
        source = file.read()
    check(libc.mount(b"tmpfs", root.encode(), b"tmpfs", NOSUID | NODEV, b"size=1m,mode=755"), "mount root")
    for path in spec["readable"]:
        show(path, root + path)
    for path in spec["hidden"]:
        check(libc.mount(b"tmpfs", (root + path).encode(), b"tmpfs", RDONLY | NOSUID | NODEV, b"size=4k"), f"hide {path}")
    os.mkdir(f"{root}/cook-box")
    size = f"size={spec['disk_mb']}m,nr_inodes=1000,mode=777".encode()
    check(libc.mount(b"tmpfs", f"{root}/cook-box".encode(), b"tmpfs", NOSUID | NODEV, size), "mount work")
    with open(f"{root}/cook-box/program.py", "wb") as file:
        file.write(source)
    set_mount(root, RDONLY | NOSUID | NODEV, 0)
    os.chdir(root)
    check(libc.syscall(PIVOT_ROOT[MACHINE], b".", b"."), "pivot_root")  # the old root now lies over the new one
    check(libc.umount2(b".", DETACH), "umount")
    os.chdir("/cook-box")


def show(path: str, target: str) -> None:
    """The same file or folder, read only, in the new root."""
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    check(libc.mount(path.encode(), target.encode(), None, BIND | REC, None), f"bind {path}")
    set_mount(target, RDONLY | NOSUID | (0 if path.startswith("/dev/") else NODEV), AT_RECURSIVE)


def set_mount(path: str, attributes: int, flags: int) -> None:
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    check(libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, wanted, len(wanted)), f"mount_setattr {path}")


def end_as(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 255)


# ---- Landlock

CREATE_RULESET, ADD_RULE, RESTRICT_SELF, PATH_BENEATH = 444, 445, 446, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = 1, 2, 4, 8, 32, 256, 16384
RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # of files, that a version knows; later: and ioctls of devices
NET_VERSION, SCOPE_VERSION = 4, 6


def enter_landlock(spec: dict[str, Any]) -> None:
    """Python's files to read; the folder to read and write, flat: a deep tree would be hard to remove."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        raise OSError(f"landlock: {os.strerror(ctypes.get_errno())}")
    known = RIGHTS.get(version, 0xFFFF)
    nets, scopes = 3 if version >= NET_VERSION else 0, 3 if version >= SCOPE_VERSION else 0
    wanted = struct.pack("QQQ", known, nets, scopes)
    ruleset = check(libc.syscall(CREATE_RULESET, wanted, len(wanted), 0), "landlock")
    rules = list(dict.fromkeys(rule for path in spec["readable"] for rule in readable(path, spec["hidden"])))
    rules += [(f"/dev/{name}", READ_FILE | WRITE_FILE) for name in ("null", "zero", "full")]
    rules.append((spec["folder"], READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE))
    for path, rights in rules:
        if not os.path.isdir(path):
            rights &= EXECUTE | READ_FILE | WRITE_FILE
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        check(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", rights & known, file), 0), f"landlock {path}")
        os.close(file)
    check(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)


def readable(path: str, hidden: list[str]) -> list[tuple[str, int]]:
    """Rules to read all of `path` but what is hidden, whose names stay: a rule holds for everything below."""
    path = os.path.realpath(path)
    if path in hidden:
        return []
    if not any(other.startswith(f"{path}/") for other in hidden):
        return [(path, EXECUTE | READ_FILE | READ_DIR)]
    inside = [
        entry.path for entry in os.scandir(path) if not entry.is_symlink()
    ]  # a link leads where there is a rule, or nowhere
    return [(path, READ_DIR), *(rule for entry in inside for rule in readable(entry, hidden))]


# ---- all


def drop_capabilities() -> None:
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused where we have none to lose
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(libc.capset(header, none), "capset")


def die_with_parent() -> None:
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def set_limits(limits: dict[str, int], own_user: bool) -> None:
    wanted = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_mb"] << 20,
        resource.RLIMIT_FSIZE: limits["disk_mb"] << 20,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
    }
    if own_user:  # elsewhere all processes of the user would count
        wanted[resource.RLIMIT_NPROC] = limits["threads"]
    for name, soft in wanted.items():
        # SIGXCPU comes first and tells what it was; the first process of a namespace never hears it
        hard = soft + (name == resource.RLIMIT_CPU and os.getpid() != 1)
        most = resource.getrlimit(name)[1]
        resource.setrlimit(name, (soft, hard) if most == resource.RLIM_INFINITY else (min(soft, most), min(hard, most)))


def check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def shut_in(spec: dict[str, Any]) -> None:
    mechanism = spec["mechanism"]
    if mechanism == "none":
        set_limits(spec["limits"], own_user=False)
        if MACHINE in COLUMN and libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            die_with_parent()
            filter_system_calls()
        return
    if mechanism == "namespaces":
        enter_namespaces(spec)
    else:
        die_with_parent()
    drop_capabilities()
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    if mechanism == "landlock":
        enter_landlock(spec)
    set_limits(spec["limits"], own_user=mechanism == "namespaces")
    filter_system_calls()


def main() -> None:
    spec = marshal.loads(bytes.fromhex(sys.argv[1]))
    status = spec["status"]
    os.set_inheritable(status, False)
    try:
        shut_in(spec)
        os.write(status, b"ok")
        os.execve(spec["command"][0], spec["command"], dict(os.environ))
    except Exception as error:
        os.write(status, f"{type(error).__name__}: {error}".encode())
        os._exit(1)


if __name__ == "__main__":
    main()
