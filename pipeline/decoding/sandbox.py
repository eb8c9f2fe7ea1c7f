"""Takes from the decoding process what a decoder that was taken over by a file could use: files, network, processes.

Two fences of the Linux kernel, each complete for files. Landlock lets the process open nothing by any name; a system
call filter (seccomp) answers "not permitted" to opening, changing and removing files, sockets, new programs and
processes, other processes' memory, and ways around the filter. What was open before stays usable: the pipes to the
parent, the shared memory, and the video, which comes as an open descriptor. On a kernel without one of them the other
holds; elsewhere than on Linux (x86-64 or arm64) neither does, and `lock_down` says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

PR_SET_NO_NEW_PRIVS = 38
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # on every architecture
SECCOMP_SET_MODE_FILTER = 1
# Over all threads; without the mitigation that slows a filtered process down on kernels before 5.16.
SECCOMP_FLAGS = 0b101
# Of BPF: load a word of the call's description, compare, test bits, return.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR = 0x7FFF0000, 0x00050000
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
CLONE_THREAD = 0x10000

# Architecture -> its number for the filter, that of the system call `seccomp`, of `clone` and of `clone3`.
ARCHITECTURES = {"x86_64": (0xC000003E, 317, 56, 435), "aarch64": (0xC00000B7, 277, 220, 435)}
# System calls that are refused: name, number on x86-64, number on arm64 ("-": it has none).
REFUSED = """
open 2 -, openat 257 56, openat2 437 437, creat 85 -, open_by_handle_at 304 265,
truncate 76 45, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -,
unlinkat 263 35, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, mknod 133 -, mknodat 259 33, chmod 90 -,
fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -,
utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14,
lremovexattr 198 15, fremovexattr 199 16, chroot 161 51, mount 165 40, umount2 166 39, pivot_root 155 41,
socket 41 198, socketpair 53 199, bind 49 200, listen 50 201, connect 42 203, accept 43 202, accept4 288 242,
execve 59 221, execveat 322 281, fork 57 -, vfork 58 -, unshare 272 97, setns 308 268, ptrace 101 117,
process_vm_readv 310 270, process_vm_writev 311 271, pidfd_open 434 434, pidfd_getfd 438 438, kill 62 129,
tkill 200 130, rt_sigqueueinfo 129 138, pidfd_send_signal 424 424, io_uring_setup 425 425, bpf 321 280,
perf_event_open 298 241, userfaultfd 323 282, add_key 248 217, request_key 249 218, keyctl 250 219
"""


def lock_down() -> list[str]:
    """Gives up what decoding does not need, for good.

    Everything that is loaded late must be loaded before.

    Returns:
        The fences that hold now, e.g. `["Landlock 7", "seccomp"]`; empty where the system has none.
    """
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return []
    return [*restrict_files(libc), *filter_calls(libc)]


def restrict_files(libc: ctypes.CDLL) -> list[str]:
    """Landlock with every right handled and none granted: files from version 1, TCP from 4, signals from 6."""
    syscall = libc.syscall
    syscall.restype = ctypes.c_long
    version = syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1 or not _has_one_thread():  # it binds the thread that asks and those it starts
        return []
    n_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    size = 8 if version < 4 else 16 if version < 6 else 24  # of: rights on files, on TCP, scopes
    rules = struct.pack("QQQ", (1 << n_rights) - 1, 0b11, 0b11)[:size]
    descriptor = syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(size), 0)
    if descriptor < 0:
        return []
    try:
        return [] if syscall(LANDLOCK_RESTRICT_SELF, descriptor, 0) else [f"Landlock {version}"]
    finally:
        os.close(descriptor)


def _has_one_thread() -> bool:
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def filter_calls(libc: ctypes.CDLL) -> list[str]:
    """A seccomp filter over all threads that refuses the calls listed above, and processes but not threads."""
    if platform.machine() not in ARCHITECTURES:
        return []
    architecture, seccomp, clone, clone3 = ARCHITECTURES[platform.machine()]
    column = 1 if platform.machine() == "x86_64" else 2
    rows = [row.split() for row in REFUSED.replace("\n", " ").split(",")]
    refused = [int(row[column]) for row in rows if row[column] != "-"]
    # Each step: code, steps to leap if true, if false, operand. At the end: allow; not permitted; no such call.
    end = 8 + len(refused)
    steps = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 0, end - 1, architecture),
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, end - 3, 0, 0x40000000),  # x86-64's second set of numbers
        (EQUAL, end - 3, 0, clone3),  # its flags cannot be looked at; told that it is unknown, libc takes clone
        *((EQUAL, end - 5 - i, 0, number) for i, number in enumerate(refused)),
        (EQUAL, 0, 2, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
        (ANY_BIT, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
    ]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(steps), ctypes.addressof(buffer))  # P is aligned as in C
    return ["seccomp"] if libc.syscall(seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FLAGS, program) == 0 else []
