"""What trackers keep beside metrics and samples: embeddings, artifacts; and a tracking server on the other side."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.run.test_trackers import read_wandb, run, write_metrics

from kajiya.run.folder import Run
from kajiya.run.store import produce
from kajiya.run.trackers.dispatch import replay
from kajiya.run.trackers.follow import follow
from kajiya.run.trackers.position import load_position, position_file

__all__ = ["run"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensorboard_shows_embeddings_and_how_the_run_ended(run: Run, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tokenizers import Tokenizer, models

    weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))

    def make(folder: Path) -> dict[str, Any]:
        save_file({"lm_head.weight": weights + 1, "model.embed_tokens.weight": weights}, folder / "model.safetensors")
        names = ["<end>", "a", "b", "c", "d"]
        Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [])).save(str(folder / "tokenizer.json"))
        return {}

    model, _ = produce(run.store, "model", code="c", config={}, parents={}, make=make)
    run.events.emit("config", config={"seed": 1})
    run.record_artifact("model", model)
    run.events.emit("ended", status="finished", error=None)
    replay(run.folder, "tensorboard", {"embeddings": 4}, timeout_s=300)
    folder = run.folder / "tensorboard"
    shown = [
        [float(cell) for cell in line.split("\t")] for line in (folder / "embeddings.tsv").read_text().splitlines()
    ]
    assert torch.allclose(torch.tensor(shown), weights[:4].float(), rtol=1e-4)
    assert (folder / "embeddings-tokens.tsv").read_text().split() == ["<end>", "a", "b", "c"]
    from google.protobuf import text_format
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    projector = text_format.Parse(
        (folder / "projector_config.pbtxt").read_text(), ProjectorConfig()
    )  # as the plugin does
    (entry,) = projector.embeddings
    assert (entry.tensor_path, entry.metadata_path) == ("embeddings.tsv", "embeddings-tokens.tsv")
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    content = accumulator.summary_metadata[metadata.SESSION_END_INFO_TAG].plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == api_pb2.STATUS_SUCCESS


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_embeddings_of_a_model_in_several_files_and_why_there_are_none(run: Run, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    weights = torch.arange(15).reshape(5, 3).to(getattr(torch, dtype))

    def make(folder: Path) -> dict[str, Any]:
        files = {"lm_head.weight": "model-1.safetensors", "model.embed_tokens.weight": "model-2.safetensors"}
        for name, file in files.items():
            save_file({name: weights}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return {}

    model, _ = produce(run.store, "model", code="c", config={}, parents={}, make=make)
    run.record_artifact("model", model)
    follow(run.folder, "tensorboard", {})
    folder = run.folder / "tensorboard"
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    if dtype == "float64":
        shown = (folder / "embeddings.tsv").read_text().splitlines()
        assert [float(cell) for line in shown for cell in line.split("\t")] == list(range(15))
        assert "warnings" not in accumulator.Tags()["tensors"]
    else:
        assert not (folder / "embeddings.tsv").exists()
        (said,) = accumulator.Tensors("warnings")
        text = tensor_util.make_ndarray(said.tensor_proto).item().decode()
        assert text.startswith("No embeddings for the projector: model.embed_tokens.weight in ")
        assert text.endswith("is of type I8, not one of F64, F32, F16, BF16")


def test_wandb_takes_artifacts_along(run: Run) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    from kajiya.run.trackers.wandb import parts_of, read_records

    corpus, _ = produce(run.store, "corpus", code="c", config={}, parents={}, make=lambda folder: {})

    def make(folder: Path) -> dict[str, Any]:
        (folder / "model.bin").write_bytes(b"weights")
        return {}

    model, _ = produce(run.store, "model", code="c", config={}, parents={"corpus": corpus}, make=make)
    run.events.emit("config", config={"seed": 1})
    run.record_artifact("model", model)
    run.events.emit("sample", step=2, prompt="def f", text="(x):")
    run.events.emit("ended", status="finished", error=None)
    replay(run.folder, "wandb", {}, timeout_s=300)
    token = load_position(position_file(run.folder, "wandb")).token
    found = [Record.FromString(data) for path in parts_of(run.folder, token) for data in read_records(path)]
    artifacts = {each.artifact.type: each.artifact for each in found if each.WhichOneof("record_type") == "artifact"}
    kept = artifacts["model"]
    assert kept.name == "tiny-model"
    assert json.loads(kept.metadata)["parents"]["corpus"]["digest"] == corpus.digest
    assert {entry.path for entry in kept.manifest.contents} == {"manifest.json", "model.bin"}
    assert read_wandb(run).samples == ["def f(x):"]


@pytest.mark.slow
def test_a_tracking_server_is_reached_by_its_address(run: Run, mlflow_database: Path, tmp_path: Path) -> None:
    """Artifacts are uploaded through the server, and the registered model is what was uploaded."""
    from mlflow import MlflowClient

    shutil.copy(mlflow_database, tmp_path / "server.db")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    words = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        *words,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def make(folder: Path) -> dict[str, Any]:
        (folder / "model.bin").write_bytes(b"weights")
        return {}

    model, _ = produce(run.store, "model", code="c", config={}, parents={}, make=make)
    run.events.emit("config", config={"seed": 1})
    write_metrics(run, range(3))
    run.record_artifact("model", model)
    run.events.emit("ended", status="finished", error=None)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True) as server:
        try:
            deadline = time.monotonic() + 240
            while True:
                assert server.poll() is None
                try:
                    opener.open(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.3)
            replay(run.folder, "mlflow", {"uri": url, "experiment": "forge"}, timeout_s=300)
            client = MlflowClient(tracking_uri=url, registry_uri=url)
            experiment = client.get_experiment_by_name("forge")
            assert experiment is not None
            (found,) = client.search_runs([experiment.experiment_id])
            assert found.data.metrics["train/loss"] == 4.0 / 3
            version = client.get_model_version_by_alias("tiny", "newest")
            assert version.source.startswith("mlflow-artifacts:")
            path = client.download_artifacts(found.info.run_id, "artifacts/model/model.bin", str(tmp_path))
            assert Path(path).read_bytes() == b"weights"
            assert list((tmp_path / "kept").rglob("model.bin"))
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    assert not (run.store.root / "mlflow.db").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
