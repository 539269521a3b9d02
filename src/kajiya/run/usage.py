"""What a process has used up: processor time, the most memory; added up over the attempts of a run."""

import resource
import sys
from collections.abc import Mapping
from typing import Any


def usage_with(before: Mapping[str, Any] | None) -> dict[str, Any]:
    """`cpu_seconds` of this process added to those of earlier attempts, `peak_bytes` the most of any of them."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    earlier = before or {"cpu_seconds": 0.0, "peak_bytes": 0}
    return {
        "cpu_seconds": earlier["cpu_seconds"] + own.ru_utime + own.ru_stime,
        "peak_bytes": max(earlier["peak_bytes"], own.ru_maxrss * unit),
    }
