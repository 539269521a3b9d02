"""What a result came from beside its config: packages, machine, the user's git state."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "kajiya",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "peft",
    "numpy",
    "hydra-core",
    "omegaconf",
    "mlflow",
)


def collect_provenance() -> dict[str, Any]:
    """Package versions, interpreter, platform, processor, memory, and the git state of the working directory."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: version for name in _PACKAGES if (version := package_version(name))},
        "machine": machine_facts(),
        "git": git_state(Path.cwd()),
        "working_directory": str(Path.cwd()),
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or `None`; nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, Any]:
    """Processor, usable cores, memory (bytes) and platform, without torch."""
    return {
        "platform": platform.platform(),
        "processor": _processor_name(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
