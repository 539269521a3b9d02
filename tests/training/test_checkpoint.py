"""Checkpoints: every combination comes back bit for bit; half a checkpoint is none; a broken one is refused."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.training.conftest import make_batch
from tests.training.test_fit import make_setup

from kajiya.config.tables import TABLES
from kajiya.errors import StoreError
from kajiya.training.checkpoint import list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint, step_of
from kajiya.training.fit import Setup, fit
from kajiya.training.state import TrainState

Make = Callable[..., torch.nn.Module]


def _setup(model: torch.nn.Module, optim: str, precision: str, steps: int) -> Setup:
    return make_setup(model, [make_batch(2, seed=s) for s in range(5)], optim=optim, precision=precision, steps=steps)


def _combinations() -> list[tuple[str, str, bool]]:
    """Every optimizer in fp32, every precision with two optimizers, tied weights and not."""
    names = sorted(TABLES["optimizer"])
    precisions = ("bf16", "bf16-mixed", "fp16-mixed")
    return [(name, "fp32", True) for name in names] + [
        (name, precision, tied) for name in ("adamw", "muon") for precision in precisions for tied in (True, False)
    ]


@pytest.mark.parametrize(("optim", "precision", "tied"), _combinations())
def test_half_and_half_equals_the_whole(
    optim: str, precision: str, tied: bool, tiny_model: Make, tmp_path: Path
) -> None:
    whole = _setup(tiny_model(tied=tied), optim, precision, 10)
    fit(whole, TrainState(), [], lambda: False)

    half = _setup(tiny_model(tied=tied), optim, precision, 4)
    state = TrainState()
    fit(half, state, [], lambda: False)
    folder = save_checkpoint(tmp_path, state, half.model, half.optimizer, half.loader.state(), "key")
    expected = (random.random(), float(np.random.rand()), float(torch.rand(())))

    rest = _setup(tiny_model(seed=3, tied=tied), optim, precision, 10)
    state, position = load_checkpoint(folder, rest.model, rest.optimizer, "key")
    rest.loader.load_state(position)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected
    assert (state.step, state.tokens) == (4, 4 * 32)
    fit(rest, state, [], lambda: False)
    for (name, a), b in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def _saved(tiny_model: Make, root: Path, step: int = 4) -> Path:
    setup = _setup(tiny_model(), "adamw", "fp32", step)
    state = TrainState()
    fit(setup, state, [], lambda: False)
    return save_checkpoint(root, state, setup.model, setup.optimizer, setup.loader.state(), "key")


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_checkpoint_with_a_broken_or_missing_file_is_refused(name: str, tiny_model: Make, tmp_path: Path) -> None:
    folder = _saved(tiny_model, tmp_path)
    fresh = _setup(tiny_model(), "adamw", "fp32", 4)
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(StoreError, match="corrupt"):
        load_checkpoint(folder, fresh.model, fresh.optimizer, "key")
    (folder / name).unlink()
    with pytest.raises(StoreError, match="missing"):
        load_checkpoint(folder, fresh.model, fresh.optimizer, "key")


def test_a_checkpoint_of_another_run_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    folder = _saved(tiny_model, tmp_path)
    fresh = _setup(tiny_model(), "adamw", "fp32", 4)
    with pytest.raises(StoreError, match="another config"):
        load_checkpoint(folder, fresh.model, fresh.optimizer, "other key")


def test_a_crash_during_a_save_leaves_the_last_good_one(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = _saved(tiny_model, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kajiya.training.checkpoint.write_json", full)
    with pytest.raises(OSError, match="No space"):
        _saved(tiny_model, tmp_path, step=5)
    assert list_checkpoints(tmp_path) == [good]


def test_pruning_keeps_the_last_and_the_best(tiny_model: Make, tmp_path: Path) -> None:
    for step in range(1, 7):
        _saved(tiny_model, tmp_path, step)
    (tmp_path / ".step-00000009.123").mkdir()
    prune_checkpoints(tmp_path, keep_last=2, best_step=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000005", "step-00000006"]
    assert not list(tmp_path.glob(".step-*"))


def test_pruning_keeps_what_a_rollback_goes_to(tmp_path: Path) -> None:
    """Ten and twenty are the run's own; the others a signal or an evaluation caused."""
    for step in (10, 20, 22, 24):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "manifest.json").touch()
    prune_checkpoints(tmp_path, keep_last=1, best_step=None, save_every=10)
    assert [step_of(folder) for folder in list_checkpoints(tmp_path)] == [20, 24]


def test_no_pickle_in_a_checkpoint(tiny_model: Make, tmp_path: Path) -> None:
    folder = _saved(tiny_model, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "manifest.json",
        "state.json",
        "state.safetensors",
    ]
