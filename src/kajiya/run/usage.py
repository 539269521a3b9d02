"""What a process has used up: processor time, the most memory; added up over the attempts of a run."""

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def usage_with(before: Mapping[str, Any] | None) -> dict[str, Any]:
    """`cpu_seconds` of this process added to those of earlier attempts, `peak_bytes` the most of any of them."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    earlier = before or {"cpu_seconds": 0.0, "peak_bytes": 0}
    return {
        "cpu_seconds": earlier["cpu_seconds"] + own.ru_utime + own.ru_stime,
        "peak_bytes": max(earlier["peak_bytes"], peak_memory()),
    }


def peak_memory() -> int:
    """Highest resident memory of this process so far, bytes."""
    # Linux's `ru_maxrss` outlives an exec: a process begun by a large one would seem as large.
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Resident memory of this process now, bytes; the highest so far where the system does not tell."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.is_file() else peak_memory()


def oom_kills() -> int | None:
    """Processes that the kernel has ended for lack of memory since the boot; `None` where it does not say."""
    counters = Path("/proc/vmstat")
    if not counters.is_file():
        return None
    counts = dict(line.split() for line in counters.read_text(encoding="utf-8").splitlines())
    return int(counts["oom_kill"]) if "oom_kill" in counts else None
