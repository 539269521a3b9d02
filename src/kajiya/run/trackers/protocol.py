"""What a tracker is: something that takes a run's events, in their order, in a process of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kajiya.run.events import Event

MODEL_ARTIFACT = "model"
"""Name under which a run records its finished model; a tracker with a registry registers it."""
DATA_ARTIFACT = "corpus"
"""Name under which a run records its data; a tracker that knows data sets is told of it."""


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told about the run that it follows."""

    run: str
    """The run's id, unique in its store."""
    name: str
    """Name of the recipe."""
    folder: Path
    """The run's folder."""
    store: Path
    """Root of the store; an artifact event's `path` is relative to it."""
    created: float
    """When the run was begun, Unix seconds."""
    token: str
    """32 hex digits that stand for this run in this tracker, the same after every restart, unlike any other's."""
    saved: Mapping[str, Any]
    """What the last `consume` returned, as it was saved with the position in the log; empty at first."""
    study: str | None = None
    """Id of the study that the run is a trial of."""
    is_complete: bool = False
    """Every event was taken and the tracker closed: it is opened only to say whether that record is still there."""


class Tracker(Protocol):
    """Follows one run. It is built with its options, and may raise anywhere: the run does not notice.

    The follower may be killed at any moment. It then delivers again what came after the last position that it saved.
    A tracker that must not count such events twice tells them by `facts.saved` or by what its own record holds.
    While one follows a study, each of its trials is followed to its end by another one in the same process.
    """

    def open(self, facts: RunFacts) -> bool:
        """Begin, or find what an earlier follower began.

        True: that earlier record goes on, and the events that it has not had come next. False: all events come, from
        the first one.
        """

    def consume(self, events: Sequence[Event]) -> Mapping[str, Any]:
        """Take these events; return (JSON) what `facts.saved` shall hold if the follower is killed after this."""

    def close(self, status: str) -> None:
        """No more events: the run is `finished`, `interrupted` or `failed`."""


def histograms_of(event: Event) -> Iterator[tuple[str, list[tuple[float, float, int]]]]:
    """Name and bins (left edge, right edge, count) of each histogram in a `histograms` event."""
    for name, value in event["values"].items():
        low, counts = float(value["low"]), value["counts"]
        width = (float(value["high"]) - low) / len(counts)
        yield name, [(low + n * width, low + (n + 1) * width, count) for n, count in enumerate(counts)]


def metrics_of(event: Event) -> Iterator[tuple[str, int, float]]:
    """Name, step and value of each number in a `metrics` or `system` event; non-finite numbers are strings in the log."""
    for name, value in event["values"].items():
        yield name, int(event["step"]), float(value)
