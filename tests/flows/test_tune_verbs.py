"""`kajiya tune` as a command, with a W&B sweep file, and `kajiya report` and `sync` of what it leaves."""

import json
from pathlib import Path

import pytest
import yaml
from tests.conftest import Finished, small_overrides
from tests.flows.test_tune import LAYERS, LR, RECIPE, Trials
from typer.testing import CliRunner

from kajiya.cli import app
from kajiya.errors import ConfigError
from kajiya.run.events import read_events
from kajiya.run.files import read_json
from kajiya.run.folder import Run, find_run_or_study, runs_of
from kajiya.run.store import Store


def _kajiya(store: Store, *words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--store", str(store.root)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def test_tune_and_the_report_of_its_study(own_finished: Finished, trials: Trials, tmp_path: Path) -> None:
    store = own_finished.store
    words = ["tune", RECIPE, *small_overrides(), LR, LAYERS, "tune.trials=5", "tune.confirm_seeds=2"]
    facts = json.loads(_kajiya(store, *words, "--json"))
    assert facts["trials"] == {"finished": 5}
    assert yaml.safe_load(Path(facts["best"]).read_text())["model"]["n_layers"] in (2, 4)
    said = _kajiya(store, *words)  # the same again: nothing is left to be tried
    assert facts["study"] in said
    assert facts["report"] in said
    assert len(trials.jobs) == 5 + 2 * 3 * 2
    assert _kajiya(store, "report", facts["study"]).strip() == facts["report"]
    path = Path(_kajiya(store, "report", facts["study"], "--out", str(tmp_path / "page")).strip())
    assert path == tmp_path / "page" / "report.html"
    assert "Trial" in path.read_text()
    find_run_or_study(store, facts["study"]).record(status="interrupted")
    _kajiya(store, "report", facts["study"], "--out", str(tmp_path / "page"))
    text = (tmp_path / "page" / "report.md").read_text()
    assert "The search is not over" in text
    assert "is better than" not in text
    with pytest.raises(ConfigError, match="is a study, whose report is its own"):
        _kajiya(store, "report", facts["study"], own_finished.trained.run.id)


def test_tune_reads_a_wandb_sweep_as_it_is(own_finished: Finished, trials: Trials, tmp_path: Path) -> None:
    (path := tmp_path / "sweep.yaml").write_text(
        "program: train.py\nmethod: grid\nmetric: {name: eval/nll, goal: minimize}\n"
        "parameters:\n  optim: {parameters: {lr: {values: [0.001, 0.003]}}}\n  model.n_layers: {values: [2, 4]}\n"
    )
    words = ["tune", RECIPE, *small_overrides(), "--wandb-sweep", str(path), "tune.confirm_seeds=0"]
    facts = json.loads(_kajiya(own_finished.store, *words, "--json"))
    assert facts["trials"] == {"finished": 4}
    tried = sorted((job.config.optim.lr, job.config.model.n_layers) for job in trials.jobs)
    assert tried == [(0.001, 2), (0.001, 4), (0.003, 2), (0.003, 4)]
    assert "'program' says how W&B starts its agents, and is not used" in _kajiya(own_finished.store, *words)


def _eval_nll(run: Run) -> list[float]:
    events = [event for event in read_events(run.folder) if event["kind"] == "metrics"]
    return [event["values"]["eval/nll"] for event in events if "eval/nll" in event["values"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_study_is_tracked_with_its_trials_and_synced_elsewhere(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    from kajiya.run.trackers.mlflow import default_uri

    store = Store(tmp_path / "store")
    words = ["tune", RECIPE, *small_overrides(), "optim.lr=choice(1e-3,1e-2)", "tune.sampler.name=grid",
             "tune.confirm_seeds=2", "track.trackers=[mlflow]"]  # fmt: skip
    facts = json.loads(_kajiya(store, *words, "--json"))
    study = find_run_or_study(store, facts["study"])
    members = runs_of(study)
    assert len(members) == 2 + 3 * 2
    client = MlflowClient(default_uri(store.root))
    experiment = client.get_experiment_by_name("kajiya")
    assert experiment is not None
    tracked = {run.data.tags["kajiya.run"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(tracked) == {study.id, *(run.id for run in members)}
    for run in members:
        found = tracked[run.id]
        assert found.data.tags["mlflow.parentRunId"] == tracked[study.id].info.run_id
        assert found.info.status == "FINISHED"
        history = client.get_metric_history(found.info.run_id, "eval/nll")
        assert [point.value for point in history] == _eval_nll(run)
        assert len(history) > 1
    assert sum("trial" in run.manifest() for run in members) == 2
    said = _kajiya(store, "sync", study.id, "tensorboard")
    for run in (study, *members):
        assert f"of {run.id}, finished" in said
        assert list((run.folder / "tensorboard").glob("events.*"))
    assert read_json(study.folder / "trackers" / "mlflow.json")["closed"]
