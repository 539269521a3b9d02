"""A step waits for its device once. On a CPU nothing waits, but the operators that would make a host wait are the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.training.conftest import make_batch, make_examples, make_rollouts, random_sequences
from tests.training.test_fit import make_setup
from torch.utils._python_dispatch import TorchDispatchMode

from kajiya.config.schema import LossConfig
from kajiya.data.batch import NO_TARGET, Batch, target_places
from kajiya.training.fit import train_step
from kajiya.training.losses import load_loss
from kajiya.training.state import TrainState
from kajiya.training.terms import Sums

Make = Callable[..., torch.nn.Module]
aten = torch.ops.aten
_ASKING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


class _Waits(TorchDispatchMode):
    """Notes the operators whose result, or the size of it, the host has to have."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func in (aten.index.Tensor, aten.index_put_.default) else ()
        if func in _ASKING or any(each is not None and each.dtype == torch.bool for each in indices):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where there are no C++ operators."""
    for module in ("isolation", "native.library"):
        monkeypatch.setattr(f"kajiya.models.{module}.native_problem", lambda: "off")


def _weighed(batch: Batch) -> Batch:
    weights = torch.rand(batch.targets.shape) + 0.5
    return Batch(batch.tokens, batch.targets, batch.positions, batch.segments, batch.n_targets, weights)


def _laid_out(batch: Any) -> Any:
    """As a batch that was moved to a GPU."""
    return batch.laid_out() if isinstance(batch, Batch) else replace(batch, rows=batch.rows.laid_out())


CASES: dict[str, tuple[LossConfig, Callable[[], Any]]] = {
    "next token": (LossConfig(options={"chunk_tokens": 7}), lambda: make_batch(2)),
    "weighed": (LossConfig(options={"chunk_tokens": 7, "neftune_alpha": 5.0}), lambda: _weighed(make_batch(2))),
    "pairs": (LossConfig("orpo"), lambda: make_examples(random_sequences(8), k=2)),
    "answers": (LossConfig("grpo"), lambda: make_rollouts(2, old=True, reference=True)),
}


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_asked_of_the_device_within_a_step(
    case: str, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the one reading of all sums, which is counted by itself."""
    config, make = CASES[case]
    batches = [_laid_out(make()) for _ in range(3)]
    setup = make_setup(tiny_model(), batches, loss=load_loss(config), accumulate=2, optim="adamw")
    n_read = 0
    stacked = Sums.stacked

    def counted(sums: Sums) -> torch.Tensor:
        nonlocal n_read
        n_read += 1
        return stacked(sums)

    monkeypatch.setattr(Sums, "stacked", counted)
    with _Waits() as waits:
        train_step(setup, TrainState())
    assert waits.found == []
    assert n_read == 1


@pytest.mark.usefixtures("without_native")
def test_a_batch_without_a_layout_is_asked(tiny_model: Make) -> None:
    """The test above can fail."""
    setup = make_setup(tiny_model(), [make_batch(2)])
    with _Waits() as waits:
        train_step(setup, TrainState())
    assert {"aten.nonzero.default", "aten._local_scalar_dense.default"} <= set(waits.found)


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("case", CASES)
def test_a_layout_changes_no_loss(case: str, tiny_model: Make) -> None:
    config, make = CASES[case]
    model, loss, batch = tiny_model(), load_loss(config), make()
    model.eval()
    terms = [loss(model, each)[0] for each in (batch, _laid_out(batch))]
    for name, (total, _) in terms[0].items():
        torch.testing.assert_close(terms[1][name][0], total)


def test_a_batch_that_leaves_the_host_brings_its_layout() -> None:
    batch = make_batch(3)
    assert batch.to("cpu").layout is None
    moved = batch.to("meta")
    assert moved.layout is not None
    assert moved.layout.places.device.type == moved.layout.bounds.device.type == "meta"
    layout = batch.laid_out().layout
    assert layout is not None
    assert torch.equal(layout.places, target_places(batch.targets))
    assert layout.is_split
    spans = [
        (row * 16 + place.min(), row * 16 + place.max() + 1)
        for row in range(3)
        for number in range(2)
        for place in [(batch.segments[row] == number).nonzero()]
    ]
    assert layout.bounds.tolist() == [0, *(int(end) for _, end in spans)]
    assert layout.longest == max(int(end - begin) for begin, end in spans)
    whole = Batch(batch.tokens, batch.targets, batch.positions, torch.zeros_like(batch.segments), batch.n_targets)
    laid = whole.laid_out().layout
    assert laid is not None
    assert not laid.is_split
    assert laid.bounds.tolist() == [0, 16, 32, 48]
    assert NO_TARGET not in batch.targets.flatten()[layout.places]
