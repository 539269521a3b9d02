"""Verdicts of a replay (an identical one is made by its verb, in `test_verbs`); what a run used; reports compare runs in pairs."""

import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from tests.conftest import Finished

from kajiya.config.schema import Config
from kajiya.flows.replay import _compare_weights, _store_of_replay, _verdict, replay
from kajiya.flows.report import write_report
from kajiya.flows.report_comparison import _compare_documents
from kajiya.flows.report_facts import gather
from kajiya.flows.train import _energy_of, train
from kajiya.run.folder import Run, find_run
from kajiya.run.gpu_energy import joules_since, read_energy
from kajiya.run.store import Store
from kajiya.run.usage import forget_notes, note_usage, noted_usage, usage_with, with_others


def _recorded_with(own_finished: Finished, name: str, **optim: float) -> Run:
    """The finished run under another name, as though it had been trained with these settings."""
    folder = own_finished.store.runs / name
    shutil.copytree(own_finished.trained.run.folder, folder)
    run = find_run(own_finished.store, name)
    config = run.manifest()["config"]
    run.record(config=config | {"optim": config["optim"] | optim})
    return run


@pytest.mark.slow
def test_a_replay_is_within_tolerance_or_different(own_finished: Finished) -> None:
    lr = own_finished.config.optim.lr
    near = replay(_recorded_with(own_finished, "near-1", lr=lr * (1 + 1e-5)))
    assert near.verdict == "within tolerance", near
    assert near.weights.startswith("the largest difference of a weight is ")
    first, second = near.metrics["test/bits_per_byte"]
    assert first == pytest.approx(second, rel=1e-4)
    far = replay(_recorded_with(own_finished, "far-1", lr=lr * 0.1))
    assert far.verdict == "different", far
    first, second = far.metrics["test/bits_per_byte"]
    assert first != pytest.approx(second, rel=1e-4)


def test_every_replay_trains_and_says_what_was_set_otherwise(
    own_finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kajiya.flows.replay.usable_cores", lambda: 1)
    run = _recorded_with(own_finished, "again-1")
    known = run.manifest()["provenance"]
    set_otherwise = known | {"process": known["process"] | {"threads": 64, "deterministic": True}}
    run.record(provenance=set_otherwise, later_provenance=[])  # other tests may have gone on with the run
    begun: list[str] = []

    def hear(kind: str, **fields: Any) -> None:
        if kind == "stage" and fields["name"] == "train" and fields["state"] == "done":
            begun.append(fields["name"])

    folders = []
    for _ in range(2):
        found = replay(run, hear)
        folders.append(Path(found.folder).name)
        assert found.verdict == "bit-identical", found
        assert found.differs["environment"]["process.deterministic"] == [True, False]
        assert found.differs["environment"]["process.threads"] == [64, 1]
    assert folders == ["again-1", "again-1-2"]
    assert begun == ["train", "train"], "a finished replay is not taken for the next one"
    find_run(Store(Path(found.folder)), "latest").record(status="interrupted")
    assert _store_of_replay(run).root.name == "again-1-2", "an interrupted one goes on"


def test_the_verdict_needs_something_that_was_compared() -> None:
    assert _verdict(True, {}) == _verdict(True, {"test/nll": [2.0, 2.0]}) == "bit-identical"
    assert _verdict(True, {"test/nll": [2.0, 2.0001]}) == "within tolerance", "equal weights, scored in another way"
    assert _verdict(True, {"test/nll": [2.0, 2.1]}) == "different"
    assert _verdict(False, {"eval/nll": [2.0, 2.0001]}) == "within tolerance"
    assert _verdict(False, {"eval/nll": [2.0, 2.1]}) == "different"
    assert _verdict(False, {"eval/nll": [2.0, None], "train/nll": [1.0, 1.0]}) == "different"
    assert _verdict(False, {"train/nll": [1.0, 1.0], "eval/nll": [2.0, "nan"]}) == "different"
    assert _verdict(False, {}) == "different"


def test_weights_that_are_not_there_are_not_identical(tmp_path: Path) -> None:
    def folder(name: str, **files: torch.Tensor) -> Path:
        (tmp_path / name).mkdir()
        for file, tensor in files.items():
            save_file({"w": tensor}, tmp_path / name / f"{file}.safetensors")
        return tmp_path / name

    ones, nan = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    none, one, same = folder("none"), folder("one", model=ones), folder("same", model=ones)
    assert _compare_weights(none, none)[0] is False
    assert "no weights to compare" in _compare_weights(none, none)[1]
    assert _compare_weights(one, same) == (True, "every weight has the same bits")
    assert _compare_weights(one, folder("more", model=ones, second=ones)) == (
        False,
        "only one of the two models has second.safetensors",
    )
    assert _compare_weights(one, folder("nan", model=nan)) == (False, "the largest difference of a weight is inf (w)")


def test_the_energy_of_gpus_adds_up_and_is_in_the_report(
    own_finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counters = {"GPU-a": 5_000_000, "GPU-b": 1_000}
    monkeypatch.setattr("kajiya.run.gpu_energy.read_energy", lambda names: {name: counters.get(name) for name in names})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda index: (index + 1) * 2**30)
    begun = {"GPU-a": 1_400_000, "GPU-b": 1_000}
    first = usage_with(None, begun)
    assert (first["gpu_joules"], first["gpu_peak_bytes"]) == (3600.0, 2**31)
    second = usage_with(first, begun)
    assert second["gpu_joules"] == 7200.0
    assert usage_with(second)["gpu_joules"] == 7200.0, "a further attempt without one keeps it"
    assert usage_with(second, {"GPU-old": None})["gpu_joules"] is None
    run, shown = own_finished.trained.run, second | {"n_uncounted_ranks": 3}
    monkeypatch.setattr(Run, "manifest", lambda self, read=Run.manifest: read(self) | {"usage": shown})
    text = write_report([run], tmp_path).with_name("report.md").read_text()
    assert "3 of its processes left no note of what they used" in text
    assert " Wh + 2.00 Wh of GPUs |" in text
    assert "| peak GPU memory |" in text
    assert "what their drivers counted" in text


def test_each_rank_reads_the_counter_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kajiya.flows.train.gpu_names", lambda indices: [f"GPU-{index}" for index in indices])
    monkeypatch.setattr("kajiya.flows.train.read_energy", lambda names: dict.fromkeys(names, 1))
    assert [_energy_of(torch.device(name)) for name in ("cpu", "cuda", "cuda:2")] == [{}, {"GPU-0": 1}, {"GPU-2": 1}]


def test_what_other_ranks_used_is_noted_and_added(tmp_path: Path) -> None:
    own = {"cpu_seconds": 3.0, "peak_bytes": 10, "gpu_joules": 5.0, "gpu_peak_bytes": 7}
    unknown = own | {"gpu_joules": None}
    assert with_others(own, []) == own
    more = {"cpu_seconds": 1.5, "peak_bytes": 12, "gpu_joules": 1.0, "gpu_peak_bytes": 3}
    assert with_others(own, [more, own]) == {
        "cpu_seconds": 7.5, "peak_bytes": 12, "gpu_joules": 11.0, "gpu_peak_bytes": 7,
    }  # fmt: skip
    assert with_others(own, [more, unknown, own])["gpu_joules"] is None
    assert noted_usage(tmp_path, 0, 60.0) == []
    assert noted_usage(tmp_path, 1, 0.01) == [], "it waits no longer"
    note_usage(tmp_path, 2)
    (noted,) = noted_usage(tmp_path, 2, 0.0)
    assert noted["cpu_seconds"] > 0
    assert noted["peak_bytes"] > 2**20
    forget_notes(tmp_path)
    assert noted_usage(tmp_path, 2, 0.0) == []
    forget_notes(tmp_path)  # of a run that had one process


def test_without_a_driver_no_energy_is_known() -> None:
    assert read_energy([]) == {}
    assert read_energy(["GPU-nowhere"]) == {"GPU-nowhere": None}
    assert joules_since({"GPU-nowhere": 3}) is None


def test_children_count_among_the_processor_time() -> None:
    before = usage_with(None)["cpu_seconds"]
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    own = resource.getrusage(resource.RUSAGE_SELF)
    assert usage_with(None)["cpu_seconds"] - before > 0.05
    assert usage_with(None)["cpu_seconds"] > own.ru_utime + own.ru_stime + 0.05


def test_usage_adds_up() -> None:
    first = usage_with(None)
    second = usage_with(first)
    assert second["cpu_seconds"] >= 2 * first["cpu_seconds"] > 0
    assert second["peak_bytes"] >= first["peak_bytes"] > 2**20


def test_a_report_of_two_runs_compares_them_by_document(
    own_finished: Finished, small_config: Callable[..., Config], tmp_path: Path
) -> None:
    other = train(small_config("seed=5", "train.steps=24", "eval.baselines=[]"), own_finished.store)
    runs = [own_finished.trained.run, other.run]
    text = write_report(runs, tmp_path).with_name("report.md").read_text()
    assert "## Paired comparison" in text
    assert "On bits per byte," in text
    assert "## Cost" in text
    assert "nothing was measured at the socket" in text
    a, b = gather(runs)
    found = _compare_documents(a, b)
    bits = [np.array([each.bits for each in run.documents]) for run in (a, b)]
    n_bytes = np.array([each.n_bytes for each in a.documents])
    assert found.difference == pytest.approx((bits[1].sum() - bits[0].sum()) / n_bytes.sum())

    def gap(x: np.ndarray, y: np.ndarray) -> float:
        return float((y.sum() - x.sum()) / n_bytes.sum())

    theirs = stats.permutation_test(bits, gap, permutation_type="samples", n_resamples=np.inf)
    assert found.p_value == pytest.approx(theirs.pvalue)
