"""What the run's process takes of the machine from moment to moment, for the event log: without torch and without psutil."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kajiya.run.usage import resident_memory

_MB = 1e6


@dataclass
class Meter:
    """Called now and then; each figure of the processor is the mean since the call before."""

    folder: Path
    """Where the run writes; its disk is looked at."""
    accelerator: Callable[[], dict[str, float]] = field(default=dict)
    """Further figures, of an accelerator."""
    every_s: float = 1.0
    """Least time between two readings, seconds: a log line each step costs no reading each step."""
    _cpu_s: float = field(default_factory=lambda: sum(os.times()[:2]))
    _at_s: float = field(default_factory=time.perf_counter)

    def __call__(self) -> dict[str, float]:
        """Figures by name, none where the last reading is too recent; `system/…` is where MLflow looks for them.

        Percentages are of one core, or of the whole memory.
        """
        cpu_s, at_s = sum(os.times()[:2]), time.perf_counter()
        if at_s - self._at_s < self.every_s:
            return {}
        busy = (cpu_s - self._cpu_s) / max(at_s - self._at_s, 1e-9)
        self._cpu_s, self._at_s = cpu_s, at_s
        values = {
            "system/process_cpu_percentage": 100 * busy,
            "system/disk_available_megabytes": shutil.disk_usage(self.folder).free / _MB,
        }
        return values | _memory() | self.accelerator()


def _memory() -> dict[str, float]:
    """Memory of this process and of the machine, where /proc tells."""
    if sys.platform != "linux":
        return {}
    resident = resident_memory()
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    known = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines}
    used = 1 - known["MemAvailable"] / known["MemTotal"]
    return {
        "system/process_memory_megabytes": resident / _MB,
        "system/system_memory_usage_percentage": 100 * used,
    }
