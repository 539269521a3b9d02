"""The event log of a run as a report needs it: curves without what a resume repeated, attempts, stages, warnings."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kajiya.run.events import Event, read_events

Curve = list[tuple[int, float]]
"""Step and value, in order of steps."""


@dataclass(frozen=True)
class Attempt:
    """One process that worked on the run; times in Unix seconds."""

    began: float
    latest: float
    """Time of its last event."""
    trained: bool = False
    resumed_from: int | None = None
    """Step of the checkpoint that it went on from."""
    ended: str | None = None
    """finished, interrupted, failed; `None` when it left no word (killed, a power cut) or still works."""
    error: str | None = None


@dataclass(frozen=True)
class StageEnd:
    """How a stage ended last: done, reused or stopped; `seconds` as the event says."""

    state: str
    seconds: float
    text: str


@dataclass
class RunHistory:
    """What the event log comes to."""

    curves: dict[str, Curve] = field(default_factory=dict)
    """Finite points of each metric."""
    superseded: int = 0
    """Points that a resumed attempt did again, left out."""
    non_finite: dict[str, int] = field(default_factory=dict)
    """Points of each metric that were NaN or infinite, left out."""
    attempts: list[Attempt] = field(default_factory=list)
    stages: dict[str, StageEnd] = field(default_factory=dict)
    warnings: dict[str, int] = field(default_factory=dict)
    """Each warning's text, and how often it came."""
    checkpoint_bytes: int | None = None
    """Size of the last checkpoint on the disk."""

    @property
    def last_step(self) -> int | None:
        """The last step that anything was logged of."""
        return max((curve[-1][0] for curve in self.curves.values() if curve), default=None)


def read_history(folder: Path) -> RunHistory:
    """The history of the run in `folder`. Raises `StoreError` for a broken event log.

    A `started` event that goes on from step n (0 without a checkpoint) supersedes the metrics of later steps before it.
    """
    history = RunHistory()
    points: dict[str, dict[int, float]] = {}
    for event in read_events(folder):
        kind = event["kind"]
        _follow_attempt(history.attempts, event)
        if kind == "started":
            history.superseded += _drop_after(points, event["resumed_from"] or 0)
        elif kind == "metrics":
            for name, value in event["values"].items():
                points.setdefault(name, {})[event["step"]] = float(value)
        elif kind == "stage" and event["state"] != "begun":
            history.stages[event["name"]] = StageEnd(event["state"], event["seconds"], event["text"])
        elif kind == "checkpoint":
            history.checkpoint_bytes = event["bytes"]
        elif kind == "warning":
            history.warnings[event["text"]] = history.warnings.get(event["text"], 0) + 1
    for name, values in points.items():
        history.curves[name] = sorted((step, value) for step, value in values.items() if math.isfinite(value))
        if len(history.curves[name]) < len(values):
            history.non_finite[name] = len(values) - len(history.curves[name])
    return history


def _drop_after(points: dict[str, dict[int, float]], step: int) -> int:
    dropped = 0
    for values in points.values():
        late = [each for each in values if each > step]
        dropped += len(late)
        for each in late:
            del values[each]
    return dropped


def _follow_attempt(attempts: list[Attempt], event: Event) -> None:
    kind, now = event["kind"], event["t"]
    if kind == "config":
        return  # written when the run is made, before its first process opens it
    current = attempts[-1] if attempts else None
    if kind == "opened" or current is None or current.ended is not None or (kind == "started" and current.trained):
        # What a flow says while it closes (a tracker's warning) belongs to the attempt that ended.
        if current is not None and current.ended is not None and kind == "warning":
            return
        attempts.append(Attempt(began=now, latest=now))
    changes: dict[str, Any] = {"latest": now}
    if kind == "started":
        changes |= {"trained": True, "resumed_from": event["resumed_from"]}
    elif kind == "ended":
        changes |= {"ended": event["status"], "error": event["error"]}
    attempts[-1] = replace(attempts[-1], **changes)
