"""Takes rights from this process: files, network, memory, core dumps. Linux; less elsewhere.

Files and network are restricted by Landlock, for the calling thread and those that it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_PR_SET_NO_NEW_PRIVS = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ABI_FLAG, _PATH_BENEATH = 1, 1
# Rights of Landlock: write a file, cut it; all others that change a folder; bind and connect TCP;
# no signals to, and no abstract sockets of, processes outside.
_WRITE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGE = sum(1 << bit for bit in range(4, 14)) | _WRITE | _TRUNCATE
_TCP, _SCOPED = 0b11, 0b11
_FILES_ABI, _TCP_ABI, _SCOPED_ABI = 3, 4, 6
_DEVICES = ("/dev", "/proc/self")

program_folders: list[str] = []
"""Folders that a program may write to which an engine starts; empty: it is not confined.

Rules hold for what a confined process starts, too, but /proc/self is another folder there, and CUDA
does not start without writing to its own. So the program's process takes the rules, and not its
parent.
"""


def give_up_privileges() -> None:
    """Rule out core dumps, and new privileges by programs that this process starts."""
    # A core dump has prompts and answers in it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit_memory(limit: int) -> None:
    """Make allocations fail once this process has `limit` bytes of its own."""
    if sys.platform == "linux":
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def restrict(writable: Iterable[Path]) -> bool:
    """Allow changes of files only in the folders `writable`, and no TCP; return whether it holds.

    It needs Linux 6.2, and 6.7 for TCP. Temporary files of the system, /dev/shm for example, stay
    allowed. It is for good, and for all processes that this one starts.

    Raises:
        OSError: the kernel refused it.
    """
    if (abi := landlock()) < _FILES_ABI:
        return False
    net, scoped = _TCP if abi >= _TCP_ABI else 0, _SCOPED if abi >= _SCOPED_ABI else 0
    attributes = struct.pack("QQQ", _CHANGE, net, scoped)
    size = 24 if abi >= _SCOPED_ABI else 16 if abi >= _TCP_ABI else 8
    ruleset = _call(_CREATE_RULESET, ctypes.create_string_buffer(attributes), size, 0)
    try:
        for folder in writable:
            _allow(ruleset, folder, _CHANGE)
        for name in _DEVICES:
            _allow(ruleset, Path(name), _WRITE | _TRUNCATE)
        _allow(ruleset, Path("/dev/shm"), _CHANGE)  # noqa: S108 - shared memory, by its name
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return True


def _allow(ruleset: int, folder: Path, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        try:
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
            _call(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        finally:
            os.close(descriptor)


@cache
def landlock() -> int:
    """Return the version of Landlock's interface; 0 without it."""
    try:
        return _call(_CREATE_RULESET, None, 0, _ABI_FLAG)
    except OSError:
        return 0


def _call(number: int, *arguments: object) -> int:
    if sys.platform != "linux":
        raise OSError("there are no system calls of Linux here")
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    plain = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    if (result := int(library.syscall(ctypes.c_long(number), *plain))) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result


def abilities() -> dict[str, str]:
    """Return what this system can take from the process of a model, in words."""
    abi, linux = landlock(), sys.platform == "linux"
    version = f"restricted, Landlock {abi}" if abi else "not restricted: no Landlock in this kernel"
    old = f"not restricted: Landlock {abi} is too old"
    return {
        "core dumps": "none",
        "new privileges": "none" if linux else "not restricted",
        "writes": version if not abi or abi >= _FILES_ABI else old,
        "tcp": version if not abi or abi >= _TCP_ABI else old,
        "memory": "limited without a GPU" if linux else "not limited",
    }
