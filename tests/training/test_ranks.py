"""Two processes over gloo: loss, gradients and weights are those of one; the flow under torchrun; what only the first writes."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import small_overrides
from tests.training.conftest import ListLoader, make_batch
from tests.training.test_fit import make_setup

from kajiya.errors import ConfigError
from kajiya.models.attention import register_packed_sdpa
from kajiya.run.events import read_events
from kajiya.run.folder import find_run
from kajiya.run.store import Store
from kajiya.training.fit import Hook, fit
from kajiya.training.portions import share_out
from kajiya.training.precision import resolve_precision
from kajiya.training.ranks import Ranks, find_ranks, join, leave
from kajiya.training.state import TrainState
from kajiya.training.strategy import DataParallel
from kajiya.training.terms import drain_window

Make = Callable[..., torch.nn.Module]
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


def _one_of_two(rank: int, folder: str, precision: str, model: torch.nn.Module) -> None:
    """Runs in a process of its own: micro-batches rank, rank + 2, … of the same list."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    torch.set_num_threads(1)
    register_packed_sdpa()
    ranks = find_ranks("ddp")
    cpu = torch.device("cpu")
    join(ranks, cpu)
    chosen = resolve_precision(precision, cpu)
    strategy = DataParallel(cpu, chosen, ranks)
    setup = make_setup(
        strategy.prepare(copy.deepcopy(model)),  # what comes from the parent is memory that both share
        [],
        precision=precision,
        strategy=strategy,
        loader=ListLoader(BATCHES[rank::2]),
        accumulate=2,
        steps=STEPS,
    )
    state = TrainState()
    losses, norms = _train(setup, state)
    weights = {name: tensor.detach().tolist() for name, tensor in setup.model.named_parameters()}
    facts = {"losses": losses, "norms": norms, "weights": weights, "tokens": state.tokens, "targets": state.targets}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(facts))
    leave()


@pytest.mark.parametrize(
    ("precision", "tolerance", "apart_at_most"),
    [("fp32", 1e-5, 0.01), pytest.param("bf16", 5e-3, 0.1, marks=pytest.mark.slow)],
)
def test_two_ranks_equal_one(
    precision: str, tolerance: float, apart_at_most: float, tiny_model: Make, tmp_path: Path
) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), precision, tiny_model()), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second, "every rank sees the same sums and holds the same weights"

    alone = make_setup(tiny_model(), BATCHES, precision=precision, accumulate=4, steps=STEPS)
    state = TrainState()
    losses, norms = _train(alone, state)
    assert first["losses"] == pytest.approx(losses, rel=tolerance)
    assert first["norms"] == pytest.approx(norms, rel=2 * tolerance)
    assert (first["tokens"], first["targets"]) == (state.tokens, state.targets)
    start = dict(tiny_model().named_parameters())
    for name, tensor in alone.model.named_parameters():
        moved = (tensor.detach().float() - start[name].detach()).norm()
        apart = (torch.tensor(first["weights"][name]) - tensor.detach().float()).norm()
        assert float(apart) <= apart_at_most * float(moved) + 1e-7, name


def test_the_place_is_read_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert find_ranks("auto") == find_ranks("single") == Ranks()
    with pytest.raises(ConfigError, match="torchrun"):
        find_ranks("ddp")
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert find_ranks("auto") == find_ranks("ddp") == Ranks(3, 4, 1)
    with pytest.raises(ConfigError, match="single"):
        find_ranks("single")


@pytest.mark.parametrize(
    ("rows", "micro", "n", "expected"), [(8, 8, 1, (8, 1)), (8, 8, 2, (4, 1)), (24, 8, 2, (6, 2)), (12, 5, 3, (4, 1))]
)
def test_rows_are_shared_out(rows: int, micro: int, n: int, expected: tuple[int, int]) -> None:
    portions = share_out(rows, micro, n)
    assert (portions.micro_batch, portions.accumulate) == expected
    assert portions.batch_rows == rows


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"9 rows.*2 processes"):
        share_out(9, 4, 2)


def _kajiya(store: Path, *before: str) -> Path:
    overrides = small_overrides("train.steps=6", "eval.samples=0", "train.compile=off")
    command = [*before, "-m", "kajiya", "train", "stdlib-pretrain", *overrides, "--store", str(store)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run:") == 1, "one process speaks"
    return find_run(Store(store), "latest").folder


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """The same recipe in one process and in two: the same losses, one set of events, one model."""
    alone = _kajiya(tmp_path / "alone", sys.executable)
    both = _kajiya(tmp_path / "both", sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    curves = [
        {
            e["step"]: e["values"]["train/nll"]
            for e in read_events(f)
            if e["kind"] == "metrics" and "train/nll" in e["values"]
        }
        for f in (alone, both)
    ]
    assert curves[0].keys() == curves[1].keys()
    for step, loss in curves[0].items():
        assert curves[1][step] == pytest.approx(loss, rel=1e-3)
    assert sum(event["kind"] == "opened" for event in read_events(both)) == 1
