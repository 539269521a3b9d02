"""Fixtures that every room shares: a small corpus of real text, a small config, and quiet, seeded processes."""

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from kajiya.config.compose import compose
from kajiya.config.schema import Config

SMALL = (
    "tokenizer.vocab_size=512",
    "model.n_params=60k",
    "data.row_tokens=64",
    "data.heldout_every=5",
    "train.minutes=null",
    "train.steps=12",
    "train.micro_batch=2",
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
    """The demo's recipe on the standard library's `json` and friends, tiny."""
    root = Path(sysconfig.get_paths()["stdlib"]) / "email"
    return [f"data.source.options.root={root}", *SMALL, *more]


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Config]:
    """`small_config("optim=adamw", …)`: a tiny config over the standard library's `email` package."""
    return lambda *more: compose("stdlib-pretrain", small_overrides(*more))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors are slower on several threads, and machines that run tests are shared."""
    import torch

    torch.set_num_threads(1)
