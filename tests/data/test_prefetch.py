"""Reading ahead changes no batch, no state and no error; the waiting is measured."""

import threading
from typing import Any

import pytest
import torch
from tests.data.test_loader import loader_of, split_of

from kajiya.data.loader import Loader
from kajiya.data.prefetch import PrefetchingLoader


@pytest.fixture
def split() -> Any:
    return split_of([50] * 40, 333)


def tokens(loader: Any, n: int) -> list[list[list[int]]]:
    return [loader.next().tokens.tolist() for _ in range(n)]


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_batches_and_states_are_those_of_the_loader(split: Any, rank: int, world: int) -> None:
    plain = loader_of(split, row_tokens=16, rows=4, seed=1, rank=rank, world=world)
    ahead = PrefetchingLoader(loader_of(split, row_tokens=16, rows=4, seed=1, rank=rank, world=world), ahead=3)
    for _ in range(30):
        assert torch.equal(ahead.next().tokens, plain.next().tokens)
        assert ahead.state() == plain.state()
    assert ahead.waited_s > 0
    ahead.close()


def test_it_goes_on_from_a_state_whatever_was_read_ahead(split: Any) -> None:
    ahead = PrefetchingLoader(loader_of(split, row_tokens=16, rows=4, seed=1))
    tokens(ahead, 3)
    state = ahead.state()
    expected = tokens(ahead, 6)
    ahead.load_state(state)
    assert tokens(ahead, 6) == expected
    fresh = PrefetchingLoader(loader_of(split, row_tokens=16, rows=4, seed=1))
    fresh.load_state(state)
    assert tokens(fresh, 6) == expected
    for each in (ahead, fresh):
        each.close()


def test_batches_are_made_before_they_are_asked_for(split: Any) -> None:
    loader = loader_of(split, row_tokens=16, rows=4, seed=1)
    made, third = [], threading.Event()

    class Noting(Loader):
        def at(self, row: int) -> Any:
            made.append(row)
            if len(made) == 3:
                third.set()
            return super().at(row)

    ahead = PrefetchingLoader(Noting(loader.rows, loader.order, batch=4), ahead=2)
    ahead.next()
    assert third.wait(timeout=30)
    assert made == [0, 4, 8]
    ahead.close()


def test_an_error_while_reading_ahead_reaches_the_step(split: Any) -> None:
    loader = loader_of(split, row_tokens=16, rows=4, seed=1)

    class Failing(Loader):
        def at(self, row: int) -> Any:
            if row == 4:
                raise OSError("the disk is gone")
            return super().at(row)

    ahead = PrefetchingLoader(Failing(loader.rows, loader.order, batch=4))
    ahead.next()
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.next()
    ahead.close()
