"""A signal outside the training steps: the work ends in order, says how to go on, and the run says that it was interrupted."""

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Finished, small_overrides
from typer.testing import CliRunner, Result

from kajiya.cli import app
from kajiya.run.events import read_events

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def _tell_an_unheard_signal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A SIGTERM that nothing takes fails the test; it does not end the suite."""
    monkeypatch.setattr("kajiya.run.provenance.usable_cores", lambda: 1)

    def unheard(*_: Any) -> None:
        pytest.fail("nothing took the signal")

    before = signal.signal(signal.SIGTERM, unheard)
    yield
    signal.signal(signal.SIGTERM, before)


def _hit(monkeypatch: pytest.MonkeyPatch, target: str, number: signal.Signals) -> None:
    """The function at `target` gets the signal as it begins."""
    module, _, name = target.rpartition(".")
    real = vars(importlib.import_module(module))[name]

    def hit(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*given, **named)

    monkeypatch.setattr(target, hit)


def _train(monkeypatch: pytest.MonkeyPatch, store: Path, *more: str) -> Result:
    words = ["train", "stdlib-pretrain", *small_overrides(*more), "--store", str(store)]
    monkeypatch.setattr(sys, "argv", ["kajiya", *words])
    return CliRunner().invoke(app, words)


def _says_how_to_go_on(said: str, store: Path) -> bool:
    words = said.partition("the same command goes on where it was:\n")[2]
    return "train stdlib-pretrain" in words and words.rstrip().endswith(f"--store {store}")


@pytest.mark.parametrize("number", SIGNALS)
def test_before_there_is_a_run(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hit(monkeypatch, "kajiya.data.corpus.build_corpus", number)
    ended = _train(monkeypatch, tmp_path / "store")
    assert ended.exit_code == 0, ended.exception
    assert "Reading, deduplicating" in ended.output
    assert _says_how_to_go_on(ended.output, tmp_path / "store")
    assert not list(tmp_path.glob("store/runs/*"))
    assert not list(tmp_path.glob("store/artifacts/corpus/*"))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    "moment",
    ["kajiya.flows.train._can_report", "kajiya.evals.evaluate.evaluate_model", "kajiya.flows.train.write_report"],
)
def test_before_the_steps_and_behind_them(
    moment: str, number: signal.Signals, own_finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run = own_finished.store.root, own_finished.trained.run
    # Another length of the samples: the model is there, its evaluation is not.
    more = f"eval.sample_tokens={int(number)}"
    with monkeypatch.context() as patch:
        _hit(patch, moment, number)
        ended = _train(patch, store, more)
    assert ended.exit_code == 0, ended.exception
    assert _says_how_to_go_on(ended.output, store)
    assert run.manifest()["status"] == "interrupted"
    last = list(read_events(run.folder))[-1]
    assert (last["kind"], last["status"]) == ("ended", "interrupted")


def test_the_same_command_goes_on(own_finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _hit(patch, "kajiya.evals.evaluate.evaluate_model", signal.SIGTERM)
        _train(patch, own_finished.store.root, "eval.sample_tokens=5")
    done = _train(monkeypatch, own_finished.store.root, "eval.sample_tokens=5")
    assert done.exit_code == 0, done.exception
    assert "bits per byte" in done.output
    assert own_finished.trained.run.manifest()["status"] == "finished"


def test_a_process_at_its_first_stage(tmp_path: Path) -> None:
    """As a person's `kill` finds it: the whole standard library, which takes a while to read."""
    words = [sys.executable, "-u", "-m", "kajiya", "train", "stdlib-pretrain", "--store", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "Reading" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, errors
    assert _says_how_to_go_on(errors, tmp_path)
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("verb", "moment"),
    [
        ("plan stdlib-pretrain", "kajiya.config.compose.compose"),
        ("prove stdlib-pretrain", "kajiya.config.compose.compose"),
        ("preview stdlib-pretrain", "kajiya.config.compose.compose"),
        ("train stdlib-pretrain --find-lr", "kajiya.config.compose.compose"),
        ("eval latest --json", "kajiya.flows.evaluate.heldout_config"),
        ("show", "kajiya.run.folder.find_run"),
        ("store verify", "kajiya.run.holdings.verify_store"),
    ],
)
def test_in_any_verb(
    verb: str, moment: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*verb.split(), "--store", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["kajiya", *words])
    _hit(monkeypatch, moment, number)
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.exception
    assert ended.stdout == ""
    assert ended.stderr.startswith("Interrupted. What was finished is kept; the same command goes on where it was:\n")
    assert ended.stderr.endswith(f"{' '.join(words)}\n")
