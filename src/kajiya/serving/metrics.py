"""Prometheus metrics of the server."""

import time
from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from kajiya.serving.engine import Engine
from kajiya.serving.sequence import Output

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FINE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("kajiya_http_requests", "Requests answered", ["endpoint", "status"], registry=registry)
        self.prompt_tokens = Counter("kajiya_prompt_tokens", "Prompt tokens taken in", registry=registry)
        self.generated_tokens = Counter("kajiya_generated_tokens", "Tokens generated", registry=registry)
        self.choices = Counter("kajiya_choices", "Choices ended", ["finish_reason"], registry=registry)
        self.running = Gauge("kajiya_sequences_running", "Sequences in the batch", registry=registry)
        self.waiting = Gauge("kajiya_sequences_waiting", "Sequences that wait for a place", registry=registry)
        self.cached = Gauge("kajiya_cache_tokens", "Positions of the key-value cache in use", registry=registry)
        self.cache_use = Gauge("kajiya_cache_use_ratio", "Part of the cache's blocks that is held", registry=registry)
        self.shared = Counter("kajiya_shared_prompt_tokens", "Prompt tokens found in the cache", registry=registry)
        self.preemptions = Counter("kajiya_preemptions", "Sequences read again for want of blocks", registry=registry)
        self.guessed = Counter("kajiya_guessed_tokens", "Tokens guessed ahead", registry=registry)
        self.confirmed = Counter("kajiya_confirmed_tokens", "Guesses that became the answer", registry=registry)
        self.first_token = Histogram(
            "kajiya_time_to_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=registry
        )
        self.inter_token = Histogram(
            "kajiya_inter_token_seconds", "Between two tokens of a sequence", buckets=_FINE_SECONDS, registry=registry
        )
        self.duration = Histogram(
            "kajiya_request_seconds",
            "From request to end of the reply",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._begun: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._counted: WeakKeyDictionary[Engine, tuple[int, ...]] = WeakKeyDictionary()
        """What each engine had counted at its last step; models come and go, and what was counted stays."""

    def begin(self, request_id: str) -> None:
        """A sequence is about to be taken in."""
        self._begun[request_id] = time.perf_counter()

    def forget(self, request_id: str) -> None:
        """A sequence was refused."""
        self._begun.pop(request_id, None)

    def step(self, engine: Engine, outputs: list[Output]) -> None:
        """The engine has made a step."""
        self._count(engine)
        now = time.perf_counter()
        self.generated_tokens.inc(sum(output.token is not None for output in outputs))
        for output in outputs:
            if output.token is not None:
                self._token(output.id, now)
            if output.finish_reason:
                self._begun.pop(output.id, None)
                self._last.pop(output.id, None)

    def refresh(self, engines: list[Engine]) -> None:
        """Set what is a state and not an event."""
        schedulers = [engine.scheduler for engine in engines]
        self.running.set(sum(each.n_running for each in schedulers))
        self.waiting.set(sum(each.n_waiting for each in schedulers))
        self.cached.set(sum(each.n_cached_tokens for each in schedulers))
        n_blocks = sum(each.pool.n_blocks for each in schedulers)
        self.cache_use.set(1 - sum(each.pool.n_free for each in schedulers) / n_blocks)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _count(self, engine: Engine) -> None:
        scheduler = engine.scheduler
        counts = (scheduler.n_shared_tokens, scheduler.n_preemptions, engine.n_drafted, engine.n_confirmed)
        counters = (self.shared, self.preemptions, self.guessed, self.confirmed)
        before = self._counted.setdefault(engine, (0,) * len(counts))
        for counter, now, then in zip(counters, counts, before, strict=True):
            counter.inc(now - then)
        self._counted[engine] = counts

    def _token(self, request_id: str, now: float) -> None:
        if request_id in self._last:
            self.inter_token.observe(now - self._last[request_id])
        elif request_id in self._begun:
            self.first_token.observe(now - self._begun[request_id])
        self._last[request_id] = now
