"""Reading ahead changes no batch, no state and no error; the waiting is measured."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.data.test_loader import loader_of, split_of

from kajiya.data.batch import Batch, ExampleBatch, pinned
from kajiya.data.loader import Loader


@pytest.fixture
def loader() -> Loader:
    return loader_of(split_of([50] * 40, 333), row_tokens=16, rows=4, seed=1)


class Noting(Loader):
    """Notes what is made, and in which thread."""

    def _make(self, row: int, n: int) -> Any:
        self.made.append((row, n, threading.current_thread() is threading.main_thread()))
        if len(self.made) == 3:
            self.third.set()
        if row == self.bad:
            raise OSError("the disk is gone")
        return super()._make(row, n)


def noting(loader: Loader, bad: int = -1) -> Noting:
    found = Noting(loader.rows, loader.order, batch=4)
    found.made, found.third, found.bad = [], threading.Event(), bad
    return found


def test_batches_are_made_before_they_are_asked_for_in_another_thread(loader: Loader) -> None:
    ahead = noting(loader)
    ahead.next()
    assert ahead.third.wait(timeout=30)
    assert ahead.made == [(0, 4, False), (4, 4, False), (8, 4, False)]
    assert ahead.state()["row"] == 4
    assert ahead.waited_s > 0


def test_batches_are_those_made_without_reading_ahead(loader: Loader) -> None:
    for number in range(30):
        assert torch.equal(loader.next().tokens, loader.at(4 * number).tokens)


def test_another_position_or_size_forgets_what_was_read_ahead(loader: Loader) -> None:
    first = [loader.next().tokens for _ in range(3)]
    state = loader.state()
    loader.next()
    loader.load_state(state | {"row": 0})
    assert all(torch.equal(loader.next().tokens, each) for each in first)
    loader.batch = 2
    assert torch.equal(torch.cat([loader.next().tokens, loader.next().tokens]), loader_at(loader, 12, 4))


def loader_at(loader: Loader, row: int, n: int) -> torch.Tensor:
    tokens: torch.Tensor = loader._make(row, n).tokens
    return tokens


def test_an_error_while_reading_ahead_reaches_the_step(loader: Loader) -> None:
    ahead = noting(loader, bad=4)
    ahead.next()
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.next()


def test_what_a_loss_looks_up_is_added_in_the_thread_that_reads_ahead(loader: Loader) -> None:
    in_main: list[bool] = []

    def enrich(batch: Batch) -> Batch:
        in_main.append(threading.current_thread() is threading.main_thread())
        return replace(batch, future=(1.0,))

    enriched = Loader(loader.rows, loader.order, batch=4, enrich=enrich)
    assert [enriched.next().future for _ in range(3)] == [(1.0,)] * 3
    assert in_main[:3] == [False] * 3
    assert enriched.at(0).future == enriched.heaviest().future == (1.0,)


def test_every_tensor_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the locking itself is left out; tests/data/test_gpu.py has it."""
    locked: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: locked.append(tensor) or tensor)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    part = torch.arange(6).reshape(2, 3)
    rows = Batch(part, part + 1, part + 2, part + 3, 4, sources=part + 4)
    inner = ExampleBatch(rows, part + 5, part[0], part[0] + 7)
    batch = replace(inner, mismatched=inner, measured={"kl": 0.5})
    made = pinned(batch, torch.device("cuda"))
    assert len(locked) == 2 * (5 + 3)
    assert torch.equal(made.mismatched.rows.segments, part + 3)
    assert (made.rows.n_targets, made.measured, made.labels) == (4, {"kl": 0.5}, None)
