"""The benchmark's structure: both peers train the same thing and are compared; no figure of time is asserted."""

import json
import math
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import train_throughput

    return train_throughput


def made_result(throughput: ModuleType, peer: str, **changed: Any) -> Any:
    result = throughput.Result(
        peer=peer,
        tokens_per_second=100.0,
        first_step_s=4.0,
        peak_bytes=2**30,
        step_s=[1.0, 1.0],
        losses=[9.0, 8.0, 7.0],
        tokens_digest="a",
        initial_weights=1000.0,
        versions={},
        settings={},
        load_before=0.0,
    )
    return replace(result, **changed)


def test_ratios_are_of_medians(throughput: ModuleType) -> None:
    ours = [made_result(throughput, "a", tokens_per_second=speed) for speed in (300.0, 200.0, 900.0)]
    theirs = [made_result(throughput, "b", tokens_per_second=speed) for speed in (100.0, 150.0, 300.0)]
    theirs = [replace(result, peak_bytes=2**31, first_step_s=16.0) for result in theirs]
    comparison = throughput.compare(ours, theirs, "fp32")
    assert comparison.tokens_per_second == 300.0 / 150.0
    assert comparison.tokens_per_second_rounds == [3.0, 200.0 / 150.0, 3.0]
    assert comparison.peak_memory == 0.5
    assert comparison.first_step == 0.25
    assert comparison.agreement.holds


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens_digest": "b"}, "other tokens"),
        ({"initial_weights": 1001.0}, "other initial weights"),
        ({"losses": [9.0, 8.1, 7.0]}, "1.00e-01 nats apart at step 2"),
        ({"losses": [9.0, 8.0, math.nan]}, "inf nats apart at step 3"),
    ],
)
def test_a_disagreement_is_printed_as_one(
    throughput: ModuleType, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], said: str
) -> None:
    ours, theirs = [made_result(throughput, "a")], [made_result(throughput, "b", **changed)]
    comparison = throughput.compare(ours, theirs, "fp32")
    assert not comparison.agreement.holds
    order = throughput.WorkOrder("S", "", "", "", None, "", 2, 8, 2, 3, "fp32", False, 0)
    throughput.print_table(order, {"a": ours, "b": theirs}, [comparison])
    printed = capsys.readouterr().out
    assert "DISAGREEMENT with b" in printed
    assert said in printed


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory of other processes is read from /proc")
def test_memory_counts_descendants(throughput: ModuleType) -> None:
    import measure

    taken = 96 * 2**20
    # The child takes a block and its own child another one at the same time; each prints a line when it has it.
    hold = f"block = bytearray({taken}); block[::4096] = b'x' * len(block[::4096]); print('held', flush=True); input()"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; p.wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with measure.MemoryWatch(process.pid) as watch:
        assert [process.stdout.readline() for _ in range(2)] == ["held\n", "held\n"]
        alone = max(highest for _, highest in measure._family(process.pid))
        while (watch.peak_bytes or 0) < 2 * taken:
            assert process.poll() is None
        process.communicate("\n\n")
    assert alone < 2 * taken


def test_every_peer_is_offered(throughput: ModuleType) -> None:
    assert throughput.peers() == ["hf_trainer", "kajiya_train"]
    assert throughput.parse([]).peers == ["kajiya_train", "hf_trainer"]


@pytest.mark.slow
def test_both_peers_do_the_same_work(tmp_path: Path) -> None:
    text = Path(sysconfig.get_paths()["stdlib"]) / "email"
    command = [sys.executable, str(BENCHMARKS / "train_throughput.py"), "--json", "--model", "XS", "--repeats", "1"]
    command += ["--rows", "4", "--micro-rows", "2", "--tokens", "32", "--steps", "4"]
    command += ["--store", str(tmp_path), "--text", str(text), "--precision", "fp32"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["runs"]) == {"kajiya_train", "hf_trainer"}
    for runs in report["runs"].values():
        (result,) = runs
        assert len(result["losses"]) == 4
        assert len(result["step_s"]) == 3
        assert result["tokens_per_second"] > 0
        assert result["losses"][0] == pytest.approx(math.log(512), abs=0.2)
    (comparison,) = report["comparisons"]
    assert comparison["peer"] == "hf_trainer"
    agreement = comparison["agreement"]
    assert agreement["same_tokens"]
    assert agreement["same_weights"]
    assert agreement["same_losses"]
    assert agreement["largest_loss_difference"] < 1e-4
    kajiya, trainer = (report["runs"][peer][0]["tokens_per_second"] for peer in ("kajiya_train", "hf_trainer"))
    assert comparison["tokens_per_second"] == pytest.approx(kajiya / trainer)
