"""Random valid configs raise no alarm, as `benchmarks/prove_random.py` draws and proves them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "prove_random.py"
_CONFIGS = 50


@pytest.mark.slow
def test_random_valid_configs_raise_no_alarm(tmp_path: Path) -> None:
    command = [sys.executable, str(_SCRIPT), "--configs", str(_CONFIGS), "--store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^ *\d+ no alarm .* passed", done.stdout, re.MULTILINE)) == _CONFIGS, done.stdout
    assert f"{_CONFIGS} configs proven, 0 with an alarm" in done.stdout
