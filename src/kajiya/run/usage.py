"""What processes have used up: processor time, the most memory, GPUs' energy; added up over a run's attempts and ranks."""

import ctypes
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kajiya.run.files import read_json, write_json
from kajiya.run.gpu_energy import joules_since


def usage_with(before: Mapping[str, Any] | None, gpus: Mapping[str, int | None] | None = None) -> dict[str, Any]:
    """`cpu_seconds` of this process and its ended children added to those of earlier attempts, `peak_bytes` the most of any.

    With `gpus`, as `read_energy` gave them when the attempt began: `gpu_joules` of all of them together (`None` where a driver
    does not say), and `gpu_peak_bytes`, the most that torch held of one in this process.
    """
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    earlier = {"cpu_seconds": 0.0, "peak_bytes": 0} | dict(before or {})
    used = earlier | {
        "cpu_seconds": earlier["cpu_seconds"] + sum(each.ru_utime + each.ru_stime for each in times),
        "peak_bytes": max(earlier["peak_bytes"], peak_memory()),
    }
    if not gpus:
        return used
    known = {"gpu_joules": 0.0, "gpu_peak_bytes": 0} | earlier
    now, so_far = joules_since(gpus), known["gpu_joules"]
    return used | {
        "gpu_joules": None if now is None or so_far is None else so_far + now,
        "gpu_peak_bytes": max(known["gpu_peak_bytes"], _peak_gpu_memory()),
    }


def with_others(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several processes have used together: times and energy are sums (of what one does not know, `None`), peaks the most."""
    total = dict(own)
    for other in others:
        for name in ("cpu_seconds", "gpu_joules"):
            known = [each[name] for each in (total, other) if name in each]
            if known:
                total[name] = None if None in known else sum(known)
        for name in ("peak_bytes", "gpu_peak_bytes"):
            known = [each[name] for each in (total, other) if name in each]
            if known:
                total[name] = max(known)
    return total


_NOTES = "usage"
"""Folder of a run with what each rank but the first has used in the latest attempt: `rank-<n>.json`."""
_POLL_S = 0.05


def note_usage(run_folder: Path, rank: int, gpus: Mapping[str, int | None] | None = None) -> None:
    """Leave for the first rank what this process has used."""
    folder = run_folder / _NOTES
    folder.mkdir(exist_ok=True)
    write_json(folder / f"rank-{rank}.json", usage_with(None, gpus))


def forget_notes(run_folder: Path) -> None:
    """Take away what the ranks of an earlier attempt have left: its first rank has counted it."""
    shutil.rmtree(run_folder / _NOTES, ignore_errors=True)


def noted_usage(run_folder: Path, n: int, patience_s: float) -> list[dict[str, Any]]:
    """What the ranks 1 … `n` have noted; for those that have not, it waits `patience_s` seconds together."""
    paths = [run_folder / _NOTES / f"rank-{rank}.json" for rank in range(1, n + 1)]
    deadline = time.monotonic() + patience_s
    while not all(path.is_file() for path in paths) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return [read_json(path) for path in paths if path.is_file()]


def _peak_gpu_memory() -> int:
    import torch

    return max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


_before_restart = 0
"""Highest resident memory before the kernel's mark was last set back, bytes."""


def peak_memory() -> int:
    """Highest resident memory of this process so far, bytes."""
    return max(_before_restart, recent_peak())


def restart_peak() -> bool:
    """Have `recent_peak` begin anew from what is held now, memory that was freed given back before; false where that cannot be."""
    global _before_restart
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        return False
    so_far = recent_peak()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        mark.write_text("5")
    except OSError:
        return False
    _before_restart = max(_before_restart, so_far)
    return True


def recent_peak() -> int:
    """Highest resident memory of this process since `restart_peak`, or ever, bytes."""
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
