"""Follows a run's event log into one tracker, in a process of its own.

`python -m kajiya.run.trackers.follow <run folder> <tracker>` replays what the tracker has not had and ends. With
`--parent` it goes on with the log until the run has ended, or until that process is gone and the log is read.
"""

import argparse
import fcntl
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kajiya.config.digest import digest, to_plain
from kajiya.config.tables import is_options, resolve
from kajiya.errors import KajiyaError, StoreError
from kajiya.run.events import EVENTS_FILE, Event, read_from
from kajiya.run.files import read_json
from kajiya.run.trackers.position import Position, load_position, position_at, position_file, save_position
from kajiya.run.trackers.protocol import RunFacts, Tracker

_POLL_S = 0.2
_PORTION = 2000
"""Events taken at once; a killed follower delivers at most these again."""


def follow(
    folder: Path,
    name: str,
    options: Mapping[str, Any],
    is_parent_alive: Callable[[], bool] | None = None,
    begun: int = 0,
    *,
    waits: bool = False,
) -> Position:
    """Deliver the run's events to the tracker, from where it stands, and close it; of a study, its trials as each ends.

    A place that has had all is asked for its record, and gets all again where that is gone.

    Without `is_parent_alive`: to the end of the log as it is. With it: until an `ended` event behind byte `begun`, or
    until the parent is gone and every line is read. Raises what the tracker raises, and `StoreError` while another
    follower is at the run, which a live one, or one that `waits`, waits for.
    """

    def follow_trials(events: Sequence[Event]) -> None:
        for run in dict.fromkeys(event["run"] for event in events if event["kind"] == "trial" and event["run"]):
            trial = folder.parent.parent / "runs" / run
            if (trial / "manifest.json").is_file():
                follow(trial, name, options, waits=True)

    path = position_file(folder, name)
    log = folder / EVENTS_FILE
    with _only_follower(path.with_suffix(".lock"), wait=waits or is_parent_alive is not None):
        try:
            tracker, destination = _build(name, options)
            position = position_at(path, destination)
            is_complete = is_parent_alive is None and position.closed and position.offset == _size(log)
            position.problem = None
            save_position(path, position)
            if tracker.open(_facts(folder, position, is_complete)):
                if is_complete:
                    tracker.close(position.status)
                    return position
            else:
                position.rewind()
                save_position(path, position)
            _deliver(_Delivery(tracker, log, position, path, follow_trials), is_parent_alive, begun)
            if position.status == "running":
                position.status = "interrupted"
            tracker.close(position.status)
        except Exception as error:
            position = load_position(path)  # what was read and not taken by the tracker does not count
            position.problem = str(error) if isinstance(error, KajiyaError) else f"{type(error).__name__}: {error}"
            save_position(path, position)
            raise
        position.closed = True
        save_position(path, position)
    return position


@dataclass(frozen=True)
class _Delivery:
    """From a log to a tracker."""

    tracker: Tracker
    log: Path
    position: Position
    path: Path
    """Where the position is saved."""
    follow_trials: Callable[[Sequence[Event]], None]


def _deliver(to: _Delivery, is_parent_alive: Callable[[], bool] | None, begun: int) -> None:
    while True:
        # Asked before the log is read: what a parent wrote before its end is then in what is read.
        may_grow = is_parent_alive is not None and is_parent_alive()
        events, n_lines, is_end = _next_portion(to.log, to.position, begun if is_parent_alive is not None else None)
        if events:
            to.position.saved = dict(to.tracker.consume(events))
            to.follow_trials(events)
        if n_lines:
            save_position(to.path, to.position)
        if is_end or (not n_lines and not may_grow):
            return
        if not n_lines:
            time.sleep(_POLL_S)


def _next_portion(log: Path, position: Position, begun: int | None) -> tuple[list[Event], int, bool]:
    """New events, lines read for them, and whether the last is the end of the attempt that began at byte `begun`."""
    events: list[Event] = []
    n_lines = 0
    if not log.is_file():
        return events, n_lines, False
    for event, offset in read_from(log, position.offset):
        n_lines += 1
        new = position.take(event, offset)
        if new is not None:
            events.append(new)
        if begun is not None and event["kind"] == "ended" and offset > begun:
            return events, n_lines, True
        if n_lines == _PORTION:
            break
    return events, n_lines, False


def _build(name: str, options: Mapping[str, Any]) -> tuple[Tracker, str]:
    """The tracker, and the digest of where it writes."""
    made, checked = resolve("tracker", name, options, "track")
    if not is_options(checked):
        return cast(Tracker, made(**checked)), digest(checked)
    place = {field: getattr(checked, field) for field in _PLACES[name]} if name in _PLACES else checked
    return cast(Tracker, made(checked)), digest(to_plain(place))


_PLACES = {"mlflow": ("uri", "experiment"), "tensorboard": ("folder",), "wandb": ("project", "entity", "online")}
"""Options that say where a tracker writes; of any other, all of them."""


def _facts(folder: Path, position: Position, is_complete: bool) -> RunFacts:
    manifest = read_json(folder / "manifest.json")
    return RunFacts(
        run=folder.name,
        name=manifest["name"],
        folder=folder,
        store=folder.parent.parent,
        created=manifest["created"],
        token=position.token,
        saved=position.saved,
        study=manifest.get("study"),
        is_complete=is_complete,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


@contextmanager
def _only_follower(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock that one follower of a run and tracker has; it falls with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(f"{path.stem} is following {path.parent.parent.name} right now") from error
        yield


# ---------------------------------------------------------------- the process


def parent_probe(pid: int) -> Callable[[], bool]:
    """Whether the process that started this one is still there (an orphan gets another parent)."""
    return lambda: os.getppid() == pid


def _end_after_parent(is_parent_alive: Callable[[], bool], limit_s: float) -> None:
    """A tracker that hangs outlives the run's process by `limit_s` seconds at most."""
    while is_parent_alive():
        time.sleep(_POLL_S)
    time.sleep(limit_s)
    os._exit(75)


def main(words: list[str]) -> int:
    """Entry of the process; exit status 0, or 1 with the reason in the position file and its traceback on stderr."""
    parser = argparse.ArgumentParser(prog="kajiya.run.trackers.follow")
    parser.add_argument("folder", type=Path, help="run folder")
    parser.add_argument("name", help="mlflow, tensorboard, wandb, or package.module:Class")
    parser.add_argument("--parent", type=int, default=None, help="process that writes the run; without it: replay")
    parser.add_argument("--begun", type=int, default=0, help="size of the event log when that process began, bytes")
    parser.add_argument("--limit", type=float, default=20.0, help="longest life after that process, seconds")
    parser.add_argument("--options", default="{}", help="the tracker's options as JSON; `-` reads them from stdin")
    parser.add_argument(
        "--more", type=Path, nargs="*", default=[], help="further run folders, replayed after the first"
    )
    given = parser.parse_args(words)
    options = json.loads(sys.stdin.read() if given.options == "-" else given.options)
    is_parent_alive = None if given.parent is None else parent_probe(given.parent)
    if is_parent_alive is not None:
        threading.Thread(target=_end_after_parent, args=(is_parent_alive, given.limit), daemon=True).start()
    try:
        follow(given.folder.resolve(), given.name, options, is_parent_alive, given.begun)
        for folder in given.more:
            follow(folder.resolve(), given.name, options)
    except Exception as error:
        traceback.print_exception(error)
        return 1
    return 0


_NICENESS = 10
"""Gives way to training, and still has its imports done within a minute on a machine whose every core trains."""

if __name__ == "__main__":
    os.nice(_NICENESS)
    sys.exit(main(sys.argv[1:]))
