"""The meter's figures against psutil's."""

import time
from pathlib import Path

import psutil
import pytest

from kajiya.run.meter import Meter


def test_figures_are_psutils(tmp_path: Path) -> None:
    meter = Meter(tmp_path, lambda: {"system/gpu_0_memory_usage_megabytes": 7.0}, every_s=0.1)
    assert meter() == {}, "read anew at once"
    ends = time.process_time() + 0.2
    while time.process_time() < ends:
        pass
    values = meter()
    assert 0 < values["system/process_cpu_percentage"] < 100 * (psutil.cpu_count() or 1) + 10
    assert values["system/process_memory_megabytes"] == pytest.approx(
        psutil.Process().memory_info().rss / 1e6, rel=0.05
    )
    assert values["system/system_memory_usage_percentage"] == pytest.approx(psutil.virtual_memory().percent, abs=10)
    assert values["system/disk_available_megabytes"] > 0
    assert values["system/gpu_0_memory_usage_megabytes"] == 7.0
