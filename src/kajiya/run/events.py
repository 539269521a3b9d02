"""The event log: one JSON object a line, appended as things happen. It is the truth that every tracker follows."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kajiya.errors import StoreError

EVENTS_FILE = "events.jsonl"
Event = dict[str, Any]
"""`t` (Unix seconds), `kind`, and the fields of that kind:

- `started`: `attempt`, `resumed_from` (step or null)
- `config`: `config` (the whole resolved config)
- `stage`: `name`, `state` (begun, done, reused), `seconds`, `text`
- `metrics`: `step`, `values` {name: number}; names are `train/loss`, `train/lr`, `eval/loss` …
- `derived`: `values` {name: value} of settings that were `auto`
- `checkpoint`: `step`, `path`, `bytes`
- `sample`: `step`, `prompt`, `text`
- `artifact`: `name`, `path`, `stage`, `digest`
- `warning`: `text`
- `ended`: `status` (finished, interrupted, failed), `error`
"""


class EventLog:
    """Appends events to `events.jsonl` in a run folder; each line is written at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS_FILE

    def emit(self, kind: str, **fields: Any) -> Event:
        """Append one event and return it. Non-finite numbers are written as strings (`"nan"`), since JSON has none."""
        event: Event = {"t": time.time(), "kind": kind, **_finite(fields)}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode("utf-8", errors="backslashreplace"))
        finally:
            os.close(handle)
        return event


def read_events(folder: Path) -> Iterator[Event]:
    """All events of a run. A last line cut short by a crash is left out; any other broken line raises `StoreError`."""
    path = folder / EVENTS_FILE
    if not path.is_file():
        return
    for event, _ in read_from(path, 0):
        yield event


def read_from(path: Path, offset: int) -> Iterator[tuple[Event, int]]:
    """Events from a byte offset on, each with the offset behind it; a last line without its newline is left out."""
    with path.open("rb") as handle:
        handle.seek(offset)
        for line in handle:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield json.loads(line), offset
            except ValueError:
                # A line torn by a crash and then appended to by the resumed run: its own newline ends it.
                torn = line.rfind(b'{"t":')
                try:
                    yield json.loads(line[torn:]), offset
                except ValueError as error:
                    raise StoreError(f"{path}: broken line before byte {offset}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
