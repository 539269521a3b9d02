"""Trainings in processes of their own, forked from one that has imported everything; some are killed behind a step."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from kajiya.run.events import read_events
from kajiya.run.folder import Run, find_run
from kajiya.run.forks import Fork, forked
from kajiya.run.store import Store

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
    scope = Scope(is_evaluated=order["is_evaluated"], is_reported=False)
    train(compose(order["recipe"], order["settings"]), Store(Path(order["store"])), on_event=hear, scope=scope)
    return 0

import_all()
sys.exit(serve(work))
"""

_LOSSES = {"train/nll", "train/loss"}
"""Of a text and of a policy."""


@contextmanager
def started(recipe: str, settings: Sequence[str], store: Path, *, is_evaluated: bool = False) -> Iterator[Fork]:
    """A training that has begun; `release` of `kajiya.run.forks` ends the process that they are forked from."""
    order = {"recipe": recipe, "settings": list(settings), "store": str(store), "is_evaluated": is_evaluated}
    with pytest.MonkeyPatch.context() as patch:
        # An order from another environment begins another process to fork from, and each test has its name in its own.
        patch.delenv("PYTEST_CURRENT_TEST")
        with forked(("-c", _TRAIN), order, store / "log") as fork:
            yield fork


def finish(recipe: str, settings: Sequence[str], store: Path, *, is_evaluated: bool = False) -> Run:
    """The run of a training that comes to its end."""
    with started(recipe, settings, store, is_evaluated=is_evaluated) as fork:
        assert all(fork.lines())
    assert fork.exit_code == 0, (store / "log").read_text()
    return find_run(Store(store), "latest")


def kill_behind(step: int, recipe: str, settings: Sequence[str], store: Path, *, is_evaluated: bool = False) -> None:
    """Kill a training as soon as it has said the loss of that step or a later one."""
    with started(recipe, settings, store, is_evaluated=is_evaluated) as fork:
        for said in fork.lines():
            if said["kind"] == "metrics" and said["step"] >= step and _LOSSES & said["values"].keys():
                fork.kill()
    assert fork.exit_code == -signal.SIGKILL, (store / "log").read_text()


def metrics_of(folder: Path) -> dict[tuple[int, str], float]:
    """Each metric of a run by its step and name, but for times."""
    return {
        (event["step"], name): value
        for event in read_events(folder)
        if event["kind"] == "metrics"
        for name, value in event["values"].items()
        if "per_second" not in name and name != "train/data_wait_s"
    }
