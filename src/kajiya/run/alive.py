"""Whether the process that a manifest names is still there."""

import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

BEAT = "alive"
"""File of a run's folder that its process touches while it works."""
_BEAT_S = 15.0
_SILENT_S = 120.0
"""A process of another machine that has not touched its file for so long is gone."""


def process_facts() -> dict[str, Any]:
    """This process, told apart from a later one with the same number: `pid`, `begun` (clock ticks or null), `host`."""
    return {"pid": os.getpid(), "begun": _begun(os.getpid()), "host": platform.node()}


def is_alive(process: dict[str, Any], beat: Path | None = None) -> bool:
    """Whether that process runs on this machine; one of another machine, while its file `beat` was touched within 2 minutes.

    Where there is no such file nobody here knows, and it counts as running.
    """
    if process["host"] != platform.node():
        return beat is None or silent_since(process, beat) is None
    return is_running(process["pid"]) and process["begun"] in (None, _begun(process["pid"]))


class Beat:
    """Touches a file every 15 seconds until it is stopped, by which other machines see that this process works."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="kajiya-beat", daemon=True)

    def start(self) -> "Beat":
        """Begin; the file is there when this returns."""
        self._path.touch()
        self._thread.start()
        return self

    def stop(self) -> None:
        """End, and take the file away."""
        self._is_over.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._is_over.wait(_BEAT_S):
            try:
                self._path.touch()
            except OSError:  # the folder was deleted, or its disk is away: nobody looks there either
                continue


def silent_since(process: dict[str, Any], beat: Path) -> float | None:
    """When a process of another machine last touched its file, Unix seconds, if that is long ago; else `None`."""
    if process["host"] == platform.node():
        return None
    try:
        touched = beat.stat().st_mtime
    except FileNotFoundError:
        return None
    return touched if _now_at(beat) - touched > _SILENT_S else None


def _now_at(beat: Path) -> float:
    """Unix seconds by the clock of the file's own file system, which both machines share."""
    probe = beat.with_name(f".{beat.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        probe.touch()
    except OSError:  # who may only read the folder, or finds its disk full, looks at their own clock
        return time.time()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def is_running(pid: int) -> bool:
    """Whether a process of that number is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # there, and somebody else's
    return True


def _begun(pid: int) -> int | None:
    """Start of a process in clock ticks since boot, where /proc says; `None` for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
