"""Fixtures that every room shares: a tiny config over real text, and one finished run of it."""

import dataclasses
import os
import random
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from kajiya.config.compose import compose
from kajiya.config.schema import Config

# Where tests share the cores, threads of several processes wait for each other at every product; small ones need but one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples at every run, however slow the machine; `--hypothesis-profile=search` draws new ones.
hypothesis.settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("same")


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """Weights and noise that a test draws are the same at every run, whichever tests ran before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


SMALL = (
    "tokenizer.vocab_size=512",
    "model.n_params=60k",
    "model.init=normal",
    "data.row_tokens=64",
    "data.heldout_every=5",
    "train.minutes=null",
    "train.steps=12",
    "train.micro_batch=2",
    # What a machine is fastest in must not decide what is tested.
    "train.precision=fp32",
    "train.log_every=2",
    "train.eval_rows=4",
    "train.save_every=4",
    "train.eval_every=6",
    "eval.samples=1",
    "eval.sample_tokens=8",
    "track.trackers=[]",
)
"""Overrides that make the demo's recipe a matter of seconds on one core."""


def small_overrides(*more: str) -> list[str]:
    """The demo's recipe on the standard library's `email` package, tiny."""
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    return [f"data.source.options.root={root}", *SMALL, *more]


@dataclass(frozen=True)
class Finished:
    """A finished run of the small config, and what was heard of it."""

    config: Config
    store: Any
    trained: Any
    events: list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Config]:
    """`small_config("optim=adamw", …)`: the small config with further overrides."""
    return lambda *more: compose("stdlib-pretrain", small_overrides(*more))


@pytest.fixture(scope="session")
def finished(small_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The small config trained, evaluated and reported, in a store of its own."""
    from kajiya.flows.train import train
    from kajiya.run.store import Store

    # A second thread costs tiny tensors more than it brings, and on a machine with other work a hundred times as much.
    patch = pytest.MonkeyPatch()
    patch.setattr("kajiya.run.provenance.usable_cores", lambda: 1)
    config = small_config()
    store = Store(tmp_path_factory.mktemp("store"))
    heard: list[tuple[str, dict[str, Any]]] = []
    command = ["kajiya", "train", "stdlib-pretrain", *small_overrides()]
    trained = train(config, store, command=command, on_event=lambda kind, **fields: heard.append((kind, fields)))
    patch.undo()
    return Finished(config, store, trained, heard)


@pytest.fixture(scope="module")
def own_finished(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same in a copy of its store, for tests that add to it."""
    from kajiya.run.folder import find_run
    from kajiya.run.store import Store

    store = Store(tmp_path_factory.mktemp("copy") / "store")
    shutil.copytree(finished.store.root, store.root)
    trained = dataclasses.replace(finished.trained, run=find_run(store, finished.trained.run.id))
    return Finished(finished.config, store, trained, finished.events)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors are slower on several threads, and machines that run tests are shared."""
    import torch

    torch.set_num_threads(1)
