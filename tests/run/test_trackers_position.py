"""How a follower's position tells what a resumed run computed again from what is new."""

from pathlib import Path
from typing import Any

import pytest

from kajiya.errors import StoreError
from kajiya.run.trackers.position import Position, load_position, position_file, save_position


def delivered(position: Position, *events: dict[str, Any]) -> list[dict[str, Any]]:
    taken = [position.take({"t": 0.0} | event, offset) for offset, event in enumerate(events, start=1)]
    return [event for event in taken if event is not None]


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {"kind": "metrics", "step": step, "values": values}


OPENED = {"kind": "opened", "pid": 1}


def test_only_what_comes_again_after_a_new_attempt_is_left_out() -> None:
    position = Position()
    first = [OPENED, metrics(1, a=1.0), metrics(2, a=2.0, b=9.0), metrics(2, a=2.5)]
    assert len(delivered(position, *first)) == 4  # within an attempt everything counts
    again = delivered(position, OPENED, metrics(1, a=1.0), metrics(2, a=2.5, b=9.0), metrics(3, a=3.0))
    assert [event["values"] for event in again[1:]] == [{"a": 3.0}]
    assert position.n_repeated == 3


def test_a_final_figure_measured_anew_counts_and_an_equal_one_does_not() -> None:
    position = Position()
    delivered(position, OPENED, metrics(9, bits=1.5), {"kind": "ended", "status": "finished", "error": None})
    assert position.status == "finished"
    assert delivered(position, metrics(9, bits=1.5)) == []
    (new,) = delivered(position, metrics(9, bits=1.4))
    assert new["values"] == {"bits": 1.4}


def test_samples_of_steps_already_passed_are_left_out() -> None:
    position = Position()
    samples = [{"kind": "sample", "step": 5, "prompt": "p", "text": text} for text in "abc"]
    assert len(delivered(position, *samples)) == 3
    assert len(delivered(position, OPENED, *samples, samples[0] | {"step": 6})) == 2


def test_histograms_of_steps_already_passed_are_left_out() -> None:
    position = Position()
    drawn = [{"kind": "histograms", "step": step, "values": {}} for step in (5, 10)]
    assert len(delivered(position, OPENED, *drawn)) == 3
    again = [*drawn, drawn[0] | {"step": 15}]
    assert [event.get("step") for event in delivered(position, OPENED, *again)] == [None, 15]
    assert position.n_repeated == 2


def test_a_position_is_saved_and_rewound(tmp_path: Path) -> None:
    path = position_file(tmp_path, "my_pkg.mod:Class")
    assert path == tmp_path / "trackers" / "my_pkg.mod-Class.json"
    position = Position(saved={"bytes": 3})
    delivered(position, OPENED, metrics(1, a=1.0))
    save_position(path, position)
    loaded = load_position(path)
    assert loaded == position
    loaded.rewind()
    assert loaded == Position(token=position.token)
    path.write_text('{"other": 1}')
    with pytest.raises(StoreError, match="not the position of a tracker"):
        load_position(path)
