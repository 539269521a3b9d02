"""A study's trials in its trackers: each as it ends, records of their own, in MLflow below the study's."""

import shutil
import time
from pathlib import Path

import pytest
from tests.run.test_trackers import READERS

from kajiya.config.schema import TrackConfig
from kajiya.run.events import EventLog
from kajiya.run.files import write_json
from kajiya.run.folder import Run
from kajiya.run.store import Store, produce
from kajiya.run.trackers.dispatch import replay_all, start_trackers
from kajiya.run.trackers.follow import follow
from kajiya.run.trackers.mlflow import default_uri
from kajiya.run.trackers.position import load_position, position_file


def _folder(path: Path, **more: str) -> Path:
    path.mkdir(parents=True)
    write_json(path / "manifest.json", {"name": "demo", "created": 1.7e9, **more})
    log = EventLog(path)
    log.emit("metrics", step=1, values={"eval/nll": 2.5})
    log.emit("ended", status="finished", error=None)
    return path


@pytest.mark.filterwarnings("ignore")
def test_trials_are_nested_below_their_study(tmp_path: Path) -> None:
    study = _folder(tmp_path / "studies" / "demo-1")
    trials = [_folder(tmp_path / "runs" / f"demo-t{i}", study="demo-1") for i in range(2)]
    replay_all([study, *trials], "mlflow", {})
    from mlflow import MlflowClient

    client = MlflowClient(default_uri(tmp_path))
    experiment = client.get_experiment_by_name("kajiya")
    assert experiment is not None
    found = {run.data.tags["kajiya.run"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"demo-1", "demo-t0", "demo-t1"}
    for name in ("demo-t0", "demo-t1"):
        assert found[name].data.tags["mlflow.parentRunId"] == found["demo-1"].info.run_id
        assert found[name].data.metrics == {"eval/nll": 2.5}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tensorboard", "wandb", pytest.param("mlflow", marks=pytest.mark.slow)])
def test_a_trial_is_delivered_when_it_ends_and_not_when_its_study_does(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "studies" / "demo-1").mkdir(parents=True)
    write_json(tmp_path / "studies" / "demo-1" / "manifest.json", {"name": "demo", "created": 1.7e9})
    study = Run(tmp_path / "studies" / "demo-1", store, EventLog(tmp_path / "studies" / "demo-1"))
    study.events.emit("config", config={"seed": 0})
    trackers = start_trackers(study, TrackConfig(trackers=(name,), timeout_s=300))
    study.events.emit("metrics", step=0, values={"trial/eval/nll": 3.5})
    trials = []
    for number in range(2):
        folder = tmp_path / "runs" / f"demo-t{number}"
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {"name": "demo", "created": 1.7e9, "study": "demo-1"})
        trials.append(Run(folder, store, EventLog(folder)))
        trials[-1].events.emit("config", config={"seed": number + 1})
        trials[-1].events.emit("metrics", step=6, values={"eval/nll": 2.5 + number})
        trials[-1].events.emit("ended", status="finished", error=None)
        study.events.emit(
            "trial", number=number, status="finished", values=[2.5], problem=None, run=folder.name, seconds=1
        )
    # A trial without a run of its own, and one whose run was removed.
    study.events.emit("trial", number=2, status="failed", values=None, problem="no", run=None, seconds=1)
    study.events.emit("trial", number=3, status="failed", values=None, problem="no", run="demo-gone", seconds=1)
    deadline = time.monotonic() + 300
    while not all(_is_delivered(trial, name) for trial in trials):
        assert trackers.waiting[name].poll() is None, position_file(study.folder, name, ".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not _is_delivered(study, name)  # its search goes on
    study.events.emit("ended", status="finished", error=None)
    assert trackers.finish() == []
    assert READERS[name](study).metrics == {"trial/eval/nll": [(0, 3.5)]}
    for number, trial in enumerate(trials):
        found = READERS[name](trial)
        assert found.metrics == {"eval/nll": [(6, 2.5 + number)]}
        assert (found.n_runs, found.params["seed"]) == (1, number + 1)


@pytest.mark.filterwarnings("ignore")
def test_an_alias_moves_to_the_run_begun_last_and_never_to_a_trial(tmp_path: Path, mlflow_database: Path) -> None:
    shutil.copy(mlflow_database, tmp_path / "mlflow.db")

    def deliver(name: str, created: float, **more: str) -> None:
        run = Run(tmp_path / "runs" / name, Store(tmp_path), EventLog(tmp_path / "runs" / name))
        run.folder.mkdir(parents=True)
        write_json(run.folder / "manifest.json", {"name": "demo", "created": created, "artifacts": {}, **more})
        model, _ = produce(run.store, "model", code=name, config={}, parents={}, make=lambda folder: {})
        run.record_artifact("model", model)
        run.events.emit("ended", status="finished", error=None)
        follow(run.folder, "mlflow", {"aliases": ["newest", "champion"]})

    from mlflow import MlflowClient

    client = MlflowClient(default_uri(tmp_path))
    for name, created in (("b", 2e9), ("a", 1e9), ("c", 3e9)):
        deliver(name, created)

    def holder(alias: str) -> str:
        return str(client.get_model_version_by_alias("demo", alias).tags["kajiya.run"])

    assert holder("newest") == holder("champion") == "c"
    deliver("a2", 1.5e9)
    assert holder("newest") == "c", "an old run that is delivered late"
    deliver("trial", 4e9, study="demo-1")
    assert holder("newest") == holder("champion") == "c"
    assert {each.tags["kajiya.run"] for each in client.search_model_versions("name = 'demo'")} == {"a", "a2", "b", "c"}


def _is_delivered(run: Run, name: str) -> bool:
    path = position_file(run.folder, name)
    return path.is_file() and load_position(path).closed
