"""A process that can change files in one folder alone: Linux's Landlock, which asks for no privileges."""

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""Numbers of the system calls, the same on every architecture but Alpha (landlock(7))."""
_VERSION_FLAG, _RULE_PATH_BENEATH = 1, 1
_PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 38, 36
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_CHANGES = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
"""Write to a file; remove and make entries of a folder, of each kind."""
_REFER = 1 << 13
"""Link or rename into another folder, from version 2 on."""
_SCOPES = 1 << 0 | 1 << 1
"""Abstract sockets of, and signals to, processes outside, from version 6 on."""


@cache
def why_unconfined() -> str | None:
    """Why programs may change files outside their folder here, in words; `None` where they may not."""
    version = _version()
    if version >= 3:
        return None
    if version > 0:
        return "this kernel's Landlock does not keep a program from emptying files (Linux 6.2 does)"
    return "this system has no Landlock (Linux 5.13 with Landlock enabled has)"


@contextmanager
def confinement(folder: Path) -> Iterator[Callable[[], None]]:
    """What a child calls before it starts its program: from then on it changes files in `folder` alone, and sends signals to
    its own processes alone where the kernel knows how. It does nothing where there is no Landlock."""
    version = _version()
    if version < 1:
        yield lambda: None
        return
    handled = _CHANGES | (_REFER if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    scopes = _SCOPES if version >= 6 else 0
    attributes = struct.pack("=QQQ", handled, 0, scopes)
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes) if version >= 6 else 8, 0)
    try:
        _allow(ruleset, folder, handled)
        _allow(ruleset, Path(os.devnull), handled & (_WRITE_FILE | _TRUNCATE))

        def confine() -> None:
            _library().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            _call(_RESTRICT_SELF, ruleset, 0)

        yield confine
    finally:
        os.close(ruleset)


def adopt_orphans() -> None:
    """Make this process the parent of what its descendants leave behind, in the place of the system's first process; on Linux."""
    if sys.platform == "linux":
        _library().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, handle), 0)
    finally:
        os.close(handle)


@cache
def _version() -> int:
    """Landlock's version; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(_library().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))))


@cache
def _library() -> ctypes.PyDLL:
    # A PyDLL keeps the interpreter's lock: what runs between fork and exec may not wait for another thread.
    return ctypes.PyDLL(None, use_errno=True)


def _call(number: int, *arguments: int | bytes) -> int:
    plain = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(_library().syscall(ctypes.c_long(number), *plain))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result
