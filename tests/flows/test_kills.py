"""Killed at random steps, resumed: with each precision and optimizer the end is that of an uninterrupted run, to the bit."""

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import small_overrides

from kajiya.config.tables import TABLES
from kajiya.config.validate import CHECKS
from kajiya.run.events import read_events
from kajiya.run.folder import find_run
from kajiya.run.forks import Fork, forked, release
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

_TRAIN = """
import json, os, sys
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
from kajiya.config.compose import compose
from kajiya.flows.train import Scope, train
from kajiya.flows.tune_trial import import_all
from kajiya.run.forks import serve
from kajiya.run.store import Store

def work(order, to_parent, from_parent):
    def hear(kind, **fields):
        if kind in ("metrics", "derived"):
            to_parent.write(json.dumps({"kind": kind, "step": fields.get("step"), "values": fields["values"]}) + "\\n")
            to_parent.flush()
    scope = Scope(is_evaluated=False, is_reported=False)
    train(compose("stdlib-pretrain", order["settings"]), Store(Path(order["store"])), on_event=hear, scope=scope)
    return 0

import_all()
sys.exit(serve(work))
"""


def test_every_optimizer_and_precision_has_a_case() -> None:
    from kajiya.training.precision import _KINDS

    assert {optim for _, optim, _ in CASES} == set(TABLES["optimizer"])
    assert {precision for precision, _, _ in CASES} == set(_KINDS) - {"fp8"}, "fp8 needs a GPU"


@contextmanager
def _started(store: Path, settings: tuple[str, ...]) -> Iterator[Fork]:
    order = {"store": str(store), "settings": small_overrides(*settings)}
    with forked(("-c", _TRAIN), order, store / "log") as fork:
        yield fork


def _finish(store: Path, settings: tuple[str, ...]) -> Path:
    with _started(store, settings) as fork:
        assert all(fork.lines())
    assert fork.exit_code == 0, (store / "log").read_text()
    return find_run(Store(store), "latest").folder


def _kill_behind(step: int, store: Path, settings: tuple[str, ...]) -> None:
    with _started(store, settings) as fork:
        for said in fork.lines():
            if said["kind"] == "metrics" and said["step"] >= step:
                fork.kill()
    assert fork.exit_code == -signal.SIGKILL, (store / "log").read_text()


def _metrics(folder: Path) -> dict[tuple[int, str], float]:
    return {
        (event["step"], name): value
        for event in read_events(folder)
        if event["kind"] == "metrics"
        for name, value in event["values"].items()
        if "per_second" not in name and name != "train/data_wait_s"
    }


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
        _kill_behind(step, stores[1], settings)
    rest = _finish(stores[1], settings)
    assert sum(event["kind"] == "started" for event in read_events(rest)) == 3
    assert _metrics(rest) == _metrics(whole)
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
    timed = (*common, "train.minutes=0.5", "train.steps=null", "train.precision=auto")
    stores = tmp_path / "killed", tmp_path / "whole"
    for store in stores:
        shutil.copytree(prepared, store)

    with _started(stores[0], timed) as fork:
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
    assert _metrics(rest) == _metrics(whole)
    models = [store / made["artifacts"]["model"]["path"] for store, made in zip(stores, manifests, strict=True)]
    assert hash_file(models[0] / "model.safetensors") == hash_file(models[1] / "model.safetensors")
