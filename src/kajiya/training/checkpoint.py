"""Checkpoints: weights, optimizer, random generators, loader, counters; no pickle, hashed, whole or absent.

`step-00000120/`: state.safetensors (masters and optimizer slots by parameter name, buffers, generators), index.json (where each
tensor's pieces are, so that several ranks may each write a file of their own), state.json, manifest.json.
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kajiya.errors import StoreError
from kajiya.models.weights_digest import tensors_digest
from kajiya.run.files import check_files, hash_folder, new_folder, read_json, require_space, system_errors, write_json
from kajiya.training.generators import Generators, read_generators, restore_generators
from kajiya.training.masters import MasterOptimizer
from kajiya.training.pieces import index_of, read_pieces
from kajiya.training.state import TrainState

_MANIFEST = "manifest.json"
_INDEX = "index.json"
_TENSORS = "state.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, apart from the run that goes on."""

    tensors: dict[str, torch.Tensor]
    plain: dict[str, Any]

    @property
    def step(self) -> int:
        """The step after which it was taken."""
        return int(self.plain["state"]["step"])

    @property
    def bytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def take_snapshot(
    state: TrainState,
    model: nn.Module,
    optimizer: MasterOptimizer,
    loader: dict[str, Any],
    run_key: str,
    generators: Sequence[Generators] = (),
    *,
    frozen: str | None,
) -> Snapshot:
    """A copy of the state on the CPU, which nothing that follows changes; `generators` of all ranks, or this process's own.

    `frozen` is the model's `frozen_digest`, which takes as long as reading all weights and stays the same throughout a run.
    """
    generators = generators or [read_generators()]
    drawn = {f"generator/{rank}/{k}": t for rank, each in enumerate(generators) for k, t in each.tensors.items()}
    tensors = state_buffers(model) | optimizer.state_tensors() | drawn
    copied = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    plain: dict[str, Any] = {"state": asdict(state), "loader": loader, "run_key": run_key}
    plain |= {"generators": [each.numbers for each in generators], "frozen": frozen}
    return Snapshot(copied, copy.deepcopy(plain))


def write_snapshot(root: Path, snapshot: Snapshot) -> Path:
    """Write `root/step-<step>` beside, sync, rename; the disk space is checked before. Returns the folder."""
    from safetensors.torch import save_file

    root.mkdir(parents=True, exist_ok=True)
    require_space(root, snapshot.bytes + 2**20, f"The checkpoint of step {snapshot.step}")
    final = root / checkpoint_name(snapshot.step)
    with new_folder(final) as folder, system_errors():
        save_file(snapshot.tensors, folder / _TENSORS)
        write_json(folder / _INDEX, index_of(snapshot.tensors, _TENSORS))
        write_json(folder / "state.json", snapshot.plain)
        best = snapshot.plain["state"]["best_loss"]
        write_json(folder / _MANIFEST, {"step": snapshot.step, "best_loss": best, "files": hash_folder(folder)})
    return final


def save_checkpoint(
    root: Path, state: TrainState, model: nn.Module, optimizer: MasterOptimizer, loader: dict[str, Any], run_key: str
) -> Path:
    """Write `root/step-<step>` at once; returns the folder."""
    return write_snapshot(root, take_snapshot(state, model, optimizer, loader, run_key, frozen=frozen_digest(model)))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: MasterOptimizer, run_key: str, rank: int = 0
) -> tuple[TrainState, dict[str, Any]]:
    """Verify every hash, restore model, optimizer and generators; returns the counters and the loader's state.

    A rank beyond those that wrote the checkpoint keeps the generators that it has.
    """
    tensors, plain = _read(folder, run_key)
    _restore_weights(folder, (tensors, plain), model, optimizer)
    if rank < len(plain["generators"]):
        own = f"generator/{rank}/"
        drawn = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
        restore_generators(Generators(drawn, plain["generators"][rank]))
    return TrainState(**plain["state"]), plain["loader"]


def ranks_behind(folder: Path) -> int:
    """How many processes wrote the checkpoint together."""
    return len(read_json(folder / "state.json")["generators"])


def load_weights(folder: Path, model: nn.Module, optimizer: MasterOptimizer, run_key: str) -> None:
    """Verify every hash, restore model and optimizer alone; generators, counters and the loader go on."""
    _restore_weights(folder, _read(folder, run_key), model, optimizer)


def _read(folder: Path, run_key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    check_files(folder, read_json(folder / _MANIFEST)["files"], reads_all=True)
    plain = read_json(folder / "state.json")
    if plain["run_key"] != run_key:
        raise StoreError(f"{folder}: this checkpoint is of another config, data or code than the run")
    return read_pieces(folder, read_json(folder / _INDEX)), plain


def _restore_weights(
    folder: Path, read: tuple[dict[str, torch.Tensor], dict[str, Any]], model: nn.Module, optimizer: MasterOptimizer
) -> None:
    tensors, plain = read
    if plain["frozen"] != frozen_digest(model):
        raise StoreError(f"{folder}: the frozen weights are not those that this checkpoint was trained beside")
    held = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    expected = {name.removeprefix("model/") for name in state_buffers(model)}
    if expected != held.keys():
        odd = sorted(expected ^ held.keys())[0]
        raise StoreError(f"{folder}: the tensor {odd!r} is in the model or in the checkpoint, but not in both")
    own = dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in held.items():
            own[name].copy_(tensor)
    optimizer.load_state_tensors(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(("model/", "generator/"))}
    )


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints, oldest first; folders that a crash left half-written are not among them."""
    return sorted(path.parent for path in root.glob("step-*/" + _MANIFEST))


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was taken."""
    return int(folder.name.removeprefix("step-"))


def of_rhythm(checkpoints: Sequence[Path], save_every: int) -> list[Path]:
    """Those that an uninterrupted run would have too: none that a signal or an evaluation caused."""
    return [folder for folder in checkpoints if step_of(folder) % save_every == 0]


def disown_checkpoint(folder: Path) -> None:
    """Take the manifest away: the folder is no checkpoint any more, and the next save of its step replaces it."""
    (folder / _MANIFEST).unlink()


def prune_checkpoints(root: Path, keep_last: int, best_step: int | None, save_every: int = 1) -> None:
    """Delete all but the last `keep_last`, the one of `best_step`, and the last one of the run's own rhythm, to which it rolls
    back: those that a signal or an evaluation caused may be newer."""
    whole = list_checkpoints(root)
    wanted = {folder.name for folder in whole[-keep_last:]}
    wanted |= {folder.name for folder in of_rhythm(whole, save_every)[-1:]}
    if best_step is not None:
        wanted.add(checkpoint_name(best_step))
    for folder in whole:
        if folder.name not in wanted:
            disown_checkpoint(folder)
            shutil.rmtree(folder)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def frozen_digest(model: nn.Module) -> str | None:
    """SHA-256 of the weights that are not trained, which a checkpoint names and does not hold; `None` where there are none."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = state_buffers(model)
    frozen = [
        (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor) and id(tensor) not in trained and f"model/{name}" not in held
    ]
    return tensors_digest(frozen) if frozen else None


def state_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the model's state, by their name in a checkpoint; shared ones once."""
    kept = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                kept[f"model/{path}.{name}" if path else f"model/{name}"] = buffer
    return kept
