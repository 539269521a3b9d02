"""Facts about runs and their differences, from real run folders."""

import dataclasses
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from kajiya.config.schema import Config, OptimConfig
from kajiya.flows.report_facts import gather
from kajiya.flows.report_results import why_missing
from kajiya.listings import runs_table
from kajiya.run.alive import BEAT, process_facts
from kajiya.run.events import EVENTS_FILE
from kajiya.run.folder import Run, open_run
from kajiya.run.holdings import collect_garbage
from kajiya.run.inspect import differences, run_diff, run_facts, run_rows, summarize
from kajiya.run.status import RunStatus, run_status
from kajiya.run.store import Store, produce
from kajiya.run.trackers.position import Position, position_file, save_position


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def write_run(store: Store, key: str, lr: float = 1e-3, corpus: str = "text", loss: float = 2.0) -> Run:
    run = open_run(store, Config(name="tiny", optim=OptimConfig(lr=lr)), key * 10, ["train", "tiny"])

    def make(folder: Path) -> dict[str, str]:
        (folder / "corpus.txt").write_text(corpus)
        return {}

    artifact, _ = produce(store, "corpus", code=f"code-{corpus}", config={"text": corpus}, parents={}, make=make)
    run.record_artifact("corpus", artifact)
    run.events.emit("stage", name="corpus", state="begun", seconds=0.0, text="")
    run.events.emit("stage", name="corpus", state="done", seconds=1.5, text="1 document")
    run.events.emit("started", attempt=1, resumed_from=None)
    for step in (1, 2):
        run.events.emit("metrics", step=step, values={"train/loss": loss / step})
    run.events.emit("checkpoint", step=2, path="checkpoints/step-2", bytes=10)
    run.events.emit("warning", text="no compiler")
    run.events.emit("ended", status="finished", error=None)
    run.record(status="finished", attempts=1, timings={"corpus": 1.5})
    return run


def test_a_run_is_shown_with_all_that_its_folder_says(store: Store) -> None:
    run = write_run(store, "a")
    save_position(position_file(run.folder, "mlflow"), Position(closed=True, status="finished", n_events=9))
    facts = run_facts(run)
    assert (facts.id, facts.status, facts.attempts) == ("tiny-aaaaaaaaaa", "finished", 1)
    assert facts.history.step == 2
    assert facts.history.metrics == {"train/loss": 1.0}
    assert facts.history.curves == {"train/loss": [(1, 2.0), (2, 1.0)]}
    assert facts.history.stages == {"corpus": {"state": "done", "seconds": 1.5, "text": "1 document"}}
    assert facts.history.warnings == ["no compiler"]
    assert facts.history.checkpoints == [{"step": 2, "path": "checkpoints/step-2", "bytes": 10}]
    assert facts.history.error is None
    assert facts.timings == {"corpus": 1.5}
    assert facts.trackers == {"mlflow": {"status": "finished", "n_events": 9, "problem": None}}
    assert facts.artifacts["corpus"]["stage"] == "corpus"
    assert facts.config["optim"]["lr"] == 1e-3
    assert facts.bytes > (run.folder / EVENTS_FILE).stat().st_size
    assert json.loads(json.dumps(dataclasses.asdict(facts)))["id"] == facts.id


def test_a_run_that_has_only_begun_is_shown(store: Store) -> None:
    facts = run_facts(open_run(store, Config(name="tiny"), "b" * 10, []))
    assert facts.status == "running"
    assert facts.history.step is None
    assert facts.history.metrics == facts.derived == facts.timings == facts.trackers == {}


def test_rows_are_in_order_and_an_unreadable_run_hides_no_other(store: Store) -> None:
    first, second = write_run(store, "a"), write_run(store, "b")
    second.record(study="search-1")
    broken = open_run(store, Config(name="broken"), "c" * 10, [])
    (broken.folder / "manifest.json").write_text('{"created": 1')
    torn = open_run(store, Config(name="torn"), "d" * 10, [])
    torn.events.path.write_text("?\n")
    rows = {row.id: row for row in run_rows(store)}
    assert [row.id for row in run_rows(store) if row.status == "finished"] == [first.id, second.id]
    assert rows[first.id].step == 2
    assert [rows[run.id].study for run in (first, second)] == [None, "search-1"]
    assert [column.header for column in runs_table(list(rows.values())).columns][-1] == "study"
    assert "study" not in [column.header for column in runs_table([rows[first.id]]).columns]
    assert rows[broken.id].status == rows[torn.id].status == "unreadable"
    assert "broken JSON" in (rows[broken.id].problem or "")
    assert "broken line" in (rows[torn.id].problem or "")
    assert run_rows(Store(store.root / "none")) == []


def test_a_run_whose_process_is_gone_was_interrupted(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone = process_facts() | {"pid": child.pid}
    assert run_status({"status": "running", "owner": gone}, tmp_path) == RunStatus("interrupted")
    assert run_status({"status": "running", "owner": process_facts()}, tmp_path) == RunStatus("running")
    assert run_status({"status": "failed", "owner": gone}, tmp_path) == RunStatus("failed")


def test_a_silent_run_of_another_machine_is_shown_as_such_with_since_when(store: Store) -> None:
    run = open_run(store, Config(name="far"), "f" * 10, [])
    run.record(owner={"pid": 1, "begun": 1, "host": "elsewhere"})
    (run.folder / BEAT).touch()
    assert run_rows(store)[0].words == run_facts(run).status == "running"
    since = datetime(2026, 1, 2, 3, 4).timestamp()
    os.utime(run.folder / BEAT, (since, since))
    assert run_status(run.manifest(), run.folder) == RunStatus("silent", since)
    (row,) = run_rows(store)
    assert row.status == "silent"
    assert row.words.startswith("silent since 2026-01-02 03:04")
    assert (run_facts(run).status, run_facts(run).since) == ("silent", since)
    assert gather([run])[0].status_words == row.words
    assert f"the run is {row.words}" in why_missing(gather([run])[0], "model")
    collect_garbage(store, dry_run=False)  # which it does not hold up


def test_steps_logged_twice_count_once_and_idle_time_not_at_all(tmp_path: Path) -> None:
    lines = [
        {"t": 100.0, "kind": "opened", "pid": 1},
        {"t": 101.0, "kind": "started", "attempt": 1, "resumed_from": None},
        {"t": 110.0, "kind": "metrics", "step": 1, "values": {"loss": 3.0}},
        {"t": 120.0, "kind": "metrics", "step": 2, "values": {"loss": 2.5}},  # then killed
        {"t": 500.0, "kind": "opened", "pid": 2},
        {"t": 502.0, "kind": "started", "attempt": 2, "resumed_from": 1},
        {"t": 510.0, "kind": "metrics", "step": 2, "values": {"loss": 2.0}},
        {"t": 515.0, "kind": "ended", "status": "failed", "error": "disk"},
        {"t": 515.5, "kind": "warning", "text": "late"},
        {"t": 900.0, "kind": "opened", "pid": 3},
        {"t": 901.0, "kind": "metrics", "step": 3, "values": {"other": "nan"}},
    ]
    (tmp_path / EVENTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = summarize(tmp_path)
    assert history.curves == {"loss": [(1, 3.0), (2, 2.0)], "other": [(3, "nan")]}
    assert history.metrics == {"loss": 2.0, "other": "nan"}
    assert history.seconds == 20.0 + 15.5 + 1.0
    assert history.error == "disk"


def test_two_runs_differ_in_what_was_changed(store: Store) -> None:
    first, second = write_run(store, "a", lr=1e-3, loss=2.0), write_run(store, "b", lr=2e-3, corpus="other", loss=3.0)
    second.record(provenance=second.manifest()["provenance"] | {"python": "3.99"})
    diff = run_diff(first, second)
    assert diff.config == {"optim.lr": [1e-3, 2e-3]}
    assert list(diff.artifacts) == ["corpus"]
    assert diff.artifacts["corpus"][0] == first.manifest()["artifacts"]["corpus"]["digest"]
    assert diff.code == {"corpus": ["code-text", "code-other"]}
    assert diff.environment["python"][1] == "3.99"
    assert diff.metrics == {"train/loss": {"first": 1.0, "second": 1.5, "difference": 0.5}}
    later = {"since": 0.0, "provenance": first.manifest()["provenance"] | {"process": {"seed": 1, "threads": 8}}}
    second.record(
        provenance=first.manifest()["provenance"] | {"process": {"seed": 0, "threads": 1}}, later_provenance=[later]
    )
    assert run_diff(first, second).environment == {"process.threads": [None, "1, then 8"]}
    second.record(provenance=first.manifest()["provenance"], process={"threads": 1}, later_provenance=[])
    assert run_diff(first, second).environment == {"process.threads": [None, 1]}, "as an older Kajiya wrote it"
    same = run_diff(first, first)
    assert same.config == same.artifacts == same.code == same.environment == {}
    json.dumps(dataclasses.asdict(diff))


def test_a_missing_name_differs_from_null() -> None:
    assert differences({"a": None, "b": 1, "c": 2}, {"b": 1, "c": 3}) == {"a": [None, None], "c": [2, 3]}
