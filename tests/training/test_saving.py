"""Saving beside the loop: the state of its step is what is written; a full disk costs one checkpoint; pieces of shards."""

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.training.conftest import make_batch
from tests.training.test_fit import make_setup

from kajiya.config.schema import Config
from kajiya.errors import StoreError, TrainingError
from kajiya.flows.keeping import Keeper
from kajiya.run.events import read_events
from kajiya.run.files import hash_folder, read_json, write_json
from kajiya.run.store import Store
from kajiya.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    take_snapshot,
    write_snapshot,
)
from kajiya.training.fit import fit
from kajiya.training.pieces import read_pieces
from kajiya.training.ranks import Ranks
from kajiya.training.saving import CheckpointWriter
from kajiya.training.state import TrainState

Make = Callable[..., torch.nn.Module]


@contextmanager
def _files_of_at_most(n_bytes: int) -> Iterator[None]:
    """The system itself refuses to write more into any file, as a full disk does."""
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, own[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)


def test_what_is_written_is_the_state_when_it_was_asked_for(tiny_model: Make, tmp_path: Path) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], steps=3)
    state = TrainState()
    fit(setup, state, [], lambda: False)
    snapshot = take_snapshot(state, setup.model, setup.optimizer, setup.loader.state(), "key", frozen=None)
    at_three = {name: tensor.detach().clone() for name, tensor in setup.model.named_parameters()}
    more = make_setup(setup.model, [make_batch(2)], steps=6)
    fit(more, state, [], lambda: False)  # the loop goes on before anything is written
    folder = write_snapshot(tmp_path, snapshot)
    other = make_setup(tiny_model(seed=5), [make_batch(2)])
    loaded, _ = load_checkpoint(folder, other.model, other.optimizer, "key")
    assert loaded.step == 3
    for name, tensor in other.model.named_parameters():
        assert torch.equal(tensor, at_three[name]), name


def test_a_full_disk_keeps_the_last_good_one_and_is_told(tiny_model: Make, tmp_path: Path) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], steps=2)
    writer = CheckpointWriter(tmp_path, keep_last=2)

    def save(step: int) -> list[Any]:
        state = TrainState(step=step)
        writer.save(take_snapshot(state, setup.model, setup.optimizer, {"index": 0}, "key", frozen=None), None)
        assert writer.has(step)
        writer.wait()
        return writer.outcomes()

    (good,) = save(1)
    assert good.folder == tmp_path / "step-00000001"

    with _files_of_at_most(10_000):
        (bad,) = save(2)
    assert bad.folder is None
    assert "File too large" in bad.problem
    assert not writer.has(2)
    assert list_checkpoints(tmp_path) == [good.folder]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    (third,) = save(3)
    assert list_checkpoints(tmp_path) == [good.folder, third.folder]


def test_a_save_whose_pruning_fails_is_written(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)])
    run = SimpleNamespace(folder=tmp_path, checkpoints=tmp_path / "checkpoints")
    heard: list[tuple[str, dict[str, Any]]] = []
    writer = CheckpointWriter(run.checkpoints, keep_last=1)
    where: Any = run
    keeper = Keeper(where, setup, "key", lambda kind, **said: heard.append((kind, said)), writer, Ranks())

    def stuck(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    for step, prune in ((1, prune_checkpoints), (2, stuck), (3, prune_checkpoints)):
        monkeypatch.setattr("kajiya.training.saving.prune_checkpoints", prune)
        keeper.save(TrainState(step=step))
        writer.wait()
    keeper.finish()
    kinds = [kind for kind, _ in heard]
    assert kinds == ["checkpoint", "checkpoint", "warning", "checkpoint"]
    assert "step 2 was written, but older ones could not be deleted. [Errno 5]" in heard[2][1]["text"]
    assert len({said["bytes"] for kind, said in heard if kind == "checkpoint"}) == 1, "one that is gone has its size"
    assert list_checkpoints(run.checkpoints) == [run.checkpoints / "step-00000003"]


def test_an_error_of_our_own_is_raised_and_not_told(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)])
    writer = CheckpointWriter(tmp_path, keep_last=2)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("kajiya.training.checkpoint.hash_folder", broken)
    writer.save(take_snapshot(TrainState(step=1), setup.model, setup.optimizer, {}, "key", frozen=None), None)
    writer.wait()
    with pytest.raises(ZeroDivisionError):
        writer.outcomes()


def test_a_run_on_a_full_disk_says_so_and_goes_on(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kajiya.flows.train import train

    def full_once(root: Path, snapshot: Snapshot) -> Path:
        with _files_of_at_most(100_000) if snapshot.step == 8 else nullcontext():
            return write_snapshot(root, snapshot)

    monkeypatch.setattr("kajiya.training.saving.write_snapshot", full_once)
    trained = train(small_config("eval.samples=0", "train.eval_every=12"), Store(tmp_path))
    assert trained.model is not None
    events = list(read_events(trained.run.folder))
    told = [event["text"] for event in events if event["kind"] == "warning" and "checkpoint" in event["text"]]
    assert len(told) == 1
    assert "step 8 was not written; the last good one is step-00000004" in told[0]
    assert [event["step"] for event in events if event["kind"] == "checkpoint"] == [4, 12]
    time = trained.run.manifest()["time"]
    assert {"data", "forward", "backward", "optimizer", "logging", "evaluation", "saving"} <= time["spent_s"].keys()
    assert 0 < time["model_flops_utilization"] < 1.5


def test_a_run_that_stops_on_a_full_disk_does_not_call_its_state_saved(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kajiya.flows.train import train

    def full_behind(root: Path, snapshot: Snapshot) -> Path:
        with _files_of_at_most(100_000) if snapshot.step > 4 else nullcontext():
            return write_snapshot(root, snapshot)

    def ask(kind: str, **said: Any) -> None:
        if kind == "progress" and said["stage"] == "train" and said["done"] == 6:
            signal.raise_signal(signal.SIGTERM)

    settings = ("eval.samples=0", "train.eval_every=12")
    with monkeypatch.context() as patch:
        patch.setattr("kajiya.training.saving.write_snapshot", full_behind)
        with pytest.raises(
            TrainingError, match=r"behind step 6, .* could not be written .* from step-00000004\nMake room"
        ):
            train(small_config(*settings), Store(tmp_path), on_event=ask)
    trained = train(small_config(*settings), Store(tmp_path))
    assert trained.model is not None
    events = list(read_events(trained.run.folder))
    assert [event["resumed_from"] for event in events if event["kind"] == "started"] == [None, 4]


def test_pieces_over_several_files_make_a_whole(tiny_model: Make, tmp_path: Path) -> None:
    """What two ranks with a half of every matrix each would have written is read as one."""
    setup = make_setup(tiny_model(), [make_batch(2)], steps=2)
    state = TrainState()
    fit(setup, state, [], lambda: False)
    folder = save_checkpoint(tmp_path, state, setup.model, setup.optimizer, {"index": 2}, "key")
    whole = load_file(folder / "state.safetensors")
    index: dict[str, Any] = {}
    files: dict[str, dict[str, torch.Tensor]] = {"rank-0.safetensors": {}, "rank-1.safetensors": {}}
    for name, tensor in whole.items():
        cut = tensor.shape[0] // 2 if tensor.ndim == 2 else None
        parts = [(0, tensor)] if cut is None else [(0, tensor[:cut]), (cut, tensor[cut:])]
        index[name] = {"shape": list(tensor.shape), "pieces": []}
        for (file, held), (first, part) in zip(files.items(), parts, strict=False):
            held[name] = part.contiguous()
            index[name]["pieces"].append(
                {"file": file, "offsets": [first, 0] if tensor.ndim == 2 else [0] * tensor.ndim}
            )
    (folder / "state.safetensors").unlink()
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    write_json(folder / "index.json", index)
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", manifest | {"files": hash_folder(folder)})
    other = make_setup(tiny_model(seed=5), [make_batch(2)])
    load_checkpoint(folder, other.model, other.optimizer, "key")
    for a, b in zip(setup.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    index["master/model.norm.weight"]["shape"] = [99]
    with pytest.raises(StoreError, match="do not fill"):
        read_pieces(folder, index)
