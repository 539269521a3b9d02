"""A trial's run lies below its study's in MLflow."""

from pathlib import Path

import pytest

from kajiya.run.events import EventLog
from kajiya.run.files import write_json
from kajiya.run.trackers.dispatch import replay_all
from kajiya.run.trackers.mlflow import default_uri


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
