"""The loop against an independent plain loop; what does not change the result; what must stop it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.training.conftest import ListLoader, make_batch

from kajiya.config.schema import LossConfig, OptimConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.errors import TrainingError
from kajiya.training.fit import Hook, Setup, fit, pieces_at, train_step
from kajiya.training.losses import load_loss
from kajiya.training.memory import largest_micro_batch
from kajiya.training.optimizers import load_optimizer
from kajiya.training.precision import resolve_precision
from kajiya.training.probe import measure_steps
from kajiya.training.state import TrainState
from kajiya.training.strategy import SingleProcess
from kajiya.training.terms import drain_window

Make = Callable[..., torch.nn.Module]
CPU = torch.device("cpu")


def make_setup(
    model: torch.nn.Module,
    batches: list[Batch],
    *,
    accumulate: int = 1,
    optim: str = "adamw",
    precision: str = "fp32",
    **more: Any,
) -> Setup:
    chosen = resolve_precision(precision, CPU)
    strategy = SingleProcess(CPU, chosen)
    model = strategy.prepare(model)
    settings: dict[str, Any] = {
        "model": model,
        "loss": load_loss(LossConfig(options={"chunk_tokens": 7})),
        "loader": ListLoader(batches),
        "optimizer": load_optimizer(OptimConfig(name=optim, weight_decay=0.0), model),
        "strategy": strategy,
        "precision": chosen,
        "lr": lambda step: 1e-2,
        "steps": 5,
        "accumulate": accumulate,
        "clip_norm": 1.0,
        "max_skipped": 2,
    }
    return Setup(**{**settings, **more})


def _plain_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Independent of the project's attention and loss: an explicit additive mask, whole logits, torch's cross-entropy."""
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    allowed = same & torch.ones_like(same).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))[:, None]
    model.set_attn_implementation("eager")
    logits = model(input_ids=batch.tokens, position_ids=batch.positions, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")


def test_fifty_steps_equal_a_plain_loop(tiny_model: Make) -> None:
    batches = [make_batch(2, seed=seed) for seed in range(6)]
    losses: list[float] = []
    log = Hook("log", 1, lambda report: losses.append(drain_window(report.state)["train/nll"]))
    fit(make_setup(tiny_model(), batches, steps=50), TrainState(), [log], lambda: False)

    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    expected = []
    for step in range(50):
        batch = batches[step % 6]
        loss = _plain_loss(model, batch) / batch.n_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=2e-3)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_one_by_eight_equals_eight_by_one(optim: str, tiny_model: Make) -> None:
    """Micro-batches with very different numbers of targets: a mean of means would show."""
    rows = [make_batch(1, seed=seed, keep=0.1 if seed % 2 else 1.0) for seed in range(8)]
    together = Batch(
        *(torch.cat([getattr(row, name) for row in rows]) for name in ("tokens", "targets", "positions", "segments")),
        n_targets=sum(row.n_targets for row in rows),
    )
    grads = []
    for batches, accumulate in (([together], 1), (rows, 8)):
        setup = make_setup(tiny_model(), batches, accumulate=accumulate, optim=optim, clip_norm=None)
        captured: list[torch.Tensor] = []
        step = setup.optimizer.step
        setup.optimizer.step = lambda lr, setup=setup, captured=captured: captured.extend(  # type: ignore[method-assign]
            g.clone() for g in setup.optimizer.grads()
        )
        train_step(setup, TrainState())
        assert step is not None
        grads.append(captured)
    assert len(grads[0]) > 10
    for one, eight in zip(*grads, strict=True):
        torch.testing.assert_close(one, eight, atol=1e-6, rtol=1e-4)


def test_many_small_gradients_in_bf16_are_added_up_without_loss(tiny_model: Make) -> None:
    """A sum that is itself in bf16 has stopped growing at 256 equal parts: the norm would be a few times too small."""
    rows = [make_batch(1)] * 512
    norms = []
    for batches, accumulate in ((rows[:1], 1), (rows, 512)):
        setup = make_setup(tiny_model(), batches, accumulate=accumulate, precision="bf16")
        norms.append(train_step(setup, TrainState()))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_mean_of_means_would_have_shown() -> None:
    """The batches of the test above do tell the two apart."""
    rows = [make_batch(1, seed=seed, keep=0.1 if seed % 2 else 1.0) for seed in range(8)]
    counts = [row.n_targets for row in rows]
    assert max(counts) > 3 * min(counts)


def test_a_group_without_targets_is_refused(tiny_model: Make) -> None:
    batch = make_batch(1)
    empty = Batch(batch.tokens, torch.full_like(batch.targets, NO_TARGET), batch.positions, batch.segments, 0)
    with pytest.raises(TrainingError, match="no target"):
        train_step(make_setup(tiny_model(), [empty]), TrainState())


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_then_stops(tiny_model: Make) -> None:
    model = tiny_model()
    setup = make_setup(model, [make_batch(2)], steps=10)
    broken = make_setup(model, [make_batch(2)], steps=10, loss=lambda m, b: _times_nan(setup.loss(m, b)))
    before = [parameter.clone() for parameter in model.parameters()]
    state = TrainState()
    for expected in (1, 2):
        train_step(broken, state)
        assert state.skipped == expected
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite, and optim\.max_skipped=2 such steps"):
        train_step(broken, state)


def _times_nan(result: Any) -> Any:
    terms, metrics = result
    return {name: (total * float("nan"), count) for name, (total, count) in terms.items()}, metrics


def test_hooks_run_when_they_say_and_at_the_end(tiny_model: Make) -> None:
    seen: list[tuple[str, int]] = []
    hooks = [
        Hook("third", 3, lambda report: seen.append(("third", report.state.step))),
        Hook("no end", 4, lambda report: seen.append(("no end", report.state.step)), at_end=False),
    ]
    fit(make_setup(tiny_model(), [make_batch(1)], steps=7), TrainState(), hooks, lambda: False)
    assert seen == [("third", 3), ("no end", 4), ("third", 6), ("third", 7)]


def test_a_wish_to_stop_is_heard_after_a_whole_step(tiny_model: Make) -> None:
    state = TrainState()
    fit(make_setup(tiny_model(), [make_batch(1)], steps=7), state, [], lambda: state.step >= 3)
    assert state.step == 3


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_measuring_leaves_no_trace(optim: str, precision: str, tiny_model: Make) -> None:
    setup = make_setup(tiny_model(), [make_batch(2, seed=s) for s in range(3)], optim=optim, precision=precision)
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    generator = torch.get_rng_state()
    cost = measure_steps(setup)
    assert cost.step_seconds > 0
    assert cost.measured_steps >= 3
    assert setup.loader.state() == {"index": 0}
    assert torch.equal(generator, torch.get_rng_state())
    for name, tensor in setup.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    fresh = make_setup(tiny_model(), [make_batch(2, seed=s) for s in range(3)], optim=optim, precision=precision)
    for each in (setup, fresh):
        fit(each, TrainState(), [], lambda: False)
    for a, b in zip(setup.model.parameters(), fresh.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_measuring_leaves_it_to_the_run_to_judge_a_loss_that_is_not_finite(tiny_model: Make) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], max_skipped=0)
    inner = setup.loss

    def broken(model: Any, batch: Any) -> Any:
        terms, metrics = inner(model, batch)
        return {name: (total * float("nan"), count) for name, (total, count) in terms.items()}, metrics

    setup = replace(setup, loss=broken)
    assert measure_steps(setup).measured_steps >= 3
    assert largest_micro_batch(setup, lambda _rows: None, 1) == 1
    with pytest.raises(TrainingError, match="step 1: the loss is not finite"):
        train_step(setup, TrainState())


def test_rows_grow_and_lose_no_token(tiny_model: Make) -> None:
    assert [pieces_at((0.25, 0.5), progress) for progress in (0.0, 0.24, 0.25, 0.49, 0.5, 0.99)] == [4, 4, 2, 2, 1, 1]
    batch = make_batch(3, tokens=16)
    seen: list[Batch] = []
    inner = make_setup(tiny_model(), [batch]).loss

    def loss(model: Any, given: Batch) -> Any:
        seen.append(given)
        return inner(model, given)

    fit(make_setup(tiny_model(), [batch], steps=4, loss=loss, row_growth=(0.25, 0.5)), TrainState(), [], lambda: False)
    assert [tuple(each.tokens.shape) for each in seen] == [(12, 4), (6, 8), (3, 16), (3, 16)]
    for each in seen:
        assert torch.equal(each.tokens.reshape(3, 16), batch.tokens)
        assert torch.equal(each.targets.reshape(3, 16), batch.targets)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_a_cut_batch_keeps_to_the_rules_of_a_batch(pieces: int) -> None:
    batch = make_batch(5, tokens=16)
    cut = batch.cut(pieces)
    for row in range(cut.tokens.shape[0]):
        segments, positions = cut.segments[row].tolist(), cut.positions[row].tolist()
        assert segments[0] == positions[0] == 0
        for before, after, position_before, position in zip(
            segments, segments[1:], positions, positions[1:], strict=False
        ):
            assert after in (before, before + 1)
            assert position == (position_before + 1 if after == before else 0)


def test_the_plan_measures_each_length_of_row(tiny_model: Make) -> None:
    seen: list[int] = []
    inner = make_setup(tiny_model(), [make_batch(2, tokens=16)]).loss

    def loss(model: Any, given: Batch) -> Any:
        seen.append(given.tokens.shape[1])
        return inner(model, given)

    setup = make_setup(tiny_model(), [make_batch(2, tokens=16)], steps=1, loss=loss, row_growth=(0.25, 0.5))
    cost = measure_steps(setup)
    assert sorted(set(seen)) == [4, 8, 16]
    assert min(seen.count(length) for length in (4, 8, 16)) >= 4
    assert cost.measured_steps == len(seen) - 3


def test_a_term_that_counts_something_else_is_refused(tiny_model: Make) -> None:
    inner = make_setup(tiny_model(), [make_batch(2)]).loss

    def counted(unit: int | str) -> Any:
        return lambda model, given: ({"loss": (inner(model, given)[0]["loss"][0], unit)}, {})

    for wrong, words in ((make_batch(2).n_targets + 1, "the batch has"), ("sentences", "the batch counts targets")):
        loss = counted(wrong)
        with pytest.raises(TrainingError, match=words):
            train_step(make_setup(tiny_model(), [make_batch(2)], loss=loss), TrainState())


def test_each_term_is_divided_by_its_own_count(tiny_model: Make) -> None:
    """A batch that counts rows too: the second term's gradient is its sum over the rows of the whole group."""

    @dataclass(frozen=True)
    class Rows:
        inner: Batch

        @property
        def n_targets(self) -> int:
            return self.inner.n_targets

        @property
        def n_tokens(self) -> int:
            return self.inner.n_tokens

        @property
        def counts(self) -> dict[str, int]:
            return {"targets": self.inner.n_targets, "norm": self.inner.tokens.shape[0]}

        def to(self, device: torch.device) -> "Rows":
            return self

    def loss(model: Any, given: Rows) -> Any:
        weight = model.get_output_embeddings().weight
        return {"norm": (weight.sum() * given.counts["norm"], given.counts["norm"])}, {}

    model = tiny_model()
    setup = make_setup(model, [Rows(make_batch(1)), Rows(make_batch(3))], accumulate=2, loss=loss, clip_norm=None)  # type: ignore[list-item]
    captured: list[torch.Tensor] = []
    setup.optimizer.step = lambda lr: captured.extend(g.clone() for g in setup.optimizer.grads())  # type: ignore[method-assign]
    train_step(setup, TrainState())
    assert len(captured) == 1
    torch.testing.assert_close(captured[0], torch.ones_like(captured[0]))


def test_a_step_that_is_skipped_leaves_its_metrics_out(tiny_model: Make) -> None:
    setup = make_setup(tiny_model(), [make_batch(2)], steps=10)
    broken = make_setup(tiny_model(), [make_batch(2)], steps=10, loss=lambda m, b: _times_nan(setup.loss(m, b)))
    state = TrainState()
    train_step(broken, state)
    assert drain_window(state) == {}
