"""What a result came from beside its config: packages, machine, the user's git state."""

import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROJECT = "kajiya"
_INDIRECT = ("omegaconf", "triton")
"""Packages that the requirements bring along and that results hang on."""
_TOOLS = ("test", "lint", "docs")
"""Extras that no result hangs on."""


def collect_provenance() -> dict[str, Any]:
    """Package versions, interpreter, platform, processor, memory, and the git state of the working directory."""
    return {
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "machine": machine_facts(),
        "git": git_state(Path.cwd()),
        "working_directory": str(Path.cwd()),
    }


def package_versions() -> dict[str, str]:
    """Version of the package and of all that is installed of its requirements and of its extras', but for its own tools."""
    names = dict.fromkeys([_PROJECT, *_requirements(), *_INDIRECT])
    return {name: version for name in names if (version := package_version(name))}


def _requirements() -> Iterator[str]:
    from packaging.requirements import Requirement

    # Sources that are on the Python path and not installed say nothing of what they need: all that is there.
    if package_version(_PROJECT) is None:
        yield from (each.name for each in importlib.metadata.distributions())
        return
    about = importlib.metadata.metadata(_PROJECT)
    extras = [extra for extra in about.get_all("Provides-Extra") or [] if extra not in _TOOLS]
    for text in about.get_all("Requires-Dist") or []:
        wanted = Requirement(text)
        if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield wanted.name


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or `None`; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, Any]:
    """Processor, usable cores, memory (bytes), platform and GPUs, without torch."""
    return {
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpu_facts(),
    }


def gpu_facts() -> list[dict[str, Any]]:
    """Name, memory (bytes; `None` where it is the machine's own) and driver of each GPU that `nvidia-smi` knows."""
    if shutil.which("nvidia-smi") is None:
        return []
    words = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    rows = (line.rsplit(", ", 2) for line in done.stdout.splitlines())
    return [
        {"name": name, "memory_bytes": int(mib) * 2**20 if mib.isdigit() else None, "driver": driver}
        for name, mib, driver in rows
    ]


def usable_cores() -> int:
    """Cores that this process may run on, at most as many as a container's limit of processor time amounts to."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    for quota, period in _cpu_limits(Path("/sys/fs/cgroup")):
        cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


def _cpu_limits(root: Path) -> list[tuple[int, int]]:
    """Microseconds of processor time in each period that control groups grant, (quota, period); without a limit, none."""
    found = []
    with contextlib.suppress(OSError, ValueError):  # version 2; "max" is no number
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
        found.append((int(quota), int(period)))
    with contextlib.suppress(OSError, ValueError):  # version 1, where -1 is no limit
        quota, period = (
            (root / "cpu" / name).read_text(encoding="ascii") for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        found.append((int(quota), int(period)))
    return [(quota, period) for quota, period in found if quota > 0 and period > 0]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files were changed, of the git checkout around `folder`; `None` outside one."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed_files": len((git("status", "--porcelain", "-uno") or "").splitlines())}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
