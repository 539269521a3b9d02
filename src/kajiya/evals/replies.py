"""Replies of an endpoint, kept on the disk until the evaluation that asked for them is done, or goes on from there."""

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kajiya.config.digest import digest
from kajiya.run.lock import locked
from kajiya.run.store import Store

REPLIES = "replies"
"""Folder of the store; a file of it is `<digest of what is asked>.jsonl`, each line a request's digest and the reply's JSON."""
_DIGEST_CHARS = 64


@dataclass
class Replies:
    """What was answered so far. Equal requests may have unequal replies: each reply is given once."""

    _file: BinaryIO
    _places: dict[str, deque[tuple[int, int]]]
    """First byte and length of the replies that an earlier attempt has had, by the request."""
    n_kept: int = 0
    """Replies in the file."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, path: str, body: Any, ask: Callable[[], Any]) -> Any:
        """The reply to a request: one that is kept and was not given yet, or what `ask` returns, which is kept."""
        request = hashlib.sha256(json.dumps([path, body], sort_keys=True).encode()).hexdigest()
        with self._lock:
            places = self._places.get(request)
            place = places.popleft() if places else None
        if place is not None:
            first, length = place
            return json.loads(os.pread(self._file.fileno(), length, first))
        reply = ask()
        with self._lock:
            self._file.write(f"{request} {json.dumps(reply)}\n".encode())
            self._file.flush()
            self.n_kept += 1
        return reply


@contextmanager
def kept_replies(store: Store, asked: Any) -> Iterator[Replies]:
    """The replies to `asked` (all that decides the requests), which are deleted when the block ends well.

    It is told, as a note of the store, when replies of an earlier attempt are there, and when the block leaves some behind.
    """
    key = digest(asked)[:24]
    path = store.root / REPLIES / f"{key}.jsonl"
    with locked(lock_of(path), "an evaluation of the same endpoint", store.on_event):
        since = path.stat().st_mtime if path.is_file() else time.time()
        with path.open("a+b") as file:
            places = _places_in(file)
            replies = Replies(file, places, n_kept=sum(map(len, places.values())))
            if replies.n_kept:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
                words = f"{replies.n_kept:,} replies of the endpoint are kept of an earlier attempt, until {when}"
                store.on_event("note", text=f"{words}, and are not asked for again; delete {path} to ask anew")
            try:
                yield replies
            except BaseException:
                if replies.n_kept:
                    words = f"{replies.n_kept:,} replies of the endpoint are kept in {path}"
                    store.on_event("note", text=f"{words}: the same command goes on from there")
                else:
                    path.unlink(missing_ok=True)
                raise
        path.unlink(missing_ok=True)  # a person may have deleted it, as the note says


def lock_of(path: Path) -> Path:
    """The lock of a file of replies."""
    return path.with_name(f".{path.stem}.lock")


def _places_in(file: BinaryIO) -> dict[str, deque[tuple[int, int]]]:
    """Where the replies are; a last line that a crash cut short is cut off."""
    places: dict[str, deque[tuple[int, int]]] = {}
    file.seek(0)
    at = 0
    for line in file:
        if not line.endswith(b"\n"):
            file.truncate(at)
            break
        request, reply = line[:_DIGEST_CHARS].decode(), line[_DIGEST_CHARS + 1 :]
        places.setdefault(request, deque()).append((at + _DIGEST_CHARS + 1, len(reply)))
        at += len(line)
    return places
