"""The event log: one JSON object a line, appended as things happen. It is the truth that every tracker follows."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kajiya.errors import StoreError
from kajiya.run.files import is_full_disk

EVENTS_FILE = "events.jsonl"
Event = dict[str, Any]
"""`t` (Unix seconds), `kind`, and the fields of that kind:

- `opened`: `pid` of the process that works on the run from here on
- `started`: `attempt`, `resumed_from` (step or null)
- `config`: `config` (the whole resolved config)
- `stage`: `name`, `state` (begun, done, reused, stopped), `seconds`, `text`
- `metrics`: `step`, `values` {name: number}; names are `train/loss`, `train/lr`, `eval/loss` …
- `system`: `step`, `values` {name: number} of what the process takes of the machine; names begin with `system/`
- `plan`: `facts` of what the run will cost (`kajiya.preflight.plan.Plan`)
- `ledger`: `text` (what became of the rows, in one line), `facts` (`kajiya.data.ledger.DataLedger`)
- `derived`: `values` {name: value} of settings that were `auto`
- `checkpoint`: `step`, `path`, `bytes`
- `sample`: `step`, `prompt`, `text`, and of an answer that was judged its `reward`
- `histograms`: `step`, `values` {name: `low`, `high`, `counts` of the equal bins between them}
- `trial`: of a study, `number`, `status`, `values`, `problem`, `run`, `seconds`
- `artifact`: `name`, `path`, `stage`, `digest`
- `report`: `path`
- `proof`: `facts` (`seconds`, `findings`: name, state, text, remedy, figures)
- `warning`: `text`
- `note`: `text`, something worth knowing that is no warning
- `ended`: `status` (finished, interrupted, failed), `error`
"""


@dataclass(frozen=True)
class EventLog:
    """Appends events to `events.jsonl` in a run folder; each line is written at once.

    On a full disk lines wait in memory for the next one that can be written: the run goes on. Raises `StoreError` where its last
    line (`ended`) cannot be written either.
    """

    folder: Path
    _waiting: list[bytes] = field(default_factory=list, compare=False, repr=False)

    @property
    def path(self) -> Path:
        return self.folder / EVENTS_FILE

    def emit(self, kind: str, **fields: Any) -> Event:
        """Append one event and return it. Non-finite numbers are written as strings (`"nan"`), since JSON has none."""
        event: Event = {"t": time.time(), "kind": kind, **finite(fields)}
        line = json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"
        earlier = [self._waiting.pop(0) for _ in range(len(self._waiting))]
        data = b"".join([*earlier, line.encode("utf-8", errors="backslashreplace")])
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while data:  # a nearly full disk takes a part of the line; the next write then says what is wrong
                data = data[os.write(handle, data) :]
        except OSError as error:
            if not is_full_disk(error):
                raise
            self._waiting.append(data)
            if kind == "ended":
                raise StoreError(
                    f"{self.path}: the disk is full; the run's last lines, {len(data):,} bytes, could not be written.\n"
                    "Free some space: the same command goes on from the last checkpoint."
                ) from error
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
    """Events from a byte offset on, each with the offset behind it; a last line without its newline is left out.

    A crash may tear a line, and the resumed run then appends to it. The torn part is left out, the rest is read.
    Any other broken line raises `StoreError`.
    """
    with path.open("rb") as handle:
        handle.seek(offset)
        for line in handle:
            if not line.endswith(b"\n"):
                return
            try:
                yield json.loads(line), offset + len(line)
            except ValueError:
                yield from _mend(line, offset, path)
            offset += len(line)


_BEGINNING = b'{"t": '


def _mend(line: bytes, offset: int, path: Path) -> Iterator[tuple[Event, int]]:
    """The whole events that a torn line ends with: one, or two when a crash cut only the newline of the first."""
    begins = line.find(_BEGINNING, 0 if line.startswith(b"{") else len(line))
    while begins >= 0:
        event, ends = _decode(line, begins)
        if event is not None and line[ends:].strip() == b"":
            yield event, offset + len(line)
            return
        if event is not None and line.startswith(_BEGINNING, ends):
            yield event, offset + ends
            begins = ends
        else:
            begins = line.find(_BEGINNING, begins + 1)
    raise StoreError(f"{path}: broken line at byte {offset}")


def _decode(line: bytes, begins: int) -> tuple[Event | None, int]:
    """The event at byte `begins` of the line and the byte behind it, or `None` where none is whole."""
    text = line[begins:].decode("utf-8", errors="surrogateescape")
    try:
        event, ends = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None, begins
    if not isinstance(event, dict) or "kind" not in event:
        return None, begins
    return event, begins + len(text[:ends].encode("utf-8", errors="surrogateescape"))


def finite(value: Any) -> Any:
    """The same with numbers that are not finite as strings (`"nan"`), since JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value
