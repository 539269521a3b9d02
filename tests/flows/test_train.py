"""The training flow on real text: what it leaves, that it is reused, and that a kill changes nothing."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished, small_overrides
from transformers import AutoModelForCausalLM, AutoTokenizer

from kajiya.config.schema import Config
from kajiya.errors import ConfigError, KajiyaError, MissingExtraError, StoreError
from kajiya.flows.train import train
from kajiya.models.native.library import native_problem
from kajiya.preflight.plan import plan_lines
from kajiya.run.events import read_events
from kajiya.run.folder import find_run
from kajiya.run.provenance import collect_provenance
from kajiya.run.store import Store, open_artifact


def _metrics(folder: Path) -> dict[tuple[int, str], float]:
    """Last logged value of every metric of every step, but for times and rates, which no two runs share."""
    values = {}
    for event in read_events(folder):
        if event["kind"] == "metrics":
            for name, value in event["values"].items():
                if "per_second" not in name and name != "train/data_wait_s":
                    values[event["step"], name] = value
    return values


def test_a_run_leaves_artifacts_with_their_proof_of_origin(finished: Finished) -> None:
    run = finished.trained.run
    manifest = run.manifest()
    assert manifest["status"] == "finished"
    assert set(manifest["artifacts"]) == {"corpus", "tokenizer", "shards", "proof", "model", "baselines", "evaluation"}
    parents = {}
    for name, entry in manifest["artifacts"].items():
        artifact = open_artifact(finished.store.root / entry["path"])
        assert artifact.digest == entry["digest"]
        parents[name] = json.loads((artifact.path / "manifest.json").read_text())["parents"]
    assert set(parents["model"]) == {"tokenizer", "shards"}
    assert parents["evaluation"]["model"]["digest"] == manifest["artifacts"]["model"]["digest"]
    assert manifest["provenance"]["packages"]["torch"]
    assert manifest["provenance"]["process"]["seed"] == finished.config.seed
    assert manifest["derived"]["train.steps"] == 12
    assert {"corpus", "tokenizer", "shards", "plan", "train", "evaluation"} <= set(manifest["timings"])


def test_the_model_learns_and_loads_in_plain_transformers(finished: Finished) -> None:
    curve = {
        step: value for (step, name), value in _metrics(finished.trained.run.folder).items() if name == "train/nll"
    }
    assert min(curve) == 2
    assert max(curve) == 12
    assert curve[12] < curve[2] - 0.1
    assert curve[2] < math.log(512) + 0.5
    model = AutoModelForCausalLM.from_pretrained(finished.trained.model.path)
    tokenizer = AutoTokenizer.from_pretrained(finished.trained.model.path)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_the_report_is_there(finished: Finished) -> None:
    report = finished.trained.report
    assert report.read_text(encoding="utf-8").lstrip().startswith("<!")
    assert (report.parent / "report.md").is_file()


def test_every_stage_is_told(finished: Finished) -> None:
    told = [(fields["name"], fields["state"]) for kind, fields in finished.events if kind == "stage"]
    for name in ("corpus", "tokenizer", "shards", "plan", "prove", "train", "baselines", "evaluation", "report"):
        assert told.index((name, "begun")) < told.index((name, "done"))
    kinds = [event["kind"] for event in read_events(finished.trained.run.folder)]
    assert kinds[-1] == "ended"
    assert "progress" not in kinds


def test_the_same_config_is_reused(finished: Finished) -> None:
    heard: list[tuple[str, str]] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "stage" and fields["state"] != "begun":
            heard.append((fields["name"], fields["state"]))

    again = train(finished.config, finished.store, on_event=hear)
    assert again.run.id == finished.trained.run.id
    assert dict(heard) | {"report": "done"} == dict.fromkeys(
        ("corpus", "tokenizer", "shards", "train", "baselines", "evaluation"), "reused"
    ) | {"report": "done"}


def test_another_seed_is_another_run(finished: Finished, small_config: Callable[..., Config]) -> None:
    other = train(small_config("seed=1"), finished.store)
    assert other.run.id != finished.trained.run.id
    assert other.model is not None
    assert other.model.digest != finished.trained.model.digest


def test_a_corrupt_artifact_stops_the_work(finished: Finished, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "store"
    shutil.copytree(finished.store.root, copy)
    model = copy / finished.trained.run.manifest()["artifacts"]["model"]["path"] / "model.safetensors"
    raw = bytearray(model.read_bytes())
    raw[-1] ^= 1
    model.write_bytes(raw)
    with pytest.raises(StoreError, match=r"model\.safetensors.*corrupt"):
        train(finished.config, Store(copy))


def test_the_plan_says_where_the_size_is_not_what_was_asked_for(finished: Finished) -> None:
    (facts,) = (fields["facts"] for kind, fields in finished.events if kind == "plan")
    kept = "model.n_layers, model.n_heads, model.n_kv_heads, model.ffn_size set"
    assert dict(plan_lines(facts))["parameters"].endswith(f"k, all trained; 60k asked for ({kept})")


def test_what_looks_at_a_training_leaves_what_it_saw_and_the_same_weights(
    small_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Profile, norms, histograms and blocks whose activations are made again, each by its setting."""
    looks = ("train.profile=true", "train.layer_norms_every=4", "train.histograms_every=6")
    more = ("train.gradient_checkpointing=full", "train.precision=fp32", "eval.samples=0")
    plain = train(small_config(*more[1:]), Store(tmp_path / "plain")).run.folder
    seen = train(small_config(*looks, *more), Store(tmp_path / "seen")).run.folder
    values = _metrics(seen)
    assert {step for step, name in values if name.startswith("gradient_norm/model.layers.0")} == {4, 8, 12}
    histograms = [event for event in read_events(seen) if event["kind"] == "histograms"]
    assert [event["step"] for event in histograms] == [6, 12]
    assert "gradient/model.embed_tokens.weight" in histograms[0]["values"]
    assert {path.name for path in (seen / "profile").iterdir()} == {
        "trace.json",
        "table.txt",
        "time.json",
        "memory.json",
    }
    assert "model.layers.0" in (seen / "profile" / "table.txt").read_text(encoding="utf-8")
    losses = [
        {step: value for (step, name), value in _metrics(run).items() if name == "train/nll"} for run in (plain, seen)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_failure_is_recorded(small_config: Callable[..., Config], finished: Finished) -> None:
    config = small_config("model.options.hidden_act=nothing")
    with pytest.raises(KajiyaError, match=r"model\.options\.hidden_act: 'nothing'"):
        train(config, finished.store)
    run = find_run(finished.store, "latest")
    assert run.manifest()["status"] == "failed"
    assert "hidden_act" in list(read_events(run.folder))[-1]["error"]


@pytest.mark.parametrize("setting", ["model.name=lama", "model.options.no_such_thing=1"])
def test_an_unknown_architecture_is_refused_before_any_work(
    small_config: Callable[..., Config], tmp_path: Path, setting: str
) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        train(small_config(setting), store)
    assert not list(tmp_path.rglob("*.json"))


def test_without_the_packages_of_the_report_it_is_said_before_the_training(
    own_finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise MissingExtraError("seaborn", "report", "The report")

    monkeypatch.setattr("kajiya.flows.figure_files.require_figures", missing)
    heard: list[tuple[str, dict[str, Any]]] = []
    done = train(own_finished.config, own_finished.store, on_event=lambda kind, **fields: heard.append((kind, fields)))
    assert done.model is not None
    assert done.report is None
    (said,) = (n for n, (kind, _) in enumerate(heard) if kind == "warning")
    assert heard[said][1]["text"].startswith("no report will be written: The report needs the package 'seaborn'")
    assert "kajiya[report]" in heard[said][1]["text"]
    assert said < next(n for n, (_, fields) in enumerate(heard) if fields.get("name") == "train")
    assert own_finished.trained.run.manifest()["status"] == "finished"


def test_a_training_that_goes_on_with_other_software_says_so(
    small_config: Callable[..., Config], own_finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("seed=11", "eval.samples=0", "eval.baselines=[]")

    def attempt() -> list[str]:
        heard: list[tuple[str, dict[str, Any]]] = []
        with pytest.raises(KeyboardInterrupt):
            train(config, own_finished.store, on_event=lambda kind, **fields: heard.append((kind, fields)))
        return [fields["text"] for kind, fields in heard if kind == "warning"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kajiya.flows.train.fit_run", interrupt)
    assert attempt() == []
    here = collect_provenance()
    elsewhere = here | {"packages": here["packages"] | {"torch": "9.9"}}
    monkeypatch.setattr("kajiya.run.folder.collect_provenance", lambda: elsewhere)
    (said,) = attempt()
    assert said.startswith("the run goes on with other software or on another machine than it began: packages.torch: ")
    assert said.endswith(", then 9.9")


# ---------------------------------------------------------------- kills


def _command(store: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "kajiya", "train", "stdlib-pretrain", *small_overrides(*more), "--store", str(store)]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


class MissedError(AssertionError):
    """The run ended before the moment at which it was to be killed."""


def _run_until(
    store: Path, is_time: Callable[[Path], bool], how: signal.Signals, *more: str
) -> subprocess.CompletedProcess[str]:
    """Run the training and send `how` to it as soon as `is_time(store)`."""
    process = subprocess.Popen(
        _command(store, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )
    while process.poll() is None and not is_time(store):
        time.sleep(0.005)
    if process.poll() is not None:
        raise MissedError(f"ended before its kill: {process.communicate()}")
    process.send_signal(how)
    out, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def _logged(step: int) -> Callable[[Path], bool]:
    """The log has a line of metrics of that step or a later one."""

    def is_time(store: Path) -> bool:
        logs = list(store.glob("runs/*/events.jsonl"))
        return any(
            event["kind"] == "metrics" and event["step"] >= step for log in logs for event in read_events(log.parent)
        )

    return is_time


def _kept_and_logged(kept: int, logged: int) -> Callable[[Path], bool]:
    """A checkpoint of that step or a later one is whole, and so is the log's line: writing may be behind the steps."""

    def is_time(store: Path) -> bool:
        found = store.glob("runs/*/checkpoints/step-*/manifest.json")
        steps = [int(path.parent.name.removeprefix("step-")) for path in found]
        return max(steps, default=0) >= kept and _logged(logged)(store)

    return is_time


def _checkpoints_told(folder: Path, name: str) -> int:
    return sum(event["kind"] == "checkpoint" and event["path"].endswith(name) for event in read_events(folder))


def _exists(pattern: str) -> Callable[[Path], bool]:
    return lambda store: any(store.glob(pattern))


def _finish(store: Path, *more: str) -> Path:
    done = subprocess.run(_command(store, *more), capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    return find_run(Store(store), "latest").folder


def _weights(folder: Path) -> str:
    entry = find_run(Store(folder.parent.parent), folder.name).manifest()["artifacts"]["model"]
    return hashlib.sha256((folder.parent.parent / entry["path"] / "model.safetensors").read_bytes()).hexdigest()


_JOINED = ("model.n_heads=1", "model.n_kv_heads=1")
"""A head of width 32, which the joined blocks of `models.fused` take."""
_LONGER = ("train.steps=24", "eval.samples=0", "model.init=bigram", *_JOINED)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The longer run, never interrupted."""
    return _finish(tmp_path_factory.mktemp("whole"), *_LONGER)


def test_killed_twice_equals_uninterrupted_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    _run_until(killed, _kept_and_logged(4, 6), signal.SIGKILL, *_LONGER)
    _run_until(killed, _kept_and_logged(8, 14), signal.SIGKILL, *_LONGER)
    rest = _finish(killed, *_LONGER)
    attempts = [event["resumed_from"] for event in read_events(rest) if event["kind"] == "started"]
    assert len(attempts) == 3
    assert attempts[0] is None
    assert all(step and step % 4 == 0 for step in attempts[1:])
    assert _weights(rest) == _weights(whole)
    assert _metrics(rest) == _metrics(whole)
    if native_problem() is None:
        assert "C++ operators" in find_run(Store(killed), "latest").manifest()["plan"]["compiled"]


def test_a_corrupt_newest_checkpoint_is_told_and_made_anew(whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    _run_until(killed, _kept_and_logged(8, 14), signal.SIGKILL, *_LONGER)
    newest = sorted(killed.glob("runs/*/checkpoints/step-*/manifest.json"))[-1].parent
    told = _checkpoints_told(newest.parent.parent, newest.name)
    raw = bytearray((newest / "state.safetensors").read_bytes())
    raw[-1] ^= 1
    (newest / "state.safetensors").write_bytes(raw)
    rest = _finish(killed, *_LONGER)
    events = list(read_events(rest))
    assert any(event["kind"] == "warning" and "corrupt" in event["text"] for event in events)
    resumed_from = [event["resumed_from"] for event in events if event["kind"] == "started"][-1]
    assert resumed_from < int(newest.name.removeprefix("step-"))
    assert _checkpoints_told(rest, newest.name) == told + 1
    assert _weights(rest) == _weights(whole)


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_exits_with_0_and_says_how_to_go_on(how: signal.Signals, whole: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    ended = _run_until(stopped, _logged(6), how, *_LONGER)
    assert ended.returncode == 0, ended.stderr
    assert "The same command goes on from it" in ended.stdout
    assert f"--store {stopped}" in ended.stdout
    assert find_run(Store(stopped), "latest").manifest()["status"] == "interrupted"
    assert _weights(_finish(stopped, *_LONGER)) == _weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "artifacts/corpus/.*",
        "artifacts/tokenizer/.*",
        "artifacts/shards/*",
        "runs/*/manifest.json",
        "runs/*/checkpoints/.step-*",
        "artifacts/model/.*",
        "artifacts/model/*",
        "artifacts/evaluation/*",
    ],
)
def test_killed_at_any_stage_nothing_half_made_is_found(moment: str, whole: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    try:
        _run_until(killed, _exists(moment), signal.SIGKILL, *_LONGER)
    except MissedError:
        if "/." not in moment:
            raise
        pytest.skip(f"{moment} was there too short a time to be caught on this machine")
    assert _weights(_finish(killed, *_LONGER)) == _weights(whole)


@pytest.mark.slow
def test_compiled_blocks_resume_bit_for_bit(tmp_path: Path) -> None:
    more = (*_LONGER, "train.compile=on")
    whole = _finish(tmp_path / "whole", *more)
    killed = tmp_path / "killed"
    _run_until(killed, _logged(8), signal.SIGKILL, *more)
    rest = _finish(killed, *more)
    assert find_run(Store(killed), "latest").manifest()["plan"]["compiled"].startswith("yes")
    assert _weights(rest) == _weights(whole)
