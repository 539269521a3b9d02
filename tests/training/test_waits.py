"""A step waits for its device once. On a CPU nothing waits, but the operators that would make a host wait are the same."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.conftest import make_batch, make_examples, make_pairs_of_text, make_rollouts, random_sequences
from tests.training.test_fit import make_setup
from tests.training.test_kinds import LOSSES, new_batches, new_model
from torch.utils._python_dispatch import TorchDispatchMode

from kajiya.config.options import DistillLoss
from kajiya.config.schema import LossConfig
from kajiya.data.batch import NO_TARGET, Batch, RolloutBatch, target_places
from kajiya.models.future import add_future_heads
from kajiya.training.fit import train_step
from kajiya.training.losses import load_loss, load_measure
from kajiya.training.losses.distill import distill
from kajiya.training.state import TrainState
from kajiya.training.teacher import Keeping, cache_teacher, open_cached_teacher

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
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no C++ operators, and a question about a tensor would make the host wait."""
    for module in ("isolation", "native.library"):
        monkeypatch.setattr(f"kajiya.models.{module}.native_problem", lambda: "off")
    for module in ("models.attention", "training.cross_entropy"):
        monkeypatch.setattr(f"kajiya.{module}.is_on_host", lambda _tensor: False)


def _weighed(batch: Batch) -> Batch:
    weights = torch.rand(batch.targets.shape) + 0.5
    return Batch(batch.tokens, batch.targets, batch.positions, batch.segments, batch.n_targets, weights)


def _laid_out(batch: Any) -> Any:
    """As a batch that was moved to a GPU."""
    return replace(batch, rows=batch.rows.laid_out()) if isinstance(batch, RolloutBatch) else batch.laid_out()


@dataclass(frozen=True)
class Case:
    """A model, its loss, what the loss reads beside its batches, and those."""

    loss: str = "next_token"
    options: dict[str, Any] = field(default_factory=dict)
    beginning: str = "full"
    make: Callable[[], list[Any]] | None = None
    teacher: str | None = None
    future: int = 0


def _rows() -> list[Any]:
    places = torch.arange(6 * 16).view(3, 2, 16)
    return [replace(make_batch(2, seed=seed), sources=places[seed]) for seed in range(3)]


def _with_future() -> list[Any]:
    return [make_batch(2, seed=seed).with_future(2) for seed in range(3)]


CASES: dict[str, Case] = {
    **{loss: Case(loss) for loss in LOSSES if loss not in ("distill", "grpo")},
    "next_token: smoothing, z-loss": Case(options={"label_smoothing": 0.1, "z_loss": 1e-3}),
    "next_token: weights, NEFTune": Case(
        options={"chunk_tokens": 7, "neftune_alpha": 5.0}, make=lambda: [_weighed(make_batch(2)) for _ in range(3)]
    ),
    "next_token: further tokens": Case(make=_with_future, future=2),
    "next_token: LoRA": Case(beginning="lora"),
    "dpo: LoRA": Case("dpo", beginning="lora"),
    "dpo: ipo": Case("dpo", {"kind": "ipo"}),
    "kto: LoRA": Case("kto", beginning="lora"),
    "grpo": Case("grpo", make=lambda: [make_rollouts(2, seed, old=True, reference=True) for seed in range(3)]),
    "distill: online": Case("distill", {"chunk_tokens": 7}, make=_rows, teacher="itself"),
    "distill: cached": Case("distill", {"chunk_tokens": 7}, make=_rows, teacher="cached"),
    "masked: smoothing": Case("masked_lm", {"label_smoothing": 0.1}),
    "classify: smoothing": Case("classify", {"label_smoothing": 0.1}),
    "regress: Huber": Case("regress", {"huber_delta": 0.5}),
}


def _loss(case: Case, folder: Path) -> Any:
    if case.teacher is None:
        return load_loss(LossConfig(case.loss, case.options))
    teacher = new_model("next_token", seed=5).eval().requires_grad_(False)
    if case.teacher == "cached":
        size = cache_teacher(teacher, [(0, _rows())], 6 * 16, Keeping(8, 1.0, 7), folder)
        teacher = open_cached_teacher(folder, size)
    return partial(distill, options=DistillLoss(**case.options), teacher=teacher)


def _parts(case: Case, folder: Path) -> tuple[Any, list[Any], Any]:
    """The model, its batches as they leave the host, and the loss."""
    torch.manual_seed(0)
    model = new_model(case.loss, case.beginning)
    add_future_heads(model, case.future)
    batches = case.make() if case.make is not None else new_batches(case.loss, model)
    return model, batches, _loss(case, folder)


def test_every_loss_has_a_case() -> None:
    assert {case.loss for case in CASES.values()} == set(LOSSES)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_asked_of_the_device_within_a_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the one reading of all sums, which is counted by itself; the batches' counts are the host's own."""
    case = CASES[name]
    model, batches, loss = _parts(case, tmp_path)
    setup = make_setup(
        model,
        [_laid_out(batch) for batch in batches],
        loss=loss,
        measure=load_measure(LossConfig(case.loss, case.options)) if case.teacher is None else None,
        accumulate=2,
    )
    n_read = 0
    read = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal n_read
        n_read += 1
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with _Waits() as waits:
        train_step(setup, TrainState())
    assert waits.found == []
    assert n_read == 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_batch_without_a_layout_is_asked(tiny_model: Make) -> None:
    """The test above can fail."""
    setup = make_setup(tiny_model(), [make_batch(2)])
    with _Waits() as waits:
        train_step(setup, TrainState())
    assert {"aten.nonzero.default", "aten._local_scalar_dense.default"} <= set(waits.found)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", CASES)
def test_a_layout_changes_no_loss(name: str, tmp_path: Path) -> None:
    model, (batch, *_), loss = _parts(CASES[name], tmp_path)
    if CASES[name].loss == "kto":
        batch = replace(batch, measured={"kl": 0.1})
    model.eval()
    terms = [loss(model, each)[0] for each in (batch, _laid_out(batch))]
    for key, (total, _) in terms[0].items():
        torch.testing.assert_close(terms[1][key][0], total)


def test_sequences_that_leave_the_host_say_how_long_they_are() -> None:
    batch = make_examples(random_sequences(8), k=2)
    moved = batch.to("meta")
    ends = [int(batch.rows.positions.flatten()[place]) for place in batch.last]
    assert moved.longest == batch.longest == max(ends) + 1
    pairs = make_pairs_of_text(3)
    assert pairs.to("meta").places.shape == (pairs.n_targets,)
    assert torch.equal(pairs.laid_out().places, target_places(pairs.targets))


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
