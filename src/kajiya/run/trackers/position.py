"""How far a tracker has followed a run: saved beside the run after every portion, so that a killed follower goes on."""

import re
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kajiya.errors import StoreError
from kajiya.run.events import Event
from kajiya.run.files import read_json, write_json


@dataclass
class Position:
    """The follower's state; saved whole or not at all."""

    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Stands for the run in this tracker; the first thing that is saved."""
    destination: str | None = None
    """Digest of where the tracker writes; `None` in a file of an older Kajiya, which did not keep it."""
    offset: int = 0
    """Bytes of the event log that the tracker has taken."""
    n_events: int = 0
    """Events delivered."""
    n_repeated: int = 0
    """Metrics, samples and histograms left out because a resumed run computed them again."""
    status: str = "running"
    """Last known status of the run: running, finished, interrupted, failed."""
    closed: bool = False
    """The tracker was closed behind `offset`."""
    highest: dict[str, Any] = field(default_factory=dict)
    """Highest step delivered of each metric, of samples and of histograms, and the value there: `[step, value]`."""
    repeated: dict[str, Any] = field(default_factory=dict)
    """`highest` as it was when the run was last resumed: up to here its events are repetitions."""
    saved: dict[str, Any] = field(default_factory=dict)
    """What the tracker wants to find again."""
    problem: str | None = None
    """Why the last follower gave up."""

    def rewind(self) -> None:
        """Back to the beginning of the log, as the same run."""
        fresh = Position(self.token, self.destination)
        self.__dict__.update(fresh.__dict__)

    def take(self, event: Event, offset: int) -> Event | None:
        """Move past an event and return what of it is new.

        A run resumed from a checkpoint writes the steps behind it a second time. Exact resume makes them equal; the
        first ones have been delivered, so each metric goes on behind its highest step, or at it with another value.
        """
        self.offset = offset
        self.closed = False
        kind = event["kind"]
        if kind in ("opened", "ended"):
            self.repeated = dict(self.highest)
            self.status = event["status"] if kind == "ended" else "running"
        elif kind in ("metrics", "system"):
            step = event["step"]
            new = {name: value for name, value in event["values"].items() if self._is_new(name, step, value)}
            self.n_repeated += len(event["values"]) - len(new)
            if not new:
                return None
            event = event | {"values": new}
        elif kind in _ONCE_A_STEP and not self._is_new(_ONCE_A_STEP[kind], event["step"], None):
            self.n_repeated += 1
            return None
        self.n_events += 1
        return event

    def _is_new(self, name: str, step: int, value: Any) -> bool:
        if name in self.repeated:
            last_step, last_value = self.repeated[name]
            if step < last_step or (step == last_step and value == last_value):
                return False
        if name not in self.highest or step >= self.highest[name][0]:
            self.highest[name] = [step, value]
        return True


_ONCE_A_STEP = {"sample": "samples of text", "histograms": "histograms of tensors"}
"""Kinds of events that a step brings only in one attempt, and the name that `highest` has for them."""


def position_file(run_folder: Path, name: str, ending: str = ".json") -> Path:
    """The file of that tracker in the run's folder; `my_pkg.mod:Class` is made a file name."""
    return run_folder / "trackers" / (re.sub(r"[^\w.-]", "-", name) + ending)


def load_position(path: Path) -> Position:
    """The saved position, or a new one."""
    if not path.is_file():
        return Position()
    saved = read_json(path)
    try:
        return Position(**saved)
    except TypeError as error:
        raise StoreError(
            f"{path}: not the position of a tracker.\nDelete it to log the run anew from its beginning."
        ) from error


def position_at(path: Path, destination: str) -> Position:
    """The position of the tracker that writes there: the one at `path`, or one that was set aside, or a new one.

    Of several destinations each has a position, and so a token, of its own; `path` holds that of the last one.
    """
    position = load_position(path)
    if position.destination in (None, destination):
        position.destination = destination
        return position
    save_position(_aside(path, str(position.destination)), position)
    known = load_position(_aside(path, destination))
    known.destination = destination
    return known


def _aside(path: Path, destination: str) -> Path:
    return path.parent / "elsewhere" / f"{path.stem}-{destination[:12]}.json"


def save_position(path: Path, position: Position) -> None:
    """Write the position so that the file holds the old one or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(position))
