"""What torchrun says to a process; the flow under it: the same losses, one voice, one model, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import small_overrides

from kajiya.errors import ConfigError
from kajiya.run.events import read_events
from kajiya.run.folder import find_run
from kajiya.run.hashing import hash_file
from kajiya.run.store import Store
from kajiya.training.portions import share_out
from kajiya.training.ranks import Ranks, find_ranks


def test_the_place_is_read_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_ranks("auto") == find_ranks("single") == Ranks()
    with pytest.raises(ConfigError, match="torchrun"):
        find_ranks("ddp")
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert find_ranks("auto") == find_ranks("ddp") == Ranks(3, 4, 1)
    with pytest.raises(ConfigError, match="single"):
        find_ranks("single")


@pytest.mark.parametrize(
    ("rows", "micro", "n", "expected"), [(8, 8, 1, (8, 1)), (8, 8, 2, (4, 1)), (24, 8, 2, (6, 2)), (12, 5, 3, (4, 1))]
)
def test_rows_are_shared_out(rows: int, micro: int, n: int, expected: tuple[int, int]) -> None:
    portions = share_out(rows, micro, n)
    assert (portions.micro_batch, portions.accumulate) == expected
    assert portions.batch_rows == rows


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"9 rows.*2 processes"):
        share_out(9, 4, 2)


def _kajiya(store: Path, *before: str) -> Path:
    overrides = small_overrides("train.steps=6", "eval.samples=0", "train.compile=off")
    command = [*before, "-m", "kajiya", "train", "stdlib-pretrain", *overrides, "--store", str(store)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run:") == 1, "one process speaks"
    return find_run(Store(store), "latest").folder


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """The same recipe in one process and in two: the same losses, one set of events, one model."""
    alone = _kajiya(tmp_path / "alone", sys.executable)
    both = _kajiya(tmp_path / "both", sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    curves = [
        {
            e["step"]: e["values"]["train/nll"]
            for e in read_events(f)
            if e["kind"] == "metrics" and "train/nll" in e["values"]
        }
        for f in (alone, both)
    ]
    assert curves[0].keys() == curves[1].keys()
    for step, loss in curves[0].items():
        assert curves[1][step] == pytest.approx(loss, rel=1e-3)
    assert sum(event["kind"] == "opened" for event in read_events(both)) == 1
    # The first of the two proves the run.
    proofs = [event["facts"]["findings"] for event in read_events(both) if event["kind"] == "proof"]
    assert [len(findings) for findings in proofs] == [10]
    assert {each["state"] for each in proofs[0]} == {"passed"}
    manifest = json.loads((both / "manifest.json").read_text())
    assert manifest["artifacts"]["proof"]
    noted, total = json.loads((both / "usage" / "rank-1.json").read_text()), manifest["usage"]
    assert noted["cpu_seconds"] > 1
    # The first rank's is a process of its own: it loads torch and takes as many steps.
    assert total["cpu_seconds"] > noted["cpu_seconds"] + 1
    assert total["peak_bytes"] >= noted["peak_bytes"]
    assert total["n_uncounted_ranks"] == 0
    assert not (alone / "usage").exists()


@pytest.mark.slow
def test_a_failed_proof_stops_every_rank(tmp_path: Path) -> None:
    overrides = small_overrides("optim=adamw", "optim.lr=3", "eval.samples=0", "train.compile=off")
    command = [*_TWO, "-m", "kajiya", "train", "stdlib-pretrain", *overrides, "--store", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("error: learning: ") == 1
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))


def _start(store: Path, *before: str) -> subprocess.Popen[bytes]:
    """The recipe with dropout and noise."""
    command = [*before, "-m", "kajiya", "train", "stdlib-pretrain", *small_overrides(*_DROPPING), "--store", str(store)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (store.parent / f"{store.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


_DROPPING = (
    "train.steps=16",
    "eval.samples=0",
    "train.compile=off",
    "model.options.attention_dropout=0.1",
    "train.loss.options.neftune_alpha=5",
)
_TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


def _events(store: Path) -> list[dict[str, Any]]:
    return [event for log in store.glob("runs/*/events.jsonl") for event in read_events(log.parent)]


@pytest.mark.slow
def test_two_processes_with_dropout_go_on_after_a_kill_bit_for_bit(tmp_path: Path) -> None:
    """One pair is never interrupted; the other is killed, asked to stop, and then finishes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _start(whole, *_TWO).wait(300) == 0, (tmp_path / "whole.log").read_text()
    for step, how in ((10, signal.SIGKILL), (14, signal.SIGTERM)):  # a save waits for the one before it
        process = _start(broken, *_TWO)
        ends = time.monotonic() + 300
        while not any(event["kind"] == "metrics" and event["step"] >= step for event in _events(broken)):
            assert process.poll() is None, (tmp_path / "broken.log").read_text()
            assert time.monotonic() < ends, (tmp_path / "broken.log").read_text()
            time.sleep(0.005)
        # torchrun passes SIGTERM on to its workers; they outlive its own death.
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(workers) == 2
        for pid in [process.pid, *(workers if how == signal.SIGKILL else ())]:
            os.kill(pid, how)
        process.wait(300)
        for pid in workers:
            while Path(f"/proc/{pid}").exists():
                assert time.monotonic() < ends, f"worker {pid} is still there"
                time.sleep(0.01)
    assert _start(broken, *_TWO).wait(300) == 0, (tmp_path / "broken.log").read_text()
    resumed = [event["resumed_from"] for event in _events(broken) if event["kind"] == "started"]
    assert len(resumed) == 3
    assert all(resumed[1:])
    digests = []
    for store in (whole, broken):
        run = find_run(Store(store), "latest")
        assert run.manifest()["status"] == "finished"
        digests.append(hash_file(store / run.manifest()["artifacts"]["model"]["path"] / "model.safetensors"))
    assert digests[0] == digests[1]
