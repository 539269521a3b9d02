"""A point of each table of `benchmarks/scaling.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"


def _point(*options: str) -> dict[str, float]:
    command = [sys.executable, str(_SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_of_a_row_attention_is_told_apart(tmp_path: Path) -> None:
    found = _point("--length", "512", "--tokens", "1024", "--layers", "1", "--store", str(tmp_path))
    assert 0 < found["attention_us"] < found["step_us"]
    assert found["peak_bytes"] > 2**26


@pytest.mark.slow
def test_of_a_vocabulary_the_logits_are_not_held() -> None:
    found = _point("--vocabulary", "32768")
    assert found["head_bytes"] == 2 * 32768 * 256 * 4
    assert 0 < found["beyond_bytes"] < 8192 * 32768 * 4
