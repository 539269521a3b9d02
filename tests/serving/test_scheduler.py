"""The scheduler on random traces, against a cache played in plain lists."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kajiya.errors import RequestError
from kajiya.serving.scheduler import Scheduler
from kajiya.serving.sequence import Request, SamplingParams, new_sequence
from kajiya.serving.slots import Slots

Act = tuple[str, int, int]
ACTS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 40), st.integers(0, 12)),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
)


@dataclass
class _World:
    """A scheduler, and for each row the (request, token) pairs that a real cache would hold."""

    scheduler: Scheduler
    rows: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    accepted: dict[str, Request] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)

    def add(self, n_prompt: int, max_tokens: int) -> None:
        request = Request(str(len(self.accepted)), tuple(range(n_prompt)), SamplingParams(max_tokens=max_tokens))
        sequence = new_sequence(request, frozenset())
        if self.scheduler.n_room > 0:
            self.scheduler.add(sequence)
            self.accepted[request.id] = request
        else:
            with pytest.raises(RequestError) as refused:
                self.scheduler.add(sequence)
            assert refused.value.status == 429

    def cancel(self, number: int) -> None:
        request_id = str(number)
        is_here = request_id in self.accepted and request_id not in self.ended
        assert self.scheduler.cancel(request_id) == is_here
        if is_here:
            self.ended[request_id] = "cancelled"

    def step(self) -> None:
        scheduler = self.scheduler
        plan = scheduler.plan()
        for move in plan.moves:
            self.rows[move.target] = self.rows.get(move.source, [])[: move.length]
        assert len(plan.chunks) <= scheduler.max_batch
        assert len({chunk.sequence.request.id for chunk in plan.chunks}) == len(plan.chunks)
        reading = [chunk.count for chunk in plan.chunks if chunk.start < chunk.sequence.n_prompt]
        decoding = [chunk for chunk in plan.chunks if chunk.start >= chunk.sequence.n_prompt]
        # A prompt's last single token rides along with those that decode, outside the budget.
        assert sum(count for count in reading if count > 1) <= scheduler.prefill_tokens
        assert all(chunk.count == 1 for chunk in decoding)
        assert bool(plan.chunks) == bool(scheduler.running)
        in_use = sorted(sequence.row for sequence in scheduler.running.values() if sequence.row is not None)
        assert in_use == list(range(len(scheduler.running)))
        for chunk in plan.chunks:
            sequence = chunk.sequence
            request_id = sequence.request.id
            if request_id not in self.begun:
                self.begun.append(request_id)
                assert chunk.start == 0
            assert sequence.row is not None
            # What the model would find in the cache is exactly this sequence's own past.
            row = self.rows.setdefault(sequence.row, [])
            assert row[: chunk.start] == [(request_id, token) for token in sequence.tokens[: chunk.start]]
            assert len(row[: chunk.start]) == chunk.start
            new = sequence.tokens[chunk.start : chunk.start + chunk.count]
            assert len(new) == chunk.count > 0
            self.rows[sequence.row] = row[: chunk.start] + [(request_id, token) for token in new]
        for chunk in plan.chunks:
            sequence = chunk.sequence
            wants = chunk.is_last and sequence.request.params.max_tokens > 0
            was_last = chunk.is_last
            scheduler.advance(chunk, 1000 + sequence.n_generated if wants else None)
            reason = sequence.finish_reason() if was_last else None
            if reason:
                assert sequence.n_generated == sequence.request.params.max_tokens
                scheduler.finish(sequence)
                self.ended[sequence.request.id] = reason


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 16), st.lists(ACTS, max_size=120))
def test_random_traces_lose_nothing(max_batch: int, max_waiting: int, budget: int, acts: list[Act]) -> None:
    world = _World(Scheduler(max_batch, max_waiting, budget))
    for kind, first, second in acts:
        if kind == "add":
            world.add(first, second)
        elif kind == "cancel":
            world.cancel(first)
        else:
            world.step()
        assert world.scheduler.n_running <= max_batch
    # Every request needs at most as many steps as it has tokens to read and to write.
    bound = sum(len(request.prompt) + request.params.max_tokens + 1 for request in world.accepted.values())
    for _ in range(bound):
        if world.scheduler.is_idle:
            break
        world.step()
    assert world.scheduler.is_idle
    assert world.ended.keys() == world.accepted.keys()
    # First come, first served.
    assert world.begun == sorted(world.begun, key=int)


@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=60))
def test_rows_in_use_have_no_holes(capacity: int, acts: list[int]) -> None:
    slots = Slots(capacity)
    rows: dict[str, int] = {}
    for number, act in enumerate(acts):
        if act % 2 and rows:
            leaving = sorted(rows)[act % len(rows)]
            freed = rows.pop(leaving)
            mover = slots.give_back(freed)
            if mover is not None:
                rows[mover] = freed
        elif slots.n_free:
            rows[f"{number:03}"] = slots.take(f"{number:03}")
        assert sorted(rows.values()) == list(range(len(rows)))
        assert {row: holder for holder, row in rows.items()} == dict(enumerate(slots.holders))
        assert slots.n_free == capacity - len(rows)


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    scheduler = Scheduler(max_batch=2, max_waiting=4, prefill_tokens=8)
    scheduler.add(new_sequence(Request("short", (1, 2), SamplingParams(max_tokens=50)), frozenset()))
    first = scheduler.plan().chunks[0]
    scheduler.advance(first, 3)
    scheduler.add(new_sequence(Request("long", tuple(range(30)), SamplingParams(max_tokens=50)), frozenset()))
    sizes = []
    for _ in range(4):
        plan = scheduler.plan()
        sizes.append([(chunk.sequence.request.id, chunk.count) for chunk in plan.chunks])
        for chunk in plan.chunks:
            scheduler.advance(chunk, 5 if chunk.is_last else None)
    assert sizes == [[("short", 1), ("long", n)] for n in (8, 8, 8, 6)]


def test_eos_ends_unless_told_otherwise() -> None:
    for ignore, reason in ((False, "stop"), (True, None)):
        sequence = new_sequence(Request("a", (5,), SamplingParams(max_tokens=3, ignore_eos=ignore)), frozenset({7}))
        sequence.tokens.append(7)
        assert sequence.finish_reason() == reason
    # A prompt that ends with the end token has not been answered yet.
    assert new_sequence(Request("a", (7,), SamplingParams(max_tokens=3)), frozenset({7})).finish_reason() is None


def test_a_stop_token_of_the_request_ends_it() -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=(9,), ignore_eos=True)
    sequence = new_sequence(Request("a", (5,), params), frozenset({7}))
    sequence.tokens.append(9)
    assert sequence.finish_reason() == "stop"


def test_drop_all_starts_afresh() -> None:
    scheduler = Scheduler(max_batch=1, max_waiting=2)
    for name in ("a", "b"):
        scheduler.add(new_sequence(Request(name, (1, 2), SamplingParams()), frozenset()))
    scheduler.plan()
    assert [sequence.request.id for sequence in scheduler.drop_all()] == ["a", "b"]
    assert scheduler.is_idle
    with pytest.raises(KeyError):
        scheduler.running["a"]
    scheduler.add(new_sequence(Request("a", (1, 2), SamplingParams()), frozenset()))
    assert scheduler.plan().chunks[0].sequence.row == 0
