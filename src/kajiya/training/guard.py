"""What the loop does when a step goes wrong: a gradient that is not finite, a loss that leaps, memory that is not there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from kajiya.errors import TrainingError
from kajiya.run.files import new_folder, system_errors, write_json
from kajiya.training.state import TrainState

_TREND = 0.98
"""Decay of the running mean and variance of the loss: about 50 steps."""
_LEAST_STEPS = 30
"""Steps before a spike can be told from the noise."""
_LASTING = 5
"""Losses in a row so far above the trend that it is the level that has changed (longer rows, other data), and no spike."""


def _silent(_text: str) -> None:
    return


@dataclass(frozen=True)
class Guard:
    """Limits and callbacks. The defaults tell nobody, save nothing and look for no spikes."""

    faults: Path | None = None
    """Folder for the batches of a step that stopped the run."""
    tell: Callable[[str], object] = _silent
    """Hears what was done about a step, in words."""
    spike_sigmas: float | None = None
    """Standard deviations above its running mean at which a loss is a spike."""
    on_spike: str = "tell"
    """tell, skip (the update is left out) or rollback (the weights go back to the last checkpoint besides)."""
    rollback: Callable[[TrainState], bool] | None = None
    """Takes weights and optimizer back; false when there is no checkpoint yet."""
    shrink: Callable[[int], int] | None = None
    """Makes the loader give micro-batches smaller than the config's by so many steps; how many times smaller, 0: it cannot."""


def find_spike(guard: Guard, state: TrainState, loss: float) -> bool:
    """Whether this loss is a spike; otherwise it becomes part of the trend. The trend is state, so that a resume sees the same."""
    if guard.spike_sigmas is None:
        return False
    mean, variance, n = state.trend
    if n >= _LEAST_STEPS and loss > mean + guard.spike_sigmas * math.sqrt(variance):
        state.high += 1
        # Where updates are left out the loss stays high by itself, and `optim.max_skipped` ends it.
        if guard.on_spike != "tell" or state.high < _LASTING:
            return True
        guard.tell(
            f"step {state.step}: the loss has been above its trend of {mean:.4g} for {state.high} steps; {loss:.4g} is its "
            "level now"
        )
        mean, variance, n = 0.0, 0.0, 0
    state.high = 0
    decay = min(_TREND, n / (n + 1))
    change = loss - mean
    state.trend = [mean + (1 - decay) * change, decay * (variance + (1 - decay) * change**2), n + 1]
    return False


def handle_spike(guard: Guard, state: TrainState, loss: float, group: Sequence[Any], max_skipped: int) -> bool:
    """Do what the guard says about a spike; returns whether the update is left out."""
    said = f"step {state.step}: the loss leapt to {loss:.4g} from {state.trend[0]:.4g}"
    if guard.on_spike == "tell":
        guard.tell(said)
        return False
    state.spikes += 1
    if state.spikes > max_skipped:
        raise TrainingError(
            f"{said}, and optim.max_skipped={max_skipped} such steps were left out before it.{_kept(guard, state, group)}\n"
            "Lower optim.lr or optim.clip_norm, or raise optim.max_skipped; where it is the data that have changed, set "
            "train.on_spike=tell."
        )
    went_back = guard.on_spike == "rollback" and guard.rollback is not None and guard.rollback(state)
    done = "the weights went back to the last checkpoint" if went_back else "the update was left out"
    guard.tell(f"{said}; {done}")
    return True


def handle_nonfinite(guard: Guard, state: TrainState, group: Sequence[Any], what: str, max_skipped: int) -> None:
    """Count a step whose loss or gradient is not finite; past `max_skipped` stop, with the batch saved."""
    state.skipped += 1
    if state.skipped > max_skipped:
        raise TrainingError(
            f"step {state.step}: the {what} is not finite, and optim.max_skipped={max_skipped} such steps were skipped before "
            f"it.{_kept(guard, state, group)}\n"
            "Lower optim.lr, lengthen schedule.warmup_fraction, set train.precision=fp32, or raise optim.max_skipped."
        )
    guard.tell(
        f"step {state.step}: the {what} is not finite; skipped ({state.skipped} of {max_skipped} that are let pass)"
    )


def _kept(guard: Guard, state: TrainState, group: Sequence[Any]) -> str:
    if guard.faults is None:
        return ""
    try:
        return f" Its batches are in {save_batches(guard.faults, state, group)}."
    except OSError as problem:
        return f" Its batches could not be written into {guard.faults}: {problem.strerror}."


def save_batches(folder: Path, state: TrainState, group: Sequence[Any]) -> Path:
    """Write the micro-batches of a step into `folder/step-…`: batch.safetensors (`0/tokens`, `1/tokens` …), step.json."""
    from safetensors.torch import save_file

    final = folder / f"step-{state.step:08d}"
    tensors = {f"{n}/{name}": t.cpu().contiguous() for n, batch in enumerate(group) for name, t in _tensors(batch)}
    with new_folder(final) as beside, system_errors():
        save_file(tensors, beside / "batch.safetensors")
        write_json(beside / "step.json", {"step": state.step, "micro_batches": len(group), "trend": state.trend})
    return final


def _tensors(part: Any, prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    """Every tensor of a batch by its field's name, those of batches inside it too."""
    found: list[tuple[str, torch.Tensor]] = []
    for item in fields(part):
        value = getattr(part, item.name)
        if isinstance(value, torch.Tensor):
            found.append((f"{prefix}{item.name}", value))
        elif is_dataclass(value) and not isinstance(value, type):
            found += _tensors(value, f"{prefix}{item.name}/")
    return found
