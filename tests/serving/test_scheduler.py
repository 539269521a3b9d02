"""The scheduler on random traces, against a cache played in plain lists."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kajiya.errors import RequestError
from kajiya.serving.blocks import BlockPool
from kajiya.serving.scheduler import Chunk, Scheduler
from kajiya.serving.sequence import Request, SamplingParams, Sequence, TokenLogprob, new_sequence

SIZE = 4
Act = tuple[str, int, int]
ACTS = st.one_of(
    st.tuples(
        st.sampled_from(["add", "add", "add to an adapter", "add scored"]), st.integers(1, 40), st.integers(0, 12)
    ),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
    # Blocks of a text that is read for its vector, beside the requests.
    st.tuples(st.sampled_from(["hold", "let go"]), st.integers(0, 6), st.just(0)),
    st.tuples(st.sampled_from(["renew", "forget", "forget an adapter", "fail"]), st.just(0), st.just(0)),
)


def _answer(tokens: list[int]) -> int:
    """The one right continuation of a text: a function of all of it."""
    return (31 * len(tokens) + 7 * sum(tokens[-5:]) + 3 * sum(tokens)) % 5


@dataclass
class _World:
    """A scheduler, and for each block the texts that end in its places, which a real cache would hold as keys and values."""

    scheduler: Scheduler
    drafts: int
    blocks: dict[int, dict[int, tuple[int | str | None, ...]]] = field(default_factory=dict)
    accepted: dict[str, Request] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    held: list[list[int]] = field(default_factory=list)

    def add(self, n_prompt: int, max_tokens: int, adapter: str | None = None, is_scored: bool = False) -> None:
        number = len(self.accepted)
        # Prompts share beginnings, and some are the same.
        prompt = tuple((i * i + i // 6 * (number % 3)) % 3 for i in range(n_prompt))
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=is_scored)
        request = Request(str(number), prompt, params, adapter)
        sequence = new_sequence(request, frozenset())
        longest = max(n_prompt, n_prompt + max_tokens - 1)
        if longest > self.scheduler.pool.n_blocks * SIZE:
            with pytest.raises(RequestError, match="cache holds"):
                self.scheduler.add(sequence)
        elif self.scheduler.n_room <= 0:
            with pytest.raises(RequestError) as refused:
                self.scheduler.add(sequence)
            assert refused.value.status == 429
        else:
            self.scheduler.add(sequence)
            self.accepted[request.id] = request
            self.answers[request.id] = []

    def cancel(self, number: int) -> None:
        request_id = str(number)
        is_here = request_id in self.accepted and request_id not in self.ended
        assert self.scheduler.cancel(request_id) == is_here
        if is_here:
            self.ended[request_id] = "cancelled"

    def hold(self, n_blocks: int) -> None:
        pool = self.scheduler.pool
        if n_blocks <= pool.n_free:
            self.held.append([pool.take() for _ in range(n_blocks)])

    def let_go(self) -> None:
        if self.held:
            self.scheduler.pool.release(self.held.pop())

    def fail(self) -> None:
        dropped = {sequence.request.id for sequence in self.scheduler.drop_all()}
        assert dropped == self.accepted.keys() - self.ended.keys()
        self.ended.update(dict.fromkeys(dropped, "error"))
        self.held.clear()
        self.blocks.clear()

    def act(self, kind: str, first: int, second: int) -> None:
        scheduler = self.scheduler
        acts: dict[str, Callable[[], object]] = {
            "add": lambda: self.add(first, second),
            "add to an adapter": lambda: self.add(first, second, adapter="tuned"),
            "add scored": lambda: self.add(first, second, is_scored=True),
            "step": self.step,
            "cancel": lambda: self.cancel(first),
            "hold": lambda: self.hold(first),
            "let go": self.let_go,
            "renew": lambda: scheduler.renew(scheduler.version + 1),
            "forget": scheduler.pool.forget_all,
            "forget an adapter": lambda: scheduler.pool.forget_root(("tuned", scheduler.version)),
            "fail": self.fail,
        }
        acts[kind]()

    def guess(self, sequences: list[Sequence]) -> dict[str, tuple[int, ...]]:
        found = {}
        for sequence in sequences:
            room = sequence.request.params.max_tokens - sequence.n_generated - 1
            tokens = list(sequence.tokens)
            for i in range(min(self.drafts, room)):
                # Every third guess is wrong.
                tokens.append(_answer(tokens) if (len(tokens) + i) % 3 else 4)
            found[sequence.request.id] = tuple(tokens[len(sequence.tokens) :])
        return found

    def step(self) -> None:
        scheduler = self.scheduler
        plan = scheduler.plan(self.guess)
        for copy in plan.copies:
            self.blocks[copy.target] = dict(self.blocks.get(copy.source, {}))
        assert len({chunk.sequence.request.id for chunk in plan.chunks}) == len(plan.chunks) <= scheduler.max_batch
        reading = [chunk.count for chunk in plan.chunks if chunk.count - chunk.n_drafts > 1]
        assert sum(reading) <= scheduler.step_tokens
        assert bool(plan.chunks) == bool(scheduler.running)
        for chunk in plan.chunks:
            self.read(chunk)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            self.score(chunk)
            drawn: list[int] = []
            if chunk.is_last and sequence.request.params.max_tokens:
                guesses = chunk.tokens[chunk.count - chunk.n_drafts :]
                for i in range(chunk.n_drafts + 1):
                    drawn.append(_answer([*sequence.tokens, *drawn]))
                    if i < chunk.n_drafts and guesses[i] != drawn[-1]:
                        break
            reason = sequence.finish_reason(drawn) if chunk.is_last else None
            scheduler.advance(chunk, tuple(drawn))
            self.answers[sequence.request.id] += drawn
            if reason:
                scheduler.finish(sequence)
                self.ended[sequence.request.id] = reason

    def score(self, chunk: Chunk) -> None:
        """Note which tokens of a prompt are scored: each once, however often its reading is broken off."""
        sequence = chunk.sequence
        if not sequence.wants_prompt:
            return
        assert len(chunk.outputs) == chunk.count
        targets = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.count + 1, sequence.n_prompt)]
        sequence.prompt_logprobs.extend(TokenLogprob(token, 0.0) for token in targets)
        if chunk.is_last:
            found = [one.token for one in sequence.prompt_logprobs if one is not None]
            assert found == list(sequence.request.prompt[1:])
            sequence.is_reported = True

    def read(self, chunk: Chunk) -> None:
        """Write each token's whole past into its place, after checking that the cache holds the past of every one before."""
        sequence = chunk.sequence
        weights = (self.scheduler.version, sequence.request.adapter)
        text = [*sequence.tokens[: chunk.start], *chunk.tokens]
        assert len(sequence.blocks) * SIZE >= len(text)
        for place in range(len(text)):
            block = self.blocks.setdefault(sequence.blocks[place // SIZE], {})
            if place >= chunk.start:
                block[place % SIZE] = (*weights, *text[: place + 1])
            assert block[place % SIZE] == (*weights, *text[: place + 1])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 16),
    st.integers(1, 20),
    st.integers(0, 3),
    st.lists(ACTS, max_size=120),
)
def test_random_traces_lose_nothing(
    max_batch: int, max_waiting: int, budget: int, n_blocks: int, drafts: int, acts: list[Act]
) -> None:
    world = _World(Scheduler(BlockPool(n_blocks, SIZE), max_batch, max_waiting, budget), drafts)
    for act in acts:
        world.act(*act)
        assert world.scheduler.n_running <= max_batch
    while world.held:
        world.let_go()
    # Even one after another, each preempted at every block, they come to an end.
    bound = sum(
        (len(one.prompt) + one.params.max_tokens + 2) * (one.params.max_tokens + 2) for one in world.accepted.values()
    )
    for _ in range(bound):
        if world.scheduler.is_idle:
            break
        world.step()
    assert world.scheduler.is_idle
    assert world.ended.keys() == world.accepted.keys()
    assert world.scheduler.pool.n_free == n_blocks
    for request_id, request in world.accepted.items():
        expected = list(request.prompt)
        for _ in world.answers[request_id]:
            expected.append(_answer(expected))
        assert world.answers[request_id] == expected[len(request.prompt) :]
        if world.ended[request_id] == "length":
            assert len(world.answers[request_id]) == request.params.max_tokens


def _scheduler(max_batch: int = 2, max_waiting: int = 4, budget: int = 8, n_blocks: int = 64) -> Scheduler:
    return Scheduler(BlockPool(n_blocks, SIZE), max_batch, max_waiting, budget)


def _sequence(name: str, prompt: tuple[int, ...], max_tokens: int = 50) -> Sequence:
    return new_sequence(Request(name, prompt, SamplingParams(max_tokens=max_tokens)), frozenset())


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    scheduler = _scheduler()
    scheduler.add(_sequence("short", (1, 2)))
    scheduler.advance(scheduler.plan().chunks[0], (3,))
    scheduler.add(_sequence("long", tuple(range(30))))
    sizes = []
    for _ in range(4):
        plan = scheduler.plan()
        sizes.append([(chunk.sequence.request.id, chunk.count) for chunk in plan.chunks])
        for chunk in plan.chunks:
            scheduler.advance(chunk, (5,) if chunk.is_last else ())
    assert sizes == [[("short", 1), ("long", n)] for n in (8, 8, 8, 6)]


def test_a_shared_prefix_is_read_once() -> None:
    scheduler = _scheduler(max_batch=3, budget=64)
    prefix = tuple(range(17))
    scheduler.add(_sequence("first", (*prefix, 50)))
    scheduler.advance(scheduler.plan().chunks[0], (1,))
    scheduler.add(_sequence("second", (*prefix, 60, 61)))
    plan = scheduler.plan()
    second = next(chunk for chunk in plan.chunks if chunk.sequence.request.id == "second")
    # Four full blocks are shared; the fifth was not full, so nothing is known of it yet.
    assert (second.start, second.tokens) == (16, (16, 60, 61))
    assert second.sequence.blocks[:4] == scheduler.running["first"].blocks[:4]
    assert scheduler.n_shared_tokens == 16


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(2, 9),
    n_prefix=st.integers(1, 70),
    n_tail=st.integers(0, 12),
    budget=st.integers(1, 90),
    max_batch=st.integers(1, 9),
)
@example(n=8, n_prefix=32, n_tail=1, budget=16, max_batch=8)
@example(n=8, n_prefix=64, n_tail=0, budget=512, max_batch=8)
@example(n=3, n_prefix=4, n_tail=0, budget=512, max_batch=8)
def test_a_prefix_that_many_bring_at_once_is_read_once(
    n: int, n_prefix: int, n_tail: int, budget: int, max_batch: int
) -> None:
    scheduler = _scheduler(max_batch, max_waiting=n, budget=budget, n_blocks=512)
    for i in range(n):
        tail = range(100 * (i + 1), 100 * (i + 1) + n_tail)
        scheduler.add(_sequence(str(i), (*range(n_prefix), *tail), max_tokens=1))
    n_read = 0
    while not scheduler.is_idle:
        for chunk in scheduler.plan().chunks:
            n_read += chunk.count
            is_last = chunk.is_last
            scheduler.advance(chunk, (1,) if is_last else ())
            if is_last:
                scheduler.finish(chunk.sequence)
    once = n_prefix + n * n_tail
    assert once <= n_read <= once + (n - 1) * (SIZE - 1)
    assert scheduler.n_shared_tokens == n * (n_prefix + n_tail) - n_read


def test_who_waits_for_a_prefix_does_not_wait_for_its_answer() -> None:
    scheduler = _scheduler(max_batch=4, budget=64)
    for name, tail in (("first", 50), ("second", 60), ("third", 70)):
        scheduler.add(_sequence(name, (*range(16), tail)))
    starts = []
    for _ in range(3):
        plan = scheduler.plan()
        starts.append({chunk.sequence.request.id: (chunk.start, chunk.count) for chunk in plan.chunks})
        for chunk in plan.chunks:
            scheduler.advance(chunk, (1,))
    assert starts[0] == {"first": (0, 17)}
    assert starts[1] == {"first": (17, 1), "second": (16, 1), "third": (16, 1)}
    # Who has the prefix to itself no longer keeps anybody: a request that is taken back lets the next one read.
    scheduler.add(_sequence("one", tuple(range(30, 50))))
    scheduler.add(_sequence("two", tuple(range(30, 50))))
    assert "two" not in {chunk.sequence.request.id for chunk in scheduler.plan().chunks}
    scheduler.cancel("one")
    assert [chunk.start for chunk in scheduler.plan().chunks if chunk.sequence.request.id == "two"] == [0]


def test_a_block_that_is_shared_in_part_is_copied_before_it_is_written() -> None:
    scheduler = _scheduler(max_batch=3, budget=64)
    scheduler.add(_sequence("first", tuple(range(8))))
    scheduler.advance(scheduler.plan().chunks[0], (1,))
    scheduler.add(_sequence("same", tuple(range(8))))
    plan = scheduler.plan()
    same = next(chunk for chunk in plan.chunks if chunk.sequence.request.id == "same")
    # All but the last token is known; that one's logits are needed, and its place is in a block that the first one holds.
    assert (same.start, same.tokens) == (7, (7,))
    assert [(copy.source, copy.target) for copy in plan.copies] == [
        (scheduler.running["first"].blocks[1], same.sequence.blocks[1])
    ]


def test_the_last_to_come_gives_way_and_loses_nothing() -> None:
    scheduler = _scheduler(n_blocks=4, budget=64)
    scheduler.add(_sequence("old", tuple(range(7)), 9))
    scheduler.add(_sequence("new", tuple(range(100, 103)), 9))
    for _ in range(2):
        for chunk in scheduler.plan().chunks:
            scheduler.advance(chunk, (9,))
    assert [*scheduler.running] == ["old", "new"]
    for _ in range(7):
        for chunk in scheduler.plan().chunks:
            scheduler.advance(chunk, (9,))
    assert scheduler.n_preemptions >= 1
    assert [*scheduler.running] == ["old"]
    assert scheduler.waiting[0].tokens[:3] == [100, 101, 102]
    assert scheduler.waiting[0].n_generated >= 2


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(RequestError, match="holds 16"):
        _scheduler(n_blocks=4).add(_sequence("a", tuple(range(10)), 8))
    _scheduler(n_blocks=4).add(_sequence("a", tuple(range(10)), 7))


def test_eos_ends_unless_told_otherwise() -> None:
    for ignore, reason in ((False, "stop"), (True, None)):
        sequence = new_sequence(Request("a", (5,), SamplingParams(max_tokens=3, ignore_eos=ignore)), frozenset({7}))
        assert sequence.finish_reason([7]) == reason
    # A prompt that ends with the end token has not been answered yet.
    assert new_sequence(Request("a", (7,), SamplingParams(max_tokens=3)), frozenset({7})).finish_reason([]) is None


def test_a_stop_token_of_the_request_ends_it() -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=(9,), ignore_eos=True)
    assert new_sequence(Request("a", (5,), params), frozenset({7})).finish_reason([9]) == "stop"


def test_drop_all_starts_afresh() -> None:
    scheduler = _scheduler(max_batch=1)
    for name in ("a", "b"):
        scheduler.add(_sequence(name, (1, 2)))
    scheduler.plan()
    assert [sequence.request.id for sequence in scheduler.drop_all()] == ["a", "b"]
    assert scheduler.is_idle
    assert scheduler.pool.n_free == 64
    scheduler.add(_sequence("a", (1, 2)))
    assert scheduler.plan().chunks[0].start == 0
