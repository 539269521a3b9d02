"""The run's side of its trackers: starts a process for each, and at the end waits for them, a limited time."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kajiya.config.digest import to_plain
from kajiya.config.schema import TrackConfig
from kajiya.errors import StoreError
from kajiya.run.events import EVENTS_FILE, EventLog
from kajiya.run.folder import Run
from kajiya.run.trackers.environment import tracker_environment
from kajiya.run.trackers.position import Position, load_position, position_file

_KEPT = "The run's own event log is whole; it can be replayed into the tracker later."


@dataclass
class Trackers:
    """The followers of one run. Nothing here raises for a tracker's sake, and only `finish` waits."""

    folder: Path
    events: EventLog
    timeout_s: float
    waiting: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def poll(self) -> list[str]:
        """A warning line for each tracker that has failed since the last call; does not wait."""
        ended = [name for name, process in self.waiting.items() if process.poll() is not None]
        codes = {name: self.waiting.pop(name).returncode for name in ended}
        return [self._warn(name, _reason(self.folder, name, code)) for name, code in codes.items() if code != 0]

    def finish(self, timeout_s: float | None = None) -> list[str]:
        """Wait until every tracker has the whole run, at most `timeout_s` seconds together, and end what is left.

        Call it after the `ended` event. Returns a plain warning line for each tracker that failed or was left behind,
        written to the event log too.
        """
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        for process in self.waiting.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        warnings = self.poll()
        for name, process in list(self.waiting.items()):
            _end(process)
            del self.waiting[name]
            warnings.append(self._warn(name, f"was not done {limit_s:g} s after the end of the run"))
        return warnings

    def _warn(self, name: str, reason: str) -> str:
        text = f"Tracker {name} {' '.join(reason.split())}. {_KEPT}"
        self.events.emit("warning", text=text)
        return text


def start_trackers(run: Run, track: TrackConfig) -> Trackers:
    """Start a process of low priority for each tracker; returns at once.

    Call it before the `ended` event of this attempt is written. A process that cannot be started is a warning event.
    """
    trackers = Trackers(run.folder, run.events, track.timeout_s)
    log = run.folder / EVENTS_FILE
    begun = log.stat().st_size if log.is_file() else 0
    for name in dict.fromkeys(track.trackers):
        words = ["--parent", str(os.getpid()), "--begun", str(begun), "--limit", str(track.timeout_s)]
        try:
            trackers.waiting[name] = _spawn(run.folder, name, track.options.get(name) or {}, words)
        except OSError as error:
            trackers._warn(name, f"could not be started ({error})")
    return trackers


def replay(run_folder: Path, name: str, options: Mapping[str, Any], timeout_s: float | None = None) -> Position:
    """Deliver to a tracker what it has not had of a run, now, and wait for it; a process of its own does it.

    Returns how far the tracker is. Raises `StoreError` with the reason when it failed or took longer than `timeout_s`.
    """
    replay_all([run_folder], name, options, timeout_s)
    return load_position(position_file(run_folder, name))


def replay_all(
    run_folders: Sequence[Path], name: str, options: Mapping[str, Any], timeout_s: float | None = None
) -> None:
    """The same for several runs, one behind the other in one process; a tracker's packages are then loaded once."""
    if not run_folders:
        return
    run_folder = run_folders[0]
    process = _spawn(run_folder, name, options, ["--more", *(str(folder) for folder in run_folders[1:])])
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired as error:
        _end(process)
        raise StoreError(f"Tracker {name} was not done with {run_folder.name} after {timeout_s:g} s.") from error
    except BaseException:
        _end(process)
        raise
    if code != 0:
        behind = next((each for each in run_folders if not _is_delivered(each, name)), run_folder)
        raise StoreError(f"{behind.name}: tracker {name} {_reason(behind, name, code)}")


def _is_delivered(folder: Path, name: str) -> bool:
    path = position_file(folder, name)
    return path.is_file() and load_position(path).closed


def _spawn(folder: Path, name: str, options: Mapping[str, Any], words: list[str]) -> subprocess.Popen[bytes]:
    log = position_file(folder, name, ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    # -P: a file called mlflow.py in the working directory must not stand in for the package.
    command = [sys.executable, "-P", "-m", "kajiya.run.trackers.follow", str(folder), name, "--options", "-", *words]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=tracker_environment(os.environ, log.parent),
            start_new_session=True,  # Ctrl-C is for the run; its end reaches the tracker through the log
        )
    assert process.stdin is not None
    # On stdin, because an address in the options may hold a password, and a command line is seen by everyone.
    with contextlib.suppress(BrokenPipeError):  # it has ended already; its exit status says so
        process.stdin.write(json.dumps(to_plain(options)).encode())
        process.stdin.close()
    return process


def _reason(folder: Path, name: str, code: int) -> str:
    if code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    try:
        problem = load_position(position_file(folder, name)).problem
    except StoreError as error:
        problem = str(error)
    return f"gave up ({problem or last_line(position_file(folder, name, '.log'))})"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the follower and what it started in its session."""
    with contextlib.suppress(ProcessLookupError):  # it may have ended just now
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(path: Path) -> str:
    """Last line of a log that says anything."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"it said nothing; see {path}"
