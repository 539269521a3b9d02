"""A run's log replayed into more than one place, and into one whose record was deleted: each has all of it, once."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kajiya.run.events import EventLog
from kajiya.run.files import write_json
from kajiya.run.folder import Run
from kajiya.run.store import Store
from kajiya.run.trackers.follow import follow
from kajiya.run.trackers.position import load_position, position_file, save_position


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "store" / "runs" / "tiny-1"
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"name": "tiny", "created": 1.7e9})
    run = Run(folder, Store(tmp_path / "store"), EventLog(folder))
    for step in range(4):
        run.events.emit("metrics", step=step, values={"loss": 1.0 / (step + 1)})
    run.events.emit("ended", status="finished", error=None)
    return run


def n_records(folder: Path) -> int:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    (file,) = folder.glob("events.*")
    return len(list(RawEventFileLoader(str(file)).Load()))


def test_each_destination_has_the_whole_run_and_a_token_of_its_own(run: Run, tmp_path: Path) -> None:
    def sync(**options: Any) -> tuple[str, int]:
        position = follow(run.folder, "tensorboard", options)
        return position.token, position.n_events

    elsewhere = {"folder": str(tmp_path / "elsewhere")}
    first, n_events = sync()
    second, n_events_there = sync(**elsewhere)
    assert n_events == n_events_there == 5
    assert first != second
    assert n_records(tmp_path / "elsewhere" / run.id) == n_records(run.folder / "tensorboard") > 5
    assert sync() == (first, 5), "back to the first, which has all of it"
    run.events.emit("metrics", step=4, values={"loss": 0.1})
    assert sync(**elsewhere) == (second, 6)
    assert sync() == (first, 6)
    assert n_records(tmp_path / "elsewhere" / run.id) == n_records(run.folder / "tensorboard")
    assert sync(embeddings=7) == (first, 6), "what is written is another matter than where"


def test_a_record_that_was_deleted_is_written_again_though_the_log_did_not_grow(run: Run) -> None:
    first = follow(run.folder, "tensorboard", {})
    n = n_records(run.folder / "tensorboard")
    shutil.rmtree(run.folder / "tensorboard")
    again = follow(run.folder, "tensorboard", {})
    assert (again.token, again.n_events, again.status) == (first.token, 5, "finished")
    assert n_records(run.folder / "tensorboard") == n


def test_a_position_of_an_older_kajiya_goes_on_where_its_record_is(run: Run, tmp_path: Path) -> None:
    first = follow(run.folder, "tensorboard", {})
    path = position_file(run.folder, "tensorboard")
    first.destination = None
    save_position(path, first)
    assert follow(run.folder, "tensorboard", {}).token == first.token
    first.destination = None
    save_position(path, first)
    assert follow(run.folder, "tensorboard", {"folder": str(tmp_path / "b")}).n_events == 5
    assert n_records(tmp_path / "b" / run.id) == n_records(run.folder / "tensorboard")


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_a_second_mlflow_and_a_second_project_of_wandb_have_the_run_too(
    run: Run, mlflow_database: Path, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    shutil.copy(mlflow_database, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path / 'other.db'}"

    def ended(uri: str) -> list[tuple[str, int]]:
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("kajiya")
        return [(each.info.status, each.info.end_time) for each in client.search_runs([experiment.experiment_id])]

    shutil.copy(mlflow_database, run.store.root / "mlflow.db")
    options: Mapping[str, Any]
    for options in ({}, {"uri": other}, {}, {"uri": other}):
        follow(run.folder, "mlflow", options)
    here = ended(f"sqlite:///{run.store.root / 'mlflow.db'}")
    assert len(here) == 1
    assert here == ended(other)

    parts = run.folder / "wandb"
    for project in ("one", "two", "one", "two"):
        follow(run.folder, "wandb", {"project": project})
    assert len(list(parts.glob("*run-*/*.wandb"))) == 2, "each of the two once"
    token = load_position(position_file(run.folder, "wandb")).token
    shutil.rmtree(next(parts.glob(f"*run-*-{token}*")))
    follow(run.folder, "wandb", {"project": "two"})
    assert len(list(parts.glob("*run-*/*.wandb"))) == 2
