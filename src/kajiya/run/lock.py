"""A lock that one process has at a time. The system frees it when its holder ends, however that ends."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kajiya.run.alive import is_alive, process_facts
from kajiya.run.files import full_disk_said

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""What a file system answers that knows no locks."""


@contextmanager
def locked(path: Path, purpose: str, on_event: Callable[..., object]) -> Iterator[None]:
    """Hold the lock of the file `path`, which is there while somebody holds it or waits for it.

    Who has to wait says so once, as a `note`, with the process that it waits for. On a file system without locks nothing is
    held, which is told as a `warning`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_said(path.parent, purpose):
        handle = _acquire(path, purpose, on_event)
    if handle is None:
        yield
        return
    try:
        yield
    finally:
        # Deleted while it is held: those who wait see that it is gone, and none of them holds a file that others cannot find.
        path.unlink(missing_ok=True)
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock of the file `path` if no process has it; yields whether. Without locks on the file system it is never free."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        is_mine = _try(handle) and _is_at(path, handle)
    except OSError as problem:
        os.close(handle)
        if problem.errno not in _NO_LOCKS:
            raise
        yield False
        return
    try:
        yield is_mine
    finally:
        if is_mine:
            path.unlink(missing_ok=True)
        os.close(handle)  # which frees it


def is_free(path: Path) -> bool:
    """Whether no process has the lock of the file `path`, which may be missing; nothing is changed."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return _try(handle)
    except OSError as problem:
        if problem.errno not in _NO_LOCKS:
            raise
        return False
    finally:
        os.close(handle)


def _acquire(path: Path, purpose: str, on_event: Callable[..., object]) -> int | None:
    """The open file, locked; `None` where there are no locks."""
    is_said = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try(handle):
                if not is_said:
                    on_event("note", text=f"{purpose}: waiting for {_holder(handle)}, which makes the same right now")
                    is_said = True
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(path, handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(process_facts()).encode(), 0)
                return handle
        except OSError as problem:
            os.close(handle)
            if problem.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            on_event(
                "warning",
                text=f"{purpose}: the file system of {path.parent} knows no locks ({problem.strerror}), so nothing keeps "
                "two processes from making the same at once; start one at a time",
            )
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, handle: int) -> bool:
    """Whether the open file is still the one at `path`: an earlier holder may have deleted it meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """The process that has the lock, in words, as far as the file says."""
    try:
        process = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return "another process"  # it has not yet written who it is
    if not is_alive(process):
        return "another process"  # what is written there is of one that was killed
    return f"process {process['pid']} on {process['host']}"
