"""Killed at random steps, resumed: with each precision and optimizer the end is that of an uninterrupted run, to the bit."""

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import small_overrides
from tests.flows.forked_trainings import finish, kill_behind, metrics_of, started

from kajiya.config.tables import TABLES
from kajiya.config.validate import CHECKS
from kajiya.run.events import read_events
from kajiya.run.folder import find_run
from kajiya.run.forks import release
from kajiya.run.hashing import hash_file
from kajiya.run.store import Store

pytestmark = pytest.mark.slow

STEPS = 24
CASES = [
    ("fp32", "adamw", "train.ema_decay=0.9"),
    ("fp32", "muon", ""),
    ("fp32", "adamw_8bit", ""),
    ("fp32", "adafactor", ""),
    ("fp32", "lion", ""),
    ("fp32", "sgd", ""),
    ("fp32", "schedule_free", "schedule=constant"),
    ("bf16", "adamw", "train.loss.options.neftune_alpha=5"),
    ("bf16", "muon", "train.ema_decay=0.9"),
    ("bf16", "adamw_8bit", ""),
    ("bf16", "schedule_free", "schedule=constant"),
    ("bf16-mixed", "adamw", "model.options.attention_dropout=0.1"),
    ("bf16-mixed", "muon", ""),
    ("fp16-mixed", "adamw", "train.ema_decay=0.9"),
    ("fp16-mixed", "muon", ""),
    ("fp32", "adamw", "train.on_spike=rollback train.spike_sigmas=1 optim.max_skipped=48 train.steps=48"),
    ("fp32", "adamw", "train.micro_batch=auto train.batch_rows=4 train.accumulate=1"),
]
"""Every optimizer, every precision that a CPU has; averages, dropout and noise among them."""

_UNPROVEN = f"preflight.skip=[{','.join(CHECKS)}]"
"""What is proven before a training has tests of its own."""


def test_every_optimizer_and_precision_has_a_case() -> None:
    from kajiya.training.precision import _KINDS

    assert {optim for _, optim, _ in CASES} == set(TABLES["optimizer"])
    assert {precision for precision, _, _ in CASES} == set(_KINDS) - {"fp8"}, "fp8 needs a GPU"


def _finish(store: Path, settings: tuple[str, ...]) -> Path:
    return finish("stdlib-pretrain", small_overrides(*settings), store).folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store that has the data of every case."""
    store = tmp_path_factory.mktemp("prepared") / "store"
    _finish(store, ("train.steps=1", "train.save_every=1", _UNPROVEN))
    for folder in (store / "runs", store / "artifacts" / "model"):
        shutil.rmtree(folder)
    yield store
    release()


@pytest.mark.parametrize(("precision", "optim", "more"), CASES)
def test_killed_at_random_steps(precision: str, optim: str, more: str, prepared: Path, tmp_path: Path) -> None:
    settings = (f"optim={optim}", f"train.precision={precision}", "train.accumulate=2", f"train.steps={STEPS}")
    settings = (*settings, "train.micro_batch=2", "train.log_every=1", "model.init=bigram", _UNPROVEN, *more.split())
    steps = 48 if "train.steps=48" in settings else STEPS
    stores = tmp_path / "whole", tmp_path / "killed"
    for store in stores:
        shutil.copytree(prepared, store)
    whole = _finish(stores[0], settings)
    # One before the first checkpoint or soon behind it, one later: other steps in each case, the same in each run of it.
    drawn = random.Random(f"{precision} {optim}")
    for step in (drawn.randint(1, 8), drawn.randint(steps // 2, steps - 2)):
        kill_behind(step, "stdlib-pretrain", small_overrides(*settings), stores[1])
    rest = _finish(stores[1], settings)
    assert sum(event["kind"] == "started" for event in read_events(rest)) == 3
    assert metrics_of(rest) == metrics_of(whole)
    went_back = [event["text"] for event in read_events(whole) if "went back" in event.get("text", "")]
    assert bool(went_back) == ("rollback" in more)
    last = f"checkpoints/step-{steps:08d}/state.safetensors"
    assert hash_file(rest / last) == hash_file(whole / last), "weights, masters, slots, averages, generators"
    models = [
        store / find_run(Store(store), "latest").manifest()["artifacts"]["model"]["path"] / "model.safetensors"
        for store in stores
    ]
    assert hash_file(models[0]) == hash_file(models[1])


def test_a_length_by_time_and_the_fastest_precision_are_settled_once(prepared: Path, tmp_path: Path) -> None:
    """The demo's own way: the first attempt measures, the later ones keep what it found."""
    common = ("model.n_params=400k", "train.compile=off", "train.eval_every=null", "train.save_every=null", _UNPROVEN)
    timed = (*common, "train.minutes=0.25", "train.steps=null", "train.precision=auto")
    stores = tmp_path / "killed", tmp_path / "whole"
    for store in stores:
        shutil.copytree(prepared, store)

    with started("stdlib-pretrain", small_overrides(*timed), stores[0]) as fork:
        for said in fork.lines():
            if said["kind"] == "derived":
                settled = said["values"]
                steps = settled["train.steps"]
                assert steps > 20, "this machine is too slow for a run of so little time"
            elif said["step"] >= steps // 2:
                fork.kill()
    assert fork.exit_code == -signal.SIGKILL, (stores[0] / "log").read_text()

    rest = _finish(stores[0], timed)
    events = list(read_events(rest))
    assert [event["values"] for event in events if event["kind"] == "derived"] == [settled]
    began = [event["resumed_from"] for event in events if event["kind"] == "started"]
    assert len(began) == 2
    assert began[1] >= settled["train.save_every"] == steps // 10
    fixed = (f"train.steps={steps}", f"train.precision={settled['train.precision']}")
    whole = _finish(stores[1], (*common, *fixed))
    manifests = [find_run(Store(store), "latest").manifest() for store in stores]
    assert manifests[0]["derived"] == manifests[1]["derived"] == settled
    assert metrics_of(rest) == metrics_of(whole)
    models = [store / made["artifacts"]["model"]["path"] for store, made in zip(stores, manifests, strict=True)]
    assert hash_file(models[0] / "model.safetensors") == hash_file(models[1] / "model.safetensors")
