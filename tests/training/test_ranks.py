"""Two processes over gloo: loss, gradients and weights are those of one; the flow under torchrun; what only the first writes."""

import copy
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import small_overrides
from tests.training.conftest import ListLoader, make_batch
from tests.training.test_fit import make_setup

from kajiya.config.schema import LossConfig
from kajiya.errors import ConfigError
from kajiya.models.attention import register_packed_sdpa
from kajiya.run.events import read_events
from kajiya.run.folder import find_run
from kajiya.run.hashing import hash_file
from kajiya.run.store import Store
from kajiya.training.checkpoint import list_checkpoints, load_checkpoint, ranks_behind, take_snapshot, write_snapshot
from kajiya.training.fit import Hook, Setup, fit
from kajiya.training.generators import gather_generators
from kajiya.training.losses import load_loss
from kajiya.training.portions import share_out
from kajiya.training.precision import resolve_precision
from kajiya.training.ranks import Ranks, find_ranks, join, leave, wait_for_all
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


def _join_as(rank: int, folder: str) -> Ranks:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    torch.set_num_threads(1)
    register_packed_sdpa()
    ranks = find_ranks("ddp")
    join(ranks, torch.device("cpu"))
    return ranks


def _one_of_two(rank: int, folder: str, precision: str, model: torch.nn.Module) -> None:
    """Runs in a process of its own: micro-batches rank, rank + 2, … of the same list."""
    ranks = _join_as(rank, folder)
    cpu = torch.device("cpu")
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


def _free_port(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))


@pytest.mark.parametrize(
    ("precision", "tolerance", "apart_at_most"),
    [("fp32", 1e-5, 0.01), pytest.param("bf16", 5e-3, 0.1, marks=pytest.mark.slow)],
)
def test_two_ranks_equal_one(
    precision: str, tolerance: float, apart_at_most: float, tiny_model: Make, tmp_path: Path
) -> None:
    _free_port(tmp_path)
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


# ---------------------------------------------------------------- resume


def _noisy(ranks: Ranks, model: torch.nn.Module, steps: int) -> Setup:
    """Training with noise on the embeddings, other numbers on each rank."""
    cpu = torch.device("cpu")
    strategy = DataParallel(cpu, resolve_precision("fp32", cpu), ranks)
    return make_setup(
        strategy.prepare(copy.deepcopy(model)),
        [],
        loss=load_loss(LossConfig(options={"neftune_alpha": 20.0})),
        strategy=strategy,
        loader=ListLoader(BATCHES[ranks.rank :: 2]),
        steps=steps,
    )


def _resumed_of_two(rank: int, folder: str, model: torch.nn.Module) -> None:
    """Four steps; then two, a checkpoint, other random numbers, and two more. Leaves whether the weights are the same."""
    ranks = _join_as(rank, folder)
    _seed(rank)
    whole = _noisy(ranks, model, 4)
    fit(whole, TrainState(), [], lambda: False)

    _seed(rank)
    half, state = _noisy(ranks, model, 2), TrainState()
    fit(half, state, [], lambda: False)
    generators = gather_generators(ranks)
    if ranks.is_first:
        snapshot = take_snapshot(state, half.model, half.optimizer, half.loader.state(), "key", generators, frozen=None)
        write_snapshot(Path(folder) / "checkpoints", snapshot)
    wait_for_all(ranks)
    (written,) = list_checkpoints(Path(folder) / "checkpoints")
    assert ranks_behind(written) == 2
    same = {}
    for whose, as_rank in (("its own", rank), ("the first's", 0)):
        _seed(99)
        rest = _noisy(ranks, model, 4)
        state, position = load_checkpoint(written, rest.model, rest.optimizer, "key", as_rank)
        rest.loader.load_state(position)
        fit(rest, state, [], lambda: False)
        pairs = zip(whole.model.parameters(), rest.model.parameters(), strict=True)
        same[whose] = all(torch.equal(a, b) for a, b in pairs)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(same))
    leave()


def _seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_each_rank_goes_on_with_its_own_random_numbers(tiny_model: Make, tmp_path: Path) -> None:
    _free_port(tmp_path)
    torch.multiprocessing.spawn(_resumed_of_two, (str(tmp_path), tiny_model()), nprocs=2)
    for rank in range(2):
        same = json.loads((tmp_path / f"{rank}.json").read_text())
        assert same == {"its own": True, "the first's": False}


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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
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
    # The first of the two proves the run.
    proofs = [event["facts"]["findings"] for event in read_events(both) if event["kind"] == "proof"]
    assert [len(findings) for findings in proofs] == [10]
    assert {each["state"] for each in proofs[0]} == {"passed"}
    manifest = json.loads((both / "manifest.json").read_text())
    assert manifest["artifacts"]["proof"]
    noted, total = json.loads((both / "usage" / "rank-1.json").read_text()), manifest["usage"]
    assert noted["cpu_seconds"] > 1
    # The first rank's is a process of its own: it loads torch and takes as many steps.
    assert total["cpu_seconds"] > noted["cpu_seconds"] + 1
    assert total["peak_bytes"] >= noted["peak_bytes"]
    assert total["n_uncounted_ranks"] == 0
    assert not (alone / "usage").exists()


@pytest.mark.slow
def test_a_failed_proof_stops_every_rank(tmp_path: Path) -> None:
    overrides = small_overrides("optim=adamw", "optim.lr=3", "eval.samples=0", "train.compile=off")
    command = [*_TWO, "-m", "kajiya", "train", "stdlib-pretrain", *overrides, "--store", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("error: learning: ") == 1
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))


def _start(store: Path, *before: str) -> subprocess.Popen[bytes]:
    """The recipe with dropout and noise."""
    command = [*before, "-m", "kajiya", "train", "stdlib-pretrain", *small_overrides(*_DROPPING), "--store", str(store)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (store.parent / f"{store.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


_DROPPING = (
    "train.steps=16",
    "eval.samples=0",
    "train.compile=off",
    "model.options.attention_dropout=0.1",
    "train.loss.options.neftune_alpha=5",
)
_TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")


def _events(store: Path) -> list[dict[str, Any]]:
    return [event for log in store.glob("runs/*/events.jsonl") for event in read_events(log.parent)]


@pytest.mark.slow
def test_two_processes_with_dropout_go_on_after_a_kill_bit_for_bit(tmp_path: Path) -> None:
    """One pair is never interrupted; the other is killed, asked to stop, and then finishes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert _start(whole, *_TWO).wait(300) == 0, (tmp_path / "whole.log").read_text()
    for step, how in ((10, signal.SIGKILL), (14, signal.SIGTERM)):  # a save waits for the one before it
        process = _start(broken, *_TWO)
        while not any(event["kind"] == "metrics" and event["step"] >= step for event in _events(broken)):
            assert process.poll() is None, (tmp_path / "broken.log").read_text()
            time.sleep(0.005)
        # torchrun passes SIGTERM on to its workers; they outlive its own death.
        workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(workers) == 2
        for pid in [process.pid, *(workers if how == signal.SIGKILL else ())]:
            os.kill(pid, how)
        process.wait(300)
        for pid in workers:
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.01)
    assert _start(broken, *_TWO).wait(300) == 0, (tmp_path / "broken.log").read_text()
    resumed = [event["resumed_from"] for event in _events(broken) if event["kind"] == "started"]
    assert len(resumed) == 3
    assert all(resumed[1:])
    digests = []
    for store in (whole, broken):
        run = find_run(Store(store), "latest")
        assert run.manifest()["status"] == "finished"
        digests.append(hash_file(store / run.manifest()["artifacts"]["model"]["path"] / "model.safetensors"))
    assert digests[0] == digests[1]
