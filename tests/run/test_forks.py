"""Work in processes that a prepared one forks: how it begins, what it says, how it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kajiya.run import forks
from kajiya.run.forks import forked, release

_PROGRAM = """
import json, os, sys, time
from pathlib import Path
from kajiya.run.forks import serve
loaded = os.getpid()

def work(order, to_parent, from_parent):
    def say(**said):
        to_parent.write(json.dumps(said) + "\\n")
        to_parent.flush()
    print("printed by", order["name"])
    say(loaded=loaded, here=os.getpid(), cwd=os.getcwd())
    if "ask" in order:
        say(answer=from_parent.readline().strip())
    if "unread" in order:
        say(ready=True)
        Path(order["unread"]).exists()
        time.sleep(0.2)
    if "sleep" in order:
        time.sleep(order["sleep"])
    return order.get("code", 0)

sys.exit(serve(work))
"""
PROGRAM = ("-c", _PROGRAM)


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    release()
    yield
    release()


def test_orders_share_the_process_that_was_prepared(tmp_path: Path) -> None:
    log, told, codes = tmp_path / "logs" / "log", [], []
    for name, code in (("one", 0), ("two", 3)):
        with forked(PROGRAM, {"name": name, "ask": True, "code": code}, log) as fork:
            for said in fork.lines():
                told.append(said)
                if "here" in said:
                    fork.say(f"hello {name}")
        codes.append(fork.exit_code)
    assert codes == [0, 3]
    first, answer, second, other = told
    assert (answer, other) == ({"answer": "hello one"}, {"answer": "hello two"})
    assert first["loaded"] == second["loaded"]
    assert len({first["loaded"], first["here"], second["here"]}) == 3, "each order has a process of its own"
    assert log.read_text().split("\n") == ["printed by one", "printed by two", ""]


def test_an_answer_that_nobody_reads_is_no_order(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with forked(PROGRAM, {"name": name, "unread": str(tmp_path)}, tmp_path / "log") as fork:
            for said in fork.lines():
                if "ready" in said:
                    fork.say("go")
        assert fork.exit_code == 0


def test_a_signal_is_the_exit_status_and_the_next_order_is_taken(tmp_path: Path) -> None:
    with forked(PROGRAM, {"name": "one", "sleep": 60}, tmp_path / "log") as fork:
        for said in fork.lines():
            loaded = said["loaded"]
            fork.kill()
    assert fork.exit_code == -signal.SIGKILL
    with forked(PROGRAM, {"name": "two"}, tmp_path / "log") as fork:
        assert [said["loaded"] for said in fork.lines()] == [loaded]


def test_a_prepared_process_that_was_killed_is_replaced(tmp_path: Path) -> None:
    loaded = []
    for name in ("one", "two"):
        with forked(PROGRAM, {"name": name}, tmp_path / "log") as fork:
            loaded += [said["loaded"] for said in fork.lines()]
        os.kill(loaded[-1], signal.SIGKILL)
        psutil.wait_procs([psutil.Process(loaded[-1])], timeout=10)
    assert len(set(loaded)) == 2


def test_one_that_is_killed_while_its_work_runs_is_said(tmp_path: Path) -> None:
    with forked(PROGRAM, {"name": "one", "sleep": 60}, tmp_path / "log") as fork:
        for said in fork.lines():
            os.kill(said["loaded"], signal.SIGKILL)
            os.kill(said["here"], signal.SIGKILL)
    assert fork.exit_code == -signal.SIGKILL


def test_a_block_left_early_ends_the_work(tmp_path: Path) -> None:
    def left_early() -> None:
        with forked(PROGRAM, {"name": "one", "sleep": 60}, tmp_path / "log") as fork:
            for said in fork.lines():
                started.append(psutil.Process(said["here"]))
                raise KeyboardInterrupt

    started: list[psutil.Process] = []
    with pytest.raises(KeyboardInterrupt):
        left_early()
    (here,) = started
    assert not here.is_running() or here.status() == psutil.STATUS_ZOMBIE


def test_another_working_directory_or_environment_is_the_works_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell() -> dict[str, str]:
        with forked(PROGRAM, {"name": "one"}, tmp_path / "log") as fork:
            (said,) = fork.lines()
        return said

    here = tell()
    monkeypatch.chdir(tmp_path)
    moved = tell()
    assert moved["cwd"] == str(tmp_path) != here["cwd"]
    assert moved["loaded"] != here["loaded"]
    monkeypatch.setenv("KAJIYA_STORE", "elsewhere")
    assert tell()["loaded"] != moved["loaded"]


def test_where_nothing_forks_the_process_is_the_work(tmp_path: Path) -> None:
    program = ("-c", "import kajiya.run.forks as forks\nforks._FORKS = False\n" + _PROGRAM)
    for code in (0, 3):
        with forked(program, {"name": "one", "ask": True, "code": code}, tmp_path / "log") as fork:
            for said in fork.lines():
                if "here" in said:
                    assert said["here"] == said["loaded"]
                    fork.say("hello")
        assert fork.exit_code == code


def test_nothing_outlives_whoever_gave_the_order(tmp_path: Path) -> None:
    giver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys\nfrom pathlib import Path\nfrom kajiya.run.forks import forked\n"
            f"with forked({PROGRAM!r}, {{'name': 'one', 'sleep': 60}}, Path({str(tmp_path / 'log')!r})) as fork:\n"
            "    for said in fork.lines(): print(said['loaded'], flush=True)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert giver.stdout is not None
    waiting = psutil.Process(int(giver.stdout.readline()))
    giver.kill()
    giver.communicate()
    deadline = time.monotonic() + 20
    while waiting.is_running() and waiting.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_imported_before_a_fork_wakes_no_accelerator_and_starts_no_thread() -> None:
    code = (
        "import threading, torch\n"
        "def refuse(*_): raise AssertionError('an accelerator was asked for')\n"
        # Whether there is one is asked through NVML, as the process that forks is told to.
        "for name in ('init', '_lazy_init', 'current_device', 'get_device_capability', 'get_device_properties'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "from kajiya.flows.tune_trial import import_all\n"
        "import_all()\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_linux_forks() -> None:
    assert (sys.platform == "linux") == forks._FORKS
