"""The event log: every whole line is read, whatever a crash did to another."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kajiya.errors import StoreError
from kajiya.run.events import EventLog, read_events, read_from


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    written = [log.emit("metrics", step=step, values={"train/loss": 1.5 * step}) for step in range(3)]
    assert list(read_events(tmp_path)) == written
    assert [event["kind"] for event in written] == ["metrics"] * 3


def test_no_log_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path)) == []


def test_numbers_that_are_not_finite_are_strings_and_the_line_is_json(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": [math.inf, -math.inf], "c": (1.0, {"d": math.nan})}
    EventLog(tmp_path).emit("metrics", step=1, values=values)
    (event,) = read_events(tmp_path)
    assert event["values"] == {"a": "nan", "b": ["inf", "-inf"], "c": [1.0, {"d": "nan"}]}


@given(text=st.text())
def test_any_text_is_read_back(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("log")
    EventLog(folder).emit("sample", step=1, prompt="", text=text)
    (event,) = read_events(folder)
    assert event["text"] == text


def test_text_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    EventLog(tmp_path).emit("sample", step=1, prompt="", text="a\ud800b")
    (event,) = read_events(tmp_path)
    assert event["text"] == "a\ud800b"


def test_a_torn_last_line_is_left_out_until_its_newline_comes(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.emit("warning", text="whole")
    with log.path.open("ab") as handle:
        handle.write(b'{"t": 1.0, "kind": "warn')
    assert [event["text"] for event in read_events(tmp_path)] == ["whole"]
    with log.path.open("ab") as handle:
        handle.write(b'ing", "text": "late"}\n')
    assert [event["text"] for event in read_events(tmp_path)] == ["whole", "late"]


def test_a_line_torn_anywhere_and_appended_to_loses_only_itself(tmp_path: Path) -> None:
    """Cut a line after each of its bytes, as a crash may, and let the resumed run append to it."""
    torn = json.dumps({"t": 2.0, "kind": "metrics", "step": 1, "values": {"t": 1.0, "é": 2}}, ensure_ascii=False)
    resumed = {"t": 3.0, "kind": "metrics", "step": 2, "values": {"t": 4.0}}
    first = {"t": 1.0, "kind": "config", "config": {}}
    path = tmp_path / "events.jsonl"
    data = torn.encode()
    for cut in range(len(data) + 1):
        path.write_bytes(json.dumps(first).encode() + b"\n" + data[:cut] + json.dumps(resumed).encode() + b"\n")
        whole = [json.loads(torn)] if cut == len(data) else []
        assert list(read_events(tmp_path)) == [first, *whole, resumed], cut


def test_offsets_lead_to_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    one, two, three = ({"t": float(n), "kind": "warning", "text": "é" * n} for n in (1, 2, 3))
    lines = [json.dumps(event, ensure_ascii=False) for event in (one, two, three)]
    path.write_text(f"{lines[0]}\n{lines[1]}{lines[2]}\n", encoding="utf-8")  # a crash cut one newline
    everything = list(read_from(path, 0))
    assert [event for event, _ in everything] == [one, two, three]
    for index, (_, offset) in enumerate(everything):
        assert [event for event, _ in read_from(path, offset)] == [one, two, three][index + 1 :]


def test_a_line_broken_by_something_else_is_an_error_that_says_where(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.emit("warning", text="whole")
    size = log.path.stat().st_size
    with log.path.open("ab") as handle:
        handle.write(b"not an event\n")
    with pytest.raises(StoreError, match=f"broken line at byte {size}"):
        list(read_events(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_lines_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.emit("note", text="before")
    written = log.path.rename(tmp_path / "aside")
    log.path.symlink_to("/dev/full")
    log.emit("note", text="one")
    log.emit("note", text="two")
    with pytest.raises(StoreError, match=r"the disk is full.*could not be written"):
        log.emit("ended", status="finished")
    log.path.unlink()
    written.rename(log.path)
    log.emit("note", text="three")
    told = [event.get("text", event["kind"]) for event in read_events(tmp_path)]
    assert told == ["before", "one", "two", "ended", "three"]
