"""Hashes of files: read whole, or for large files that did not change since, remembered."""

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kajiya.run.caches import cache_folder

_LARGE_BYTES = 8 * 2**20
"""Smaller files are hashed in some hundredths of a second. A shard of `data.shard_bytes` is larger."""
_SETTLED_NS = 2 * 10**9
"""How long ago a file must have changed: within it, a second change may bear the same time."""
_MAX_REMEMBERED = 256
"""Notes in each of the 256 folders that they are spread over."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()
    note = cache_folder() / "hashes" / name[:2] / f"{name[2:32]}.json"
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
    try:
        noted = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(noted, dict):
        return None
    found = noted.pop("sha256", None)
    return found if noted == facts and isinstance(found, str) and _SHA256.fullmatch(found) else None


def _remember(note: Path, noted: dict[str, Any]) -> None:
    beside = note.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(noted), encoding="utf-8")
        beside.replace(note)
        notes = list(note.parent.iterdir())
        if len(notes) > _MAX_REMEMBERED:
            for old in sorted(notes, key=lambda each: each.stat().st_mtime_ns)[: len(notes) // 2]:
                old.unlink(missing_ok=True)
