"""Hashes of files: read whole, or for large files that did not change since, remembered."""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kajiya.run.caches import cache_folder

_LARGE_BYTES = 64 * 2**20
"""Smaller files are hashed in less than a tenth of a second."""
_SETTLED_NS = 2 * 10**9
"""How long ago a file must have changed: within it, a second change may bear the same time."""
_MAX_REMEMBERED = 4096


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, 64 hex digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remembered_hash(path: Path) -> str:
    """As `hash_file`; a large file is not read again while the system says that it is the same and did not change.

    What is remembered stands under the path with the file's device, inode, size and both of its times of change. A file that
    changed within 2 s before it was read is not remembered; a note that is broken or cannot be written is as none.
    """
    before = path.stat()
    if before.st_size < _LARGE_BYTES:
        return hash_file(path)
    note = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.json"
    facts = _facts(path, before)
    known = _known(note, facts)
    if known is not None:
        return known
    now = time.time_ns()
    found = hash_file(path)
    is_settled = now - max(before.st_mtime_ns, before.st_ctime_ns) >= _SETTLED_NS
    if is_settled and _facts(path, path.stat()) == facts:
        _remember(note, facts | {"sha256": found})
    return found


def _facts(path: Path, stat: os.stat_result) -> dict[str, Any]:
    """What tells this content of a file from any other, as far as the system says."""
    return {
        "path": str(path.absolute()),
        "device": stat.st_dev,
        "inode": stat.st_ino,
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
    }


def _known(note: Path, facts: dict[str, Any]) -> str | None:
    """The hash in the note, if it is of this content."""
