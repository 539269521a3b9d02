"""The benchmark of learning by reward alone, shortened: the reward rises, and without updates it does not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "grpo.py"


@pytest.mark.slow
def test_the_reward_rises_far_above_that_of_a_control_without_updates() -> None:
    command = [sys.executable, str(_SCRIPT), "--seeds", "1", "--steps", "80", "--control-steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (control|seed 0).*? \| ([\d.]+) \| ([\d.]+)–([\d.]+) \|", done.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["control", "seed 0"], done.stdout
    (control, low, high), (reached, from_, _) = ([float(each) for each in figures] for _, *figures in rows)
    assert low <= control <= high < 0.2
    assert reached > control + 0.3
    assert from_ > high
