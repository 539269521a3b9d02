"""Whether the process that a manifest names is still there."""

import os
import platform
from pathlib import Path
from typing import Any


def process_facts() -> dict[str, Any]:
    """This process, told apart from a later one with the same number: `pid`, `begun` (clock ticks or null), `host`."""
    return {"pid": os.getpid(), "begun": _begun(os.getpid()), "host": platform.node()}


def is_alive(process: dict[str, Any]) -> bool:
    """Whether that process runs on this machine; one of another machine counts as running, since nobody here knows."""
    if process["host"] != platform.node():
        return True
    return is_running(process["pid"]) and process["begun"] in (None, _begun(process["pid"]))


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
