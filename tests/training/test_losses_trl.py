"""The losses beside TRL's own code on the same tensors. TRL takes ten seconds to import, so these are among the slow tests."""

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).with_name("trl_values.py")


@pytest.mark.slow
def test_losses_equal_those_of_trl() -> None:
    """In a process of its own: TRL's imports warn, and change settings of the libraries that they touch."""
    done = subprocess.run([sys.executable, str(_SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("compared ")]
    assert len(lines) == 6 + 4 + 3 + 3 + 2 * 6
    for _, name, ours, theirs in lines:
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5, abs=1e-6), name
