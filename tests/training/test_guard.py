"""Steps that go wrong: not finite, a leap of the loss, no memory; what is kept of them, and what a run does then."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.training.conftest import make_batch
from tests.training.test_fit import make_setup

from kajiya.data.batch import Batch
from kajiya.errors import TrainingError
from kajiya.flows.fitting import shrinker
from kajiya.models.quantized import plain_tensors, quantize
from kajiya.training.fit import fit, train_step
from kajiya.training.guard import Guard, find_spike
from kajiya.training.loss_scale import LossScale
from kajiya.training.movement import Movement, changed, checksums
from kajiya.training.portions import Portions
from kajiya.training.state import TrainState

Make = Callable[..., torch.nn.Module]


def _times(factor: float, inner: Any) -> Any:
    def loss(model: Any, batch: Any) -> Any:
        terms, metrics = inner(model, batch)
        return {name: (total * factor, count) for name, (total, count) in terms.items()}, metrics

    return loss


def test_the_batches_of_the_step_that_stops_a_run_are_kept(tiny_model: Make, tmp_path: Path) -> None:
    batches = [make_batch(2, seed=seed) for seed in range(2)]
    heard: list[str] = []
    setup = make_setup(tiny_model(), batches, accumulate=2, max_skipped=1)
    setup = replace(
        setup, guard=Guard(faults=tmp_path / "faults", tell=heard.append), loss=_times(float("inf"), setup.loss)
    )
    state = TrainState()
    train_step(setup, state)
    assert heard == ["step 1: the loss is not finite; skipped (1 of 1 that are let pass)"]
    with pytest.raises(TrainingError, match=r"loss is not finite.*faults/step-00000002"):
        train_step(setup, state)
    kept = load_file(tmp_path / "faults" / "step-00000002" / "batch.safetensors")
    for number, batch in enumerate(batches):
        for name in ("tokens", "targets", "positions", "segments"):
            assert torch.equal(kept[f"{number}/{name}"], getattr(batch, name))


def test_a_spike_is_told_from_the_noise() -> None:
    guard, state = Guard(spike_sigmas=6.0), TrainState()
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    losses = [8 * 0.99**step + 3 + 0.1 * float(noise[step]) for step in range(400)]
    assert not any(find_spike(guard, state, loss) for loss in losses)
    before = list(state.trend)
    assert find_spike(guard, state, 6.0)
    assert state.trend == before, "a spike is no part of the trend"
    assert not find_spike(Guard(), state, 100.0)


def test_a_level_that_lasts_is_no_spike_for_ever() -> None:
    heard: list[str] = []
    guard, state = Guard(spike_sigmas=6.0, tell=heard.append), TrainState()
    noise = [0.01 * (-1) ** step for step in range(200)]
    assert not any(find_spike(guard, state, 3.0 + each) for each in noise)
    found = [find_spike(guard, state, 3.6 + each) for each in noise]
    assert found == [True] * 4 + [False] * 196
    assert len(heard) == 1
    assert "3.6" in heard[0]
    assert find_spike(guard, state, 9.0)
    assert state.trend[0] == pytest.approx(3.6, abs=0.02)


@pytest.mark.parametrize("what", ["tell", "skip", "rollback"])
def test_what_a_spike_does(what: str, tiny_model: Make) -> None:
    heard: list[str] = []
    went_back: list[int] = []

    def rollback(state: TrainState) -> bool:
        went_back.append(state.step)
        return True

    guard = Guard(tell=heard.append, spike_sigmas=8.0, on_spike=what, rollback=rollback)
    setup = make_setup(tiny_model(), [make_batch(2)], guard=guard)
    state = TrainState(trend=[1.0, 0.0001, 100.0])  # any loss of this model is far above
    before = [parameter.detach().clone() for parameter in setup.model.parameters()]
    train_step(setup, state)
    is_same = all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))
    assert is_same == (what != "tell")
    assert state.spikes == (what != "tell")
    assert went_back == ([1] if what == "rollback" else [])
    assert len(heard) == 1
    assert "leapt" in heard[0]
    assert state.step == 1


def test_too_many_spikes_stop_the_run(tiny_model: Make, tmp_path: Path) -> None:
    guard = Guard(faults=tmp_path, spike_sigmas=8.0, on_spike="skip")
    setup = make_setup(tiny_model(), [make_batch(2)], guard=guard, max_skipped=1)
    state = TrainState(trend=[1.0, 0.0001, 100.0])
    train_step(setup, state)
    with pytest.raises(
        TrainingError, match=r"leapt to .*, and optim\.max_skipped=1 such steps were left out before it"
    ):
        train_step(setup, state)
    assert (tmp_path / "step-00000002" / "step.json").is_file()


# ---------------------------------------------------------------- fp16


def test_the_loss_scale_follows_its_rule() -> None:
    scale = LossScale(True)
    assert scale.overflowed()
    assert scale.factor == 32_768
    for _ in range(2000):
        scale.stepped()
    assert scale.factor == 65_536
    other = LossScale(True)
    other.load_state(scale.state())
    assert other.state() == scale.state()
    for _ in range(16):
        assert scale.overflowed()
    assert not scale.overflowed(), "at 1, the scale is no longer the reason"
    assert not LossScale(False).overflowed()


def test_an_overflow_in_fp16_lowers_the_scale_and_is_no_skipped_step(tiny_model: Make) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], precision="fp16-mixed", max_skipped=0, steps=6)
    overflowing = replace(setup, loss=_times(1e6, setup.loss))
    state = TrainState()
    for _ in range(2):
        train_step(overflowing, state)
    assert (state.overflows, state.skipped) == (2, 0)
    assert setup.strategy.state()["factor"] == 16_384


def test_a_loss_that_is_not_finite_is_no_fault_of_the_scale(tiny_model: Make) -> None:
    heard: list[str] = []
    setup = make_setup(
        tiny_model(), [make_batch(2)], precision="fp16-mixed", max_skipped=5, steps=6, guard=Guard(tell=heard.append)
    )
    state = TrainState()
    train_step(replace(setup, loss=_times(float("nan"), setup.loss)), state)
    assert (state.overflows, state.skipped) == (0, 1)
    assert setup.strategy.state()["factor"] == 65_536
    assert "the loss is not finite" in heard[0]
    assert not setup.optimizer.grads()


def test_fp16_learns_what_fp32_learns(tiny_model: Make) -> None:
    norms = []
    for precision in ("fp32", "fp16-mixed"):
        setup = make_setup(tiny_model(), [make_batch(2)], precision=precision, steps=3)
        norms.append([train_step(setup, TrainState()) for _ in range(3)])
    assert norms[1] == pytest.approx(norms[0], rel=2e-2)


# ---------------------------------------------------------------- memory


class RowLoader:
    """Rows of one batch, `batch` at a time; the position is a row."""

    def __init__(self, rows: Batch, batch: int) -> None:
        self.rows, self.batch, self.row = rows, batch, 0

    def next(self) -> Batch:
        part = slice(self.row, self.row + self.batch)
        self.row = (self.row + self.batch) % len(self.rows.tokens)
        targets = self.rows.targets[part]
        return Batch(
            self.rows.tokens[part],
            targets,
            self.rows.positions[part],
            self.rows.segments[part],
            int((targets >= 0).sum()),
        )

    def heaviest(self) -> Batch:
        return self.next()

    def state(self) -> dict[str, int]:
        return {"row": self.row}

    def load_state(self, state: dict[str, int]) -> None:
        self.row = state["row"]

    def shrink(self, times: int) -> int:
        if 4 % 2**times:
            return 0
        self.batch = 4 >> times
        return 2**times


def _with_memory_for(rows: int, inner: Any) -> Any:
    def loss(model: Any, batch: Any) -> Any:
        if len(batch.tokens) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more words")
        return inner(model, batch)

    return loss


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(tiny_model: Make) -> None:
    """As though the GPU had room for one row: the step has the rows, the order and the result that it would have had."""
    rows = make_batch(8, seed=3)
    whole = make_setup(tiny_model(), [], loader=RowLoader(rows, 4), accumulate=2, steps=3)
    plain = TrainState()
    fit(whole, plain, [], lambda: False)

    heard: list[str] = []
    loader = RowLoader(rows, 4)
    setup = make_setup(
        tiny_model(), [], loader=loader, accumulate=2, steps=3, guard=Guard(tell=heard.append, shrink=loader.shrink)
    )
    setup = replace(setup, loss=_with_memory_for(1, setup.loss))
    state = TrainState()
    fit(setup, state, [], lambda: False)
    assert (state.halvings, loader.batch, len(heard)) == (2, 1, 2)
    assert "8 in a step" in heard[1]
    assert (state.tokens, state.targets, state.step) == (plain.tokens, plain.targets, plain.step)
    for a, b in zip(whole.model.parameters(), setup.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    with pytest.raises(TrainingError, match="cannot be made smaller"):
        train_step(replace(setup, loss=_with_memory_for(0, setup.loss)), state)


def test_what_the_failed_passes_held_is_free_when_they_are_tried_again(tiny_model: Make) -> None:
    """An error's frames hold the activations; the collector of garbage is off, as where the loop is timed."""
    held: list[weakref.ref[torch.Tensor]] = []
    setup = make_setup(tiny_model(), [make_batch(2)])

    def loss(model: Any, batch: Any) -> Any:
        terms, metrics = setup.loss(model, batch)
        if not held:
            held.append(weakref.ref(terms["loss"][0]))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None
        return terms, metrics

    gc.disable()
    try:
        train_step(replace(setup, loss=loss, guard=Guard(shrink=lambda _times: 1)), state := TrainState())
    finally:
        gc.enable()
    assert (state.halvings, state.step) == (1, 1)


def test_no_memory_for_the_update_is_told_as_that(tiny_model: Make) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)])

    def step(_lr: float) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    setup.optimizer.step = step  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"step 1: out of memory in the update.*\n.*optim\.offload=true"):
        train_step(setup, TrainState())


def test_a_micro_batch_of_odd_size_becomes_its_next_smaller_divisor() -> None:
    loader = SimpleNamespace(batch=15)
    shrink = shrinker(loader, Portions(micro_batch=15, accumulate=2))
    assert [(shrink(times), loader.batch) for times in range(4)] == [(1, 15), (3, 5), (15, 1), (0, 1)]


# ---------------------------------------------------------------- what moves


def test_everything_moves_and_the_frozen_stays(tiny_model: Make) -> None:
    model = tiny_model(zero_outputs=True)
    model.get_input_embeddings().weight.requires_grad_(False)  # type: ignore[operator,union-attr]
    setup = make_setup(model, [make_batch(2)])
    state, heard = TrainState(), list[str]()
    movement = Movement(setup.model, setup.optimizer, state)
    for _ in range(3):
        train_step(setup, state)
        movement.check(state, heard.append)
    assert heard == []


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_weight_in_few_bits_has_a_checksum(kind: str, tiny_model: Make) -> None:
    model: Any = quantize(tiny_model(ffn_size=64), kind)
    parameters = dict(model.named_parameters())
    before = checksums(parameters)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        plain_tensors(weight.data)[0].view(-1)[0] ^= 1
    assert changed(before, checksums(parameters)) == ["model.layers.0.self_attn.q_proj.weight"]


def test_a_tensor_that_stays_is_told_and_a_frozen_one_that_moves_stops_the_run(tiny_model: Make) -> None:
    model = tiny_model()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    model.model.norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    setup = make_setup(model, [make_batch(2)])
    state, heard = TrainState(), list[str]()
    movement, second = (Movement(setup.model, setup.optimizer, state) for _ in range(2))
    for _ in range(3):
        train_step(setup, state)
    movement.check(state, heard.append)
    assert len(heard) == 1
    assert "did not move in 3 updates: unused" in heard[0]
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3  # type: ignore[union-attr,index]
    with pytest.raises(TrainingError, match=r"1 frozen.*model\.norm\.weight"):
        second.check(state, heard.append)
