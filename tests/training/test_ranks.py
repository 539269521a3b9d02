"""Two processes over gloo: loss, gradients and weights are those of one, where one of them runs out of memory too."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.conftest import ListLoader, make_batch, make_model
from tests.training.test_fit import make_setup
from tests.training.test_guard import RowLoader
from tests.training.two_ranks import as_two

from kajiya.config.schema import LossConfig
from kajiya.data.batch import Batch
from kajiya.flows.fitting import shrinker
from kajiya.training.checkpoint import list_checkpoints, load_checkpoint, ranks_behind, take_snapshot, write_snapshot
from kajiya.training.exchange import Exchange
from kajiya.training.fit import Hook, Setup, fit
from kajiya.training.generators import gather_generators
from kajiya.training.guard import Guard
from kajiya.training.losses import load_loss
from kajiya.training.memory import _largest_on_gpu, largest_micro_batch
from kajiya.training.portions import Portions
from kajiya.training.precision import resolve_precision
from kajiya.training.ranks import Ranks, wait_for_all
from kajiya.training.state import TrainState
from kajiya.training.strategy import DataParallel
from kajiya.training.terms import drain_window

STEPS = 4
BATCHES = [make_batch(2, seed=seed, keep=0.15 if seed % 2 else 1.0) for seed in range(4 * STEPS)]
"""Four micro-batches a step with very different numbers of targets: a mean over ranks would show."""


def _train(setup: object, state: TrainState) -> tuple[list[float], list[float]]:
    losses: list[float] = []
    norms: list[float] = []

    def note(report: object) -> None:
        losses.append(drain_window(report.state)["train/nll"])  # type: ignore[attr-defined]
        norms.append(report.grad_norm)  # type: ignore[attr-defined]

    fit(setup, state, [Hook("note", 1, note)], lambda: False)  # type: ignore[arg-type]
    return losses, norms


def _setup(ranks: Ranks, model: torch.nn.Module, precision: str = "fp32", **more: Any) -> Setup:
    """This rank's half of a run over `BATCHES`: micro-batches rank, rank + 2, … of the same list."""
    cpu = torch.device("cpu")
    strategy = DataParallel(cpu, resolve_precision(precision, cpu), ranks)
    settings: dict[str, Any] = {"loader": ListLoader(BATCHES[ranks.rank :: 2]), "accumulate": 2, "steps": STEPS}
    prepared = strategy.prepare(model)
    return make_setup(prepared, [], precision=precision, strategy=strategy, **{**settings, **more})


def _facts(setup: Setup) -> dict[str, Any]:
    """Train to the end; all that must not depend on the number of ranks."""
    state = TrainState()
    losses, norms = _train(setup, state)
    weights = {name: tensor.detach().tolist() for name, tensor in setup.model.named_parameters()}
    counts = {"tokens": state.tokens, "targets": state.targets, "halvings": state.halvings}
    return {"losses": losses, "norms": norms, "weights": weights} | counts


def _trained(precision: str, ranks: Ranks, _folder: Path) -> dict[str, Any]:
    """The second rank's model begins with other weights, which must not matter."""
    return _facts(_setup(ranks, make_model(seed=ranks.rank), precision))


def _short_of_memory(ranks: Ranks, _folder: Path) -> dict[str, Any]:
    """The second rank has no memory for the backward pass of two rows from its second step on."""
    heard: list[str] = []
    mine = BATCHES[ranks.rank :: 2]
    rows = Batch(
        *(torch.cat([getattr(each, name) for each in mine]) for name in ("tokens", "targets", "positions", "segments")),
        n_targets=sum(each.n_targets for each in mine),
    )
    loader = RowLoader(rows, 2)
    guard = Guard(tell=heard.append, shrink=shrinker(loader, Portions(2, 2, 2)))
    setup = _setup(ranks, make_model(), loader=loader, guard=guard)
    n_passes = 0

    def loss(model: Any, batch: Any) -> Any:
        nonlocal n_passes
        n_passes += 1
        terms, metrics = setup.loss(model, batch)
        if ranks.rank == 1 and n_passes > 2 and len(batch.tokens) > 1:
            terms["loss"][0].register_hook(_no_memory)
        return terms, metrics

    return _facts(replace(setup, loss=loss)) | {"heard": heard, "rows": loader.batch}


def _no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def _searched(ranks: Ranks, _folder: Path) -> dict[str, Any]:
    """A search for the largest micro-batch where the first rank has room for 2 rows in its update, the second for 4 in a pass."""
    asked: list[int] = []
    setup = _setup(ranks, make_model(), loader=ListLoader([make_batch(8)]))
    optimizer = setup.optimizer.optimizers[0]
    update = optimizer.step

    def loss(model: Any, batch: Any) -> Any:
        return _no_memory() if ranks.rank == 1 and asked[-1] > 4 else setup.loss(model, batch)

    def step() -> None:
        if ranks.rank == 0 and asked[-1] > 2:
            # As where there was memory for the first of a parameter's slots.
            optimizer.state[next(iter(setup.optimizer.masters.values()))]["step"] = torch.zeros(())
            _no_memory()
        update()

    optimizer.step = step  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kajiya.training.memory._largest_on_cpu", _largest_on_gpu)
        found = largest_micro_batch(replace(setup, loss=loss), asked.append, 8)
    return {"found": found, "asked": asked, "slots": len(setup.optimizer.state_tensors())}


def _uneven(ranks: Ranks, _folder: Path) -> dict[str, Any]:
    """One step of a model with a tensor that no rank's loss depends on, one that the first's does, and a buffer that counts."""
    model = make_model()
    model.register_parameter("of_none", torch.nn.Parameter(torch.zeros(3)))
    model.register_parameter("of_first", torch.nn.Parameter(torch.zeros(3)))
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("flag", torch.zeros(3, dtype=torch.bool))
    setup = _setup(ranks, model, steps=1)

    def loss(model: Any, batch: Any) -> Any:
        model.count += 1 + ranks.rank
        model.flag |= ranks.is_first
        terms, metrics = setup.loss(model, batch)
        total, count = terms["loss"]
        return {"loss": (total + model.of_first.sum() if ranks.is_first else total, count)}, metrics

    fit(replace(setup, loss=loss), TrainState(), [], lambda: False)
    return {name: getattr(setup.model, name).tolist() for name in ("of_none", "of_first", "count", "flag")}


def _sums(ranks: Ranks, _folder: Path) -> bool:
    """Tensors of all shapes through a buffer of ten numbers; whether the sums are right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kajiya.training.exchange._AT_ONCE", 10)
        shapes = [(3, 7), (2,), (), (25, 1), (4, 4)]
        tensors = [(ranks.rank + 1) * torch.arange(float(math.prod(shape))).reshape(shape) for shape in shapes]
        tensors += [tensors[0].T.contiguous().T, torch.full((40,), float(ranks.rank + 1))[::2]]
        expected = [3 / (ranks.rank + 1) * each for each in tensors]
        Exchange(torch.device("cpu")).add_up(tensors)
    return all(torch.allclose(a, b) for a, b in zip(tensors, expected, strict=True))


def _noisy(ranks: Ranks, steps: int) -> Setup:
    """Training with noise on the embeddings, other numbers on each rank."""
    loss = load_loss(LossConfig(options={"neftune_alpha": 20.0}))
    return _setup(ranks, make_model(), loss=loss, accumulate=1, steps=steps)


def _resumed(ranks: Ranks, folder: Path) -> dict[str, bool]:
    """Four steps; then two, a checkpoint, other random numbers, and two more. Whether the weights are the same."""
    _seed(ranks.rank)
    whole = _noisy(ranks, 4)
    fit(whole, TrainState(), [], lambda: False)

    _seed(ranks.rank)
    half, state = _noisy(ranks, 2), TrainState()
    fit(half, state, [], lambda: False)
    generators = gather_generators(ranks)
    if ranks.is_first:
        snapshot = take_snapshot(state, half.model, half.optimizer, half.loader.state(), "key", generators, frozen=None)
        write_snapshot(folder / "checkpoints", snapshot)
    wait_for_all(ranks)
    (written,) = list_checkpoints(folder / "checkpoints")
    assert ranks_behind(written) == 2
    same = {}
    for whose, as_rank in (("its own", ranks.rank), ("the first's", 0)):
        _seed(99)
        rest = _noisy(ranks, 4)
        state, position = load_checkpoint(written, rest.model, rest.optimizer, "key", as_rank)
        rest.loader.load_state(position)
        fit(rest, state, [], lambda: False)
        pairs = zip(whole.model.parameters(), rest.model.parameters(), strict=True)
        same[whose] = all(torch.equal(a, b) for a, b in pairs)
    return same


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


SCENES: dict[str, Callable[[Ranks, Path], Any]] = {
    "fp32": partial(_trained, "fp32"),
    "bf16": partial(_trained, "bf16"),
    "resumed": _resumed,
    "short of memory": _short_of_memory,
    "searched": _searched,
    "uneven": _uneven,
    "sums": _sums,
}


def _all_scenes(ranks: Ranks, folder: Path) -> dict[str, Any]:
    return {name: scene(ranks, folder) for name, scene in SCENES.items()}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has to say of each scene; to start them takes longer than all scenes."""
    return as_two(_all_scenes, tmp_path_factory.mktemp("ranks"))


def _require_same(found: dict[str, Any], alone: Setup, tolerance: float, apart: float) -> None:
    """The same course, and weights that are apart by no more than that share of their way."""
    expected = _facts(alone)
    # The first step's gradient is a sum that nothing was rounded before.
    assert (found["losses"][0], found["norms"][0]) == pytest.approx(
        (expected["losses"][0], expected["norms"][0]), rel=1e-5
    )
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert found["norms"] == pytest.approx(expected["norms"], rel=10 * tolerance)
    assert (found["tokens"], found["targets"]) == (expected["tokens"], expected["targets"])
    start = dict(make_model().named_parameters())
    for name, tensor in alone.model.named_parameters():
        moved = (tensor.detach().float() - start[name].detach()).norm()
        distance = (torch.tensor(found["weights"][name]) - tensor.detach().float()).norm()
        assert float(distance) <= apart * float(moved), name


@pytest.mark.parametrize(("precision", "tolerance", "apart"), [("fp32", 1e-5, 1e-3), ("bf16", 1e-3, 3e-2)])
def test_two_ranks_equal_one(precision: str, tolerance: float, apart: float, by_two: list[dict[str, Any]]) -> None:
    """Sums are float32 in bf16 too; behind the first update a weight between two numbers of bf16 may have become the other."""
    first, second = (each[precision] for each in by_two)
    assert first == second, "every rank sees the same sums and holds the same weights"
    alone = make_setup(make_model(), BATCHES, precision=precision, accumulate=4, steps=STEPS)
    _require_same(first, alone, tolerance, apart)


def test_each_rank_goes_on_with_its_own_random_numbers(by_two: list[dict[str, Any]]) -> None:
    for each in by_two:
        assert each["resumed"] == {"its own": True, "the first's": False}


def test_where_one_rank_runs_out_of_memory_all_take_smaller_micro_batches(by_two: list[dict[str, Any]]) -> None:
    first, second = (each["short of memory"] for each in by_two)
    assert first == second
    assert (first["halvings"], first["rows"]) == (1, 1)
    assert len(first["heard"]) == 1
    assert "step 2: out of memory; micro-batches are 2 times smaller from here on, 4 in a step" in first["heard"][0]
    _require_same(first, make_setup(make_model(), BATCHES, accumulate=4, steps=STEPS), 1e-5, 1e-3)


def test_the_micro_batch_is_one_that_every_rank_has_room_for(by_two: list[dict[str, Any]]) -> None:
    """One rank fails within the passes, the other in the update: both try the next size together."""
    n_masters = len(dict(make_model().named_parameters()))
    for each in by_two:
        assert each["searched"] == {"found": 2, "asked": [8, 4, 2], "slots": n_masters}


def test_a_tensor_that_only_one_rank_learns_moves_on_all(by_two: list[dict[str, Any]]) -> None:
    first, second = (each["uneven"] for each in by_two)
    assert first == second
    assert first["of_none"] == [0.0] * 3
    assert all(value < 0 for value in first["of_first"])
    assert (first["count"], first["flag"]) == ([2] * 3, [True] * 3), "the first rank's buffers"


def test_sums_of_all_shapes(by_two: list[dict[str, Any]]) -> None:
    assert [each["sums"] for each in by_two] == [True, True]
