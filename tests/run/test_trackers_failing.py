"""A tracker that raises, hangs, is missing or is killed: one warning, and the run's own process goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kajiya.config.schema import Config, TrackConfig
from kajiya.config.tables import TABLES
from kajiya.errors import StoreError
from kajiya.run.events import read_events
from kajiya.run.folder import Run, open_run
from kajiya.run.store import Store
from kajiya.run.trackers.dispatch import replay, start_trackers
from kajiya.run.trackers.environment import tracker_environment
from kajiya.run.trackers.position import load_position, position_file

OWN_TRACKERS = '''
import os
import time
from pathlib import Path


class Recorder:
    """Writes down what it is given."""

    def __init__(self, file):
        self.file = Path(file)

    def open(self, facts):
        self.write(f"open {facts.name} {len(facts.token)} {dict(facts.saved)} {os.nice(0)}")
        return bool(facts.saved)

    def consume(self, events):
        self.write(" ".join(event["kind"] for event in events))
        return {"last": events[-1]["kind"]}

    def close(self, status):
        self.write(f"close {status}")

    def write(self, line):
        with self.file.open("a") as handle:
            handle.write(line + "\\n")


class RaisesAtOpen(Recorder):
    def open(self, facts):
        raise RuntimeError("no such\\nserver")


class RaisesAtConsume(Recorder):
    def consume(self, events):
        raise RuntimeError("disk quota")


class HangsAtOpen(Recorder):
    def open(self, facts):
        self.write(f"hangs {os.getpid()}")
        time.sleep(3600)


class HangsAtClose(Recorder):
    def close(self, status):
        time.sleep(3600)


class Leaves(Recorder):
    def close(self, status):
        os._exit(7)
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "own_trackers.py").write_text(OWN_TRACKERS)
    monkeypatch.chdir(tmp_path)
    return open_run(Store(tmp_path / "store"), Config(name="tiny"), "0123456789abcdef", ["train"])


def tracked(run: Run, name: str, timeout_s: float) -> TrackConfig:
    return TrackConfig(trackers=(name,), options={name: {"file": str(run.folder / "seen")}}, timeout_s=timeout_s)


def whole_run(run: Run, track: TrackConfig, timeout_s: float | None = None) -> list[str]:
    trackers = start_trackers(run, track)
    run.events.emit("started", attempt=1, resumed_from=None)
    run.events.emit("metrics", step=1, values={"train/loss": 1.0})
    run.events.emit("ended", status="finished", error=None)
    return trackers.finish(timeout_s)


def warnings_of(run: Run) -> list[str]:
    return [event["text"] for event in read_events(run.folder) if event["kind"] == "warning"]


def test_a_users_own_tracker_is_given_the_run_at_a_low_priority(run: Run) -> None:
    assert whole_run(run, tracked(run, "own_trackers:Recorder", 60)) == []
    lines = (run.folder / "seen").read_text().splitlines()
    assert lines[0] == f"open tiny 32 {{}} {min(os.nice(0) + 10, 19)}"
    assert " ".join(lines[1:-1]) == "config opened started metrics ended"
    assert lines[-1] == "close finished"


def test_an_earlier_attempts_end_does_not_end_the_follower(run: Run) -> None:
    run.events.emit("started", attempt=1, resumed_from=None)
    run.events.emit("ended", status="interrupted", error=None)
    assert whole_run(run, tracked(run, "own_trackers:Recorder", 60)) == []
    lines = (run.folder / "seen").read_text().splitlines()
    assert " ".join(lines[1:-1]) == "config opened started ended started metrics ended"
    assert lines[-1] == "close finished"


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("RaisesAtOpen", "gave up (RuntimeError: no such server)"),
        ("RaisesAtConsume", "gave up (RuntimeError: disk quota)"),
        ("NotThere", "gave up (track: 'own_trackers' has no function 'NotThere')"),
        ("Leaves", "gave up (it said nothing; see "),
    ],
)
def test_a_failing_tracker_warns_once(failing: str, reason: str, run: Run) -> None:
    name = f"own_trackers:{failing}"
    (line,) = whole_run(run, tracked(run, name, 60))
    assert line.startswith(f"Tracker {name} {reason}")
    assert "\n" not in line
    assert warnings_of(run) == [line]


def test_what_a_failing_tracker_did_not_take_is_replayed_when_it_is_mended(run: Run) -> None:
    whole_run(run, tracked(run, "own_trackers:RaisesAtConsume", 60))
    path = position_file(run.folder, "own_trackers:RaisesAtConsume")
    assert load_position(path).offset == 0
    with pytest.raises(StoreError, match="disk quota"):
        replay(run.folder, "own_trackers:RaisesAtConsume", {"file": str(run.folder / "seen")})
    mended = OWN_TRACKERS.replace('raise RuntimeError("disk quota")', "return super().consume(events)")
    Path("own_trackers.py").write_text(mended)

    position = replay(run.folder, "own_trackers:RaisesAtConsume", {"file": str(run.folder / "seen")})

    assert position.problem is None
    assert (run.folder / "seen").read_text().splitlines()[-2:] == [
        "config opened started metrics ended warning",
        "close finished",
    ]


@pytest.mark.parametrize("failing", ["HangsAtOpen", "HangsAtClose"])
def test_a_hanging_tracker_is_left_behind_after_the_timeout(failing: str, run: Run) -> None:
    name = f"own_trackers:{failing}"
    trackers = start_trackers(run, tracked(run, name, 60))
    process = trackers.waiting[name]
    run.events.emit("ended", status="finished", error=None)

    (line,) = trackers.finish(timeout_s=0.5)

    assert line.startswith(f"Tracker {name} was not done 0.5 s after the end of the run.")
    assert warnings_of(run) == [line]
    assert process.returncode == -signal.SIGKILL
    assert trackers.finish() == []


def test_poll_tells_of_a_dead_tracker_during_the_run_and_only_once(run: Run) -> None:
    trackers = start_trackers(run, tracked(run, "own_trackers:HangsAtOpen", 60))
    assert trackers.poll() == []
    process = trackers.waiting["own_trackers:HangsAtOpen"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (line,) = trackers.poll()
    assert "was killed (SIGKILL)" in line
    assert trackers.poll() == trackers.finish() == []
    assert warnings_of(run) == [line]


@pytest.mark.parametrize("name", tuple(TABLES["tracker"]))
def test_a_missing_package_names_the_extra(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shims = run.folder / "shims"
    shims.mkdir()
    (shims / f"{name}.py").write_text(f"raise ModuleNotFoundError('No such module', name={name!r})")
    monkeypatch.setenv("PYTHONPATH", str(shims))
    extra = "wandb" if name == "wandb" else "track"

    (line,) = whole_run(run, TrackConfig(trackers=(name,), timeout_s=60))

    assert f"pip install 'kajiya[{extra}]'" in line
    assert warnings_of(run) == [line]


def test_a_tracker_that_cannot_be_started_is_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(run.folder / "no-python"))
    assert whole_run(run, tracked(run, "own_trackers:Recorder", 60)) == []
    (line,) = warnings_of(run)
    assert "could not be started" in line


def test_a_follower_ends_when_its_run_was_killed_and_the_log_is_read(run: Run) -> None:
    """The parent is a process of its own here; it writes a metric and is killed without an `ended` event."""
    name = "own_trackers:Recorder"
    code = f"""
import os, signal
from pathlib import Path
from kajiya.config.schema import TrackConfig
from kajiya.run.folder import find_run
from kajiya.run.store import Store
from kajiya.run.trackers.dispatch import start_trackers
run = find_run(Store(Path({str(run.store.root)!r})), {run.id!r})
run.events.emit("started", attempt=1, resumed_from=None)
options = {{{name!r}: {{"file": {str(run.folder / "seen")!r}}}}}
start_trackers(run, TrackConfig(trackers=({name!r},), options=options))
run.events.emit("metrics", step=1, values={{"train/loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed_python(code)
    wait_for(run.folder / "seen", "close interrupted")
    assert load_position(position_file(run.folder, name)).closed
    assert " ".join((run.folder / "seen").read_text().split("\n")[1:-2]) == "config opened started metrics"


def test_a_hanging_follower_does_not_outlive_a_killed_run_for_long(run: Run) -> None:
    name = "own_trackers:HangsAtOpen"
    code = f"""
import os, signal, time
from pathlib import Path
from kajiya.config.schema import TrackConfig
from kajiya.run.folder import find_run
from kajiya.run.store import Store
from kajiya.run.trackers.dispatch import start_trackers
run = find_run(Store(Path({str(run.store.root)!r})), {run.id!r})
seen = Path({str(run.folder / "seen")!r})
start_trackers(run, TrackConfig(trackers=({name!r},), options={{{name!r}: {{"file": str(seen)}}}}, timeout_s=0.5))
while not seen.is_file():
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed_python(code)
    pid = int((run.folder / "seen").read_text().split()[1])
    deadline = time.monotonic() + 300
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def killed_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 300
    while not path.is_file() or text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_followers_of_one_run_and_tracker_are_not_let_in(run: Run) -> None:
    name = "own_trackers:HangsAtOpen"
    trackers = start_trackers(run, tracked(run, name, 60))
    wait_for(run.folder / "seen", "hangs")
    with pytest.raises(StoreError, match=r"is following .* right now"):
        replay(run.folder, name, {"file": str(run.folder / "seen")})
    assert len(trackers.finish(timeout_s=0)) == 1


def test_the_environment_of_a_tracker_has_no_telemetry_and_no_stray_settings(tmp_path: Path) -> None:
    given = {
        "PATH": "/bin",
        "MLFLOW_TRACKING_URI": "http://elsewhere",
        "MLFLOW_TRACKING_TOKEN": "secret",
        "WANDB_MODE": "online",
        "WANDB_API_KEY": "secret",
    }
    made = tracker_environment(given, tmp_path)
    assert made["PATH"] == "/bin"
    assert made["MLFLOW_TRACKING_TOKEN"] == made["WANDB_API_KEY"] == "secret"
    assert "MLFLOW_TRACKING_URI" not in made
    assert "WANDB_MODE" not in made
    assert made["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert made["WANDB_ERROR_REPORTING"] == "false"
    assert made["DO_NOT_TRACK"] == "1"
