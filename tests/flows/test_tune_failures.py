"""How trials fail: by time, memory, signals and crashes; and Ctrl-C, after which the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from tests.conftest import small_overrides

from kajiya.config.compose import compose
from kajiya.config.schema import TuneConfig
from kajiya.flows import jobs
from kajiya.flows.jobs import Job, TrialEnd, everything_goes_on, execute
from kajiya.run.events import read_events
from kajiya.run.files import read_json
from kajiya.run.usage import oom_kills

_PROGRAM = """
import os, subprocess, sys, time
from kajiya.run.forks import serve
def work(order, to_parent, from_parent):
"""
_CHILD = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
with open("child", "w") as file:
    file.write(str(child.pid))
"""


def _end_of(code: str, monkeypatch: pytest.MonkeyPatch, folder: Path, minutes: float | None = None) -> TrialEnd:
    """How a process that runs `code` in the place of a trial is said to have ended."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(jobs, "_PROGRAM", ("-c", _PROGRAM + textwrap.indent(code, "    ") + "\nsys.exit(serve(work))"))
    job = Job(compose("stdlib-pretrain"), folder, TuneConfig(trial_minutes=minutes), folder / "log")
    return execute(job, everything_goes_on)


def _is_gone(child: Path) -> bool:
    """Whether the process of that number has ended; whoever inherits an orphan may be slow to bury it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if psutil.Process(int(child.read_text())).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_past_its_time_a_trial_and_its_own_processes_are_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    end = _end_of(_CHILD + "time.sleep(600)", monkeypatch, tmp_path, minutes=0.1)
    assert (end.status, end.problem) == ("timed out", "not done after 0.1 min")
    assert _is_gone(tmp_path / "child")


def test_what_a_crashed_trial_started_does_not_outlive_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    end = _end_of(_CHILD + "print('the last words', file=sys.stderr); sys.exit(3)", monkeypatch, tmp_path)
    assert (end.status, end.problem) == ("failed", "exit status 3: the last words")
    assert _is_gone(tmp_path / "child")


@pytest.mark.parametrize(
    ("counts", "status", "words"),
    [
        ([7, 7], "failed", "not for lack of memory"),
        ([7, 8], "out of memory", "whose memory ran out"),
        ([None, None], "failed", "does not say"),
    ],
)
def test_a_kill_is_for_lack_of_memory_when_the_kernel_says_so(
    counts: list[int | None], status: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = iter(counts)
    monkeypatch.setattr(jobs, "oom_kills", lambda: next(said))
    end = _end_of("os.kill(os.getpid(), 9)", monkeypatch, tmp_path)
    assert end.status == status
    assert words in str(end.problem)


def test_the_kernels_count_is_read() -> None:
    vmstat = Path("/proc/vmstat")
    is_there = vmstat.is_file() and "oom_kill " in vmstat.read_text()
    assert (oom_kills() is not None) == is_there


# ---------------------------------------------------------------- real trials


def _command(store: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "kajiya",
        "tune",
        "stdlib-pretrain",
        *small_overrides(),
        *words,
        "--store",
        str(store),
    ]


@pytest.mark.slow
def test_real_failures_do_not_end_the_search(tmp_path: Path) -> None:
    (tmp_path / "own_loss.py").write_text(
        "import mmap, os, subprocess, sys, time\n"
        "from kajiya.config.options import NextTokenLoss\n"
        "from kajiya.training.losses.next_token import next_token\n"
        "def loss(model, batch, how='well', chunk_tokens=512):\n"
        "    if how == 'crash': raise RuntimeError('on purpose')\n"
        "    if how == 'kill': os.kill(os.getpid(), 9)\n"
        "    if how == 'greedy':\n"  # what only a limit of the address space refuses (0x4000: Linux's MAP_NORESERVE)
        "        mmap.mmap(-1, 2**37, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)\n"
        "    if how == 'hang':\n"
        "        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(900)'])\n"
        "        open('child', 'w').write(str(child.pid))\n"
        "        time.sleep(900)\n"
        "    terms, metrics = next_token(model, batch, NextTokenLoss(chunk_tokens=chunk_tokens))\n"
        "    if how == 'broken': terms = {k: (v * float('nan'), n) for k, (v, n) in terms.items()}\n"
        "    return terms, metrics\n"
    )
    words = ("train.loss.name=own_loss:loss", "train.loss.options.how=choice(well,crash,kill,greedy,broken,hang)",
             "tune.sampler.name=grid", "tune.confirm_seeds=0", "optim.max_skipped=0", "tune.trial_minutes=0.5",
             "tune.trial_memory_gb=64")  # fmt: skip
    done = subprocess.run(
        [*_command(tmp_path / "store", *words), "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["trials"]
    assert counts == {"finished": 1, "failed": 2, "out of memory": 1, "not finite": 1, "timed out": 1}
    (report,) = (tmp_path / "store").glob("studies/*/report/report.md")
    text = report.read_text()
    for problem in ("on purpose", "SIGKILL", "Cannot allocate memory", "not done after 0.5 min"):
        assert problem in text
    assert _is_gone(tmp_path / "child")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_ctrl_c_saves_what_runs_and_the_same_command_goes_on(tmp_path: Path, parallel: int) -> None:
    words = ("optim.lr=tag(log,interval(1e-4,1e-2))", "train.steps=100", "train.eval_every=50", "train.save_every=5",
             "tune.trials=2", f"tune.parallel={parallel}", "tune.confirm_seeds=0")  # fmt: skip
    process = subprocess.Popen(
        _command(tmp_path, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while len({path.parts[-4] for path in tmp_path.glob("runs/*/checkpoints/step-*/manifest.json")}) < parallel:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to everything in the foreground
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "Interrupted. What was finished is kept; the same command goes on where it was" in said
    assert "Traceback" not in said
    begun = {path.parent.name: read_json(path) for path in tmp_path.glob("runs/*/manifest.json")}
    assert begun
    done = subprocess.run(
        [*_command(tmp_path, *words), "--json"], capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == {"finished": 2}
    assert len(list(tmp_path.glob("runs/*/manifest.json"))) == 2
    for name in begun:
        events = list(read_events(tmp_path / "runs" / name))
        first, *rest = [event["resumed_from"] for event in events if event["kind"] == "started"]
        assert first is None
        assert max(rest) > 0
    if parallel == 1:  # in the search's own process: the trial was asked to stop, and said that it did
        (events,) = (list(read_events(tmp_path / "runs" / name)) for name in begun)
        assert "interrupted" in [event["status"] for event in events if event["kind"] == "ended"]
