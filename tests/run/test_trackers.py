"""Every tracker's conformance: what the event log says is in its records, once, whatever was killed."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kajiya.config.schema import Config, OptimConfig, TrackConfig
from kajiya.config.tables import TABLES
from kajiya.errors import StoreError
from kajiya.run.events import read_events
from kajiya.run.folder import Run, open_run
from kajiya.run.store import Store, produce
from kajiya.run.trackers.dispatch import replay, start_trackers
from kajiya.run.trackers.position import load_position, position_file

# MLflow's own use of SQLAlchemy; it says nothing about this project.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

TRACKERS = tuple(TABLES["tracker"])


@dataclass
class Records:
    """What a tracker's own interface reads back."""

    params: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    histograms: dict[str, list[tuple[int, list[float], list[int]]]] = field(default_factory=dict)
    """By name: step, edges of the bins, counts."""
    statuses: list[str] = field(default_factory=list)
    n_runs: int = 0


def read_mlflow(run: Run) -> Records:
    client = mlflow_client(run)
    records = Records()
    experiment = client.get_experiment_by_name("kajiya")
    for found in client.search_runs([experiment.experiment_id], f"tags.`kajiya.run` = '{run.id}'"):
        records.n_runs += 1
        records.statuses.append(found.info.status)
        records.params |= {
            name: yaml_value(text) for name, text in found.data.params.items() if not name.startswith("derived")
        }
        for name in found.data.metrics:
            history = client.get_metric_history(found.info.run_id, name)
            records.metrics.setdefault(name, []).extend((point.step, point.value) for point in history)
        for file in client.list_artifacts(found.info.run_id, "samples"):
            records.samples.append(Path(client.download_artifacts(found.info.run_id, file.path)).read_text())
        for file in client.list_artifacts(found.info.run_id, "histograms"):
            text = Path(client.download_artifacts(found.info.run_id, file.path)).read_text()
            for name, value in json.loads(text).items():
                n = len(value["counts"])
                edges = [value["low"] + (value["high"] - value["low"]) * place / n for place in range(n + 1)]
                step = int(Path(file.path).stem.removeprefix("step-"))
                records.histograms.setdefault(name, []).append((step, edges, value["counts"]))
    return records


def mlflow_client(run: Run) -> Any:
    from mlflow import MlflowClient

    uri = f"sqlite:///{run.store.root / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def yaml_value(text: str) -> Any:
    import ast

    try:
        return None if text == "null" else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_tensorboard(run: Run) -> Records:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata
    from tensorboard.util import tensor_util

    folder = run.folder / "tensorboard"
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    records = Records(n_runs=len(list(folder.glob("events.*"))))
    for tag in accumulator.Tags()["scalars"]:
        records.metrics[tag] = [(point.step, point.value) for point in accumulator.Scalars(tag)]
    texts = accumulator.Tensors("samples") if "samples" in accumulator.Tags()["tensors"] else []
    records.samples = [tensor_util.make_ndarray(point.tensor_proto).item().decode() for point in texts]
    for tag, about in accumulator.summary_metadata.items():
        if about.plugin_data.plugin_name == "histograms":
            for point in accumulator.Tensors(tag):
                rows = tensor_util.make_ndarray(point.tensor_proto)
                edges = [*rows[:, 0].tolist(), float(rows[-1, 1])]
                records.histograms.setdefault(tag, []).append((point.step, edges, rows[:, 2].astype(int).tolist()))
    content = accumulator.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    for name, value in hparams.items():
        kind = value.WhichOneof("kind")
        records.params[name] = getattr(value, kind)
    return records


def read_wandb(run: Run) -> Records:
    from wandb.proto.wandb_internal_pb2 import Record

    from kajiya.run.trackers.wandb import parts_of, read_history, read_records

    token = load_position(position_file(run.folder, "wandb")).token
    records = Records()
    ids = set()
    for path in parts_of(run.folder, token):
        for data in read_records(path):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            for item in record.config.update:
                records.params[item.key or item.nested_key[0]] = json.loads(item.value_json)
    records.n_runs = len(ids)
    drawn: dict[tuple[str, int], dict[str, Any]] = {}
    for name, step, value in read_history(run.folder, token):
        if isinstance(value, dict):
            drawn.setdefault((name, step), {}).update(value)
            continue
        records.metrics.setdefault(name, []).append((step, value))
    for (name, step), value in drawn.items():
        if value.get("_type") == "histogram":
            records.histograms.setdefault(name, []).append((step, value["bins"], value["values"]))
    tables = (run.folder / "wandb").glob("*run-*/files/media/table/*.json")
    newest = max(tables, key=lambda path: path.stat().st_mtime, default=None)
    if newest is not None:
        records.samples = [row[1] + row[2] for row in json.loads(newest.read_text())["data"]]
    records.params = flat_values(records.params)
    return records


def flat_values(config: dict[str, Any]) -> dict[str, Any]:
    from kajiya.run.flatten import flatten

    return flatten({name: value for name, value in config.items() if name not in ("_wandb", "derived")})


READERS: dict[str, Callable[[Run], Records]] = {
    "mlflow": read_mlflow,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = Config(name="tiny", optim=OptimConfig(lr=1.25e-3))
    return open_run(Store(tmp_path / "store"), config, "0123456789abcdef", ["train"])


@pytest.fixture
def ready_run(run: Run, request: pytest.FixtureRequest) -> Run:
    """A run in a store where MLflow's database exists, if the test's tracker is MLflow."""
    if request.getfixturevalue("name") == "mlflow":
        shutil.copy(request.getfixturevalue("mlflow_database"), run.store.root / "mlflow.db")
    return run


def write_metrics(run: Run, steps: range) -> None:
    for step in steps:
        run.events.emit("metrics", step=step, values={"train/loss": 4.0 / (step + 1), "train/lr": 0.001 * step})


def write_histograms(run: Run, step: int) -> None:
    values = {"low": -1.0, "high": 1.0 + step, "counts": [1, step, 3, 0]}
    run.events.emit("histograms", step=step, values={"weight/a.b": values, "gradient/a.b": values | {"low": -2.0}})


def assert_histograms(found: dict[str, list[tuple[int, list[float], list[int]]]], steps: list[int]) -> None:
    """One of each name and step, none doubled."""
    assert found.keys() == {"weight/a.b", "gradient/a.b"}
    for name, low in (("weight/a.b", -1.0), ("gradient/a.b", -2.0)):
        assert [step for step, _, _ in found[name]] == steps
        for step, edges, counts in found[name]:
            width = (1.0 + step - low) / 4
            assert edges == pytest.approx([low + place * width for place in range(5)])
            assert counts == [1, step, 3, 0]


def expected_metrics(n_steps: int) -> dict[str, list[tuple[int, float]]]:
    return {
        "train/loss": [(step, 4.0 / (step + 1)) for step in range(n_steps)],
        "train/lr": [(step, 0.001 * step) for step in range(n_steps)],
    }


def assert_metrics(found: dict[str, list[tuple[int, float]]], expected: dict[str, list[tuple[int, float]]]) -> None:
    """Equal in number, order, step and value; TensorBoard keeps 32-bit floats."""
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


def wait_for_offset(run: Run, name: str, offset: int) -> None:
    path = position_file(run.folder, name)
    deadline = time.monotonic() + 300
    while not path.is_file() or load_position(path).offset < offset:
        assert time.monotonic() < deadline, f"{name} did not follow: {path.with_suffix('.log').read_text()}"
        time.sleep(0.05)


def log_size(run: Run) -> int:
    return run.events.path.stat().st_size


def test_every_tracker_is_in_this_suite() -> None:
    assert set(TRACKERS) == set(READERS) == {"mlflow", "tensorboard", "wandb"}


@pytest.mark.parametrize("name", TRACKERS)
def test_a_live_run_arrives_through_a_kill_exactly_once(
    name: str, ready_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ready_run
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # stray variables, which must steer nothing
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "of-somebody-else")
    track = TrackConfig(trackers=(name,), timeout_s=300)
    trackers = start_trackers(run, track)
    run.events.emit("started", attempt=1, resumed_from=None)
    write_metrics(run, range(30))
    run.events.emit("sample", step=29, prompt="def f(", text="x):")
    write_histograms(run, 29)
    wait_for_offset(run, name, log_size(run))
    before = position_file(run.folder, name).read_text()
    write_metrics(run, range(30, 60))
    write_histograms(run, 59)
    wait_for_offset(run, name, log_size(run))
    os.kill(trackers.waiting[name].pid, signal.SIGKILL)
    trackers.waiting[name].wait()
    # As though the kill had come after the tracker took the second portion and before the position was saved.
    position_file(run.folder, name).write_text(before)

    again = start_trackers(run, track)
    write_metrics(run, range(60, 90))
    run.events.emit("derived", values={"train.steps": 90})
    run.events.emit("ended", status="finished", error=None)

    assert again.finish() == []
    records = READERS[name](run)
    assert_metrics(records.metrics, expected_metrics(90))
    assert records.n_runs == 1
    assert_histograms(records.histograms, [29, 59])
    assert len(records.samples) == 1
    assert "def f(" in records.samples[0]
    assert "x):" in records.samples[0]
    assert math.isclose(records.params["optim.lr"], 1.25e-3)
    assert records.params["data.row_tokens"] == 512
    assert records.params["name"] == "tiny"
    (warning,) = trackers.poll()
    assert f"Tracker {name} was killed (SIGKILL)" in warning


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_goes_on_in_the_same_record(name: str, ready_run: Run) -> None:
    run = ready_run
    run.events.emit("started", attempt=1, resumed_from=None)
    write_metrics(run, range(20))
    write_histograms(run, 19)
    run.events.emit("ended", status="interrupted", error=None)
    first = replay(run.folder, name, {}, timeout_s=300)
    assert first.status == "interrupted"
    run.events.emit("opened", pid=os.getpid())
    run.events.emit("started", attempt=2, resumed_from=10)
    write_metrics(run, range(10, 40))
    for step in (19, 39):
        write_histograms(run, step)
    run.events.emit("metrics", step=39, values={"eval/loss": float("nan")})
    run.events.emit("ended", status="finished", error=None)

    second = replay(run.folder, name, {}, timeout_s=300)

    assert second.token == first.token
    assert second.n_repeated == 21  # ten steps of two metrics and one histogram, computed again
    records = READERS[name](run)
    ((step, value),) = records.metrics.pop("eval/loss")
    assert step == 39
    assert math.isnan(value)
    assert_metrics(records.metrics, expected_metrics(40))
    assert_histograms(records.histograms, [19, 39])
    assert records.n_runs == 1
    if records.statuses:
        assert records.statuses == ["FINISHED"]


def test_replaying_what_a_tracker_has_does_nothing(run: Run) -> None:
    run.events.emit("started", attempt=1, resumed_from=None)
    write_metrics(run, range(3))
    run.events.emit("ended", status="finished", error=None)
    first = replay(run.folder, "tensorboard", {}, timeout_s=300)
    (file,) = (run.folder / "tensorboard").iterdir()
    content = file.read_bytes()

    assert replay(run.folder, "tensorboard", {}, timeout_s=300) == first
    assert file.read_bytes() == content


def test_a_tracker_whose_record_was_deleted_is_given_the_whole_run_again(run: Run) -> None:
    run.events.emit("started", attempt=1, resumed_from=None)
    write_metrics(run, range(5))
    replay(run.folder, "tensorboard", {}, timeout_s=300)
    shutil.rmtree(run.folder / "tensorboard")
    write_metrics(run, range(5, 8))

    assert replay(run.folder, "tensorboard", {}, timeout_s=300).status == "interrupted"
    assert_metrics(read_tensorboard_metrics(run), expected_metrics(8))


def read_tensorboard_metrics(run: Run) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in accumulator.Scalars(tag)] for tag in tags}


@pytest.mark.slow
def test_mlflow_registers_the_model_and_keeps_artifacts_and_long_values(
    run: Run, mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(mlflow_database, run.store.root / "mlflow.db")

    def make(folder: Path) -> dict[str, Any]:
        (folder / "config.json").write_text("{}")
        return {}

    split = {"documents": 3, "bytes": 70}
    facts = {"source": {"name": "stdlib"}, "ledger": {"train": split, "heldout": {"documents": 1, "bytes": 9}}}
    corpus, _ = produce(run.store, "corpus", code="c", config={}, parents={}, make=lambda folder: facts)
    model, _ = produce(run.store, "train", code="c", config={}, parents={"corpus": corpus}, make=make)
    run.events.emit("started", attempt=1, resumed_from=None)
    run.record_artifact("corpus", corpus)
    run.events.emit("system", step=3, values={"system/process_cpu_percentage": 150.0})
    run.events.emit("config", config={"long": "x" * 7000, "nested": {"é": [1, 2]}})
    run.events.emit("derived", values={"train.steps": 12})
    run.record_artifact("model", model)
    run.events.emit("warning", text="a warning")
    run.events.emit("ended", status="failed", error="out of memory")
    replay(run.folder, "mlflow", {"tags": {"team": "forge"}}, timeout_s=300)
    run.record_artifact("model", model)  # a resumed run that finds its model again registers no second version
    run.events.emit("derived", values={"train.steps": 13})
    run.events.emit("ended", status="finished", error=None)
    replay(run.folder, "mlflow", {}, timeout_s=300)

    import mlflow
    import yaml

    client = mlflow_client(run)
    (version,) = client.search_model_versions("name = 'tiny'")
    assert client.get_model_version_by_alias("tiny", "newest").version == version.version
    assert version.tags["parent.corpus"] == corpus.digest
    assert version.tags["kajiya.digest"] == model.digest
    assert version.run_id == client.search_runs([client.get_experiment_by_name("kajiya").experiment_id])[0].info.run_id
    assert version.source == model.path.as_uri()
    database = f"sqlite:///{run.store.root / 'mlflow.db'}"
    mlflow.set_tracking_uri(database)  # else MLflow makes a database in the working directory
    mlflow.set_registry_uri(database)
    try:
        downloaded = mlflow.artifacts.download_artifacts("models:/tiny@newest")
    finally:
        mlflow.set_registry_uri(None)
        mlflow.set_tracking_uri(None)
    assert (Path(downloaded) / "config.json").read_text() == "{}"
    (found,) = client.search_runs([client.get_experiment_by_name("kajiya").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"system/process_cpu_percentage": 150.0}
    assert found.data.tags["mlflow.source.name"] == "train"
    assert found.data.tags["team"] == "forge"
    given = {each.dataset.name: each for each in found.inputs.dataset_inputs}
    assert set(given) == {"stdlib (train)", "stdlib (heldout)"}
    assert json.loads(given["stdlib (train)"].dataset.profile) == split
    assert corpus.digest.startswith(given["stdlib (train)"].dataset.digest)
    assert [tag.value for tag in given["stdlib (heldout)"].tags] == ["evaluation"]
    assert found.data.params["long"] == "x" * 6000
    assert found.data.params["nested.é"] == "[1, 2]"
    assert found.data.params["derived.train.steps"] == "12"
    assert found.data.tags["changed.derived.train.steps"] == "13"
    assert found.data.tags["kajiya.cut_parameters"].startswith("1 ")
    assert found.data.tags["error"] == "out of memory"
    assert "a warning" in found.data.tags.values()
    config = yaml.safe_load(Path(client.download_artifacts(found.info.run_id, "config.yaml")).read_text())
    assert config["long"] == "x" * 7000
    names = [file.path for file in client.list_artifacts(found.info.run_id, "artifacts/model")]
    assert names == ["artifacts/model/config.json", "artifacts/model/manifest.json"]
    assert run.store.root in Path(found.info.artifact_uri.removeprefix("file://")).parents
    assert list(read_events(run.folder))[-1]["kind"] == "ended"
    assert list(here.iterdir()) == [], "nothing is written into the working directory"


@pytest.mark.slow
def test_a_deleted_mlflow_experiment_is_said_plainly(run: Run) -> None:
    run.events.emit("started", attempt=1, resumed_from=None)
    client = mlflow_client(run)
    client.delete_experiment(client.create_experiment("kajiya"))
    with pytest.raises(StoreError, match="experiment 'kajiya' was deleted"):
        replay(run.folder, "mlflow", {}, timeout_s=300)
