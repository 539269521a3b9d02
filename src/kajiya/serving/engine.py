"""The engine: requests in token ids go in, every step brings a token to each that runs. One thread at a time."""

import dataclasses
import math
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Rows
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kajiya.errors import KajiyaError, MissingExtraError, RequestError
from kajiya.models.origin import Origin
from kajiya.serving.adapters import LoraAdapter, read_adapter
from kajiya.serving.blocks import BlockPool
from kajiya.serving.drafts import Drafter, within
from kajiya.serving.embedding import embedding
from kajiya.serving.rows import Rows as Logits
from kajiya.serving.sampler import Sampler, with_logprobs
from kajiya.serving.scheduler import Chunk, Scheduler
from kajiya.serving.sequence import (
    FINISHED_CANCELLED,
    FINISHED_ERROR,
    Completion,
    Output,
    Request,
    SamplingParams,
    Sequence,
    TokenLogprob,
    derive_seed,
    new_sequence,
)
from kajiya.serving.shaping import Grammars, shaped

if TYPE_CHECKING:
    from kajiya.serving.runner import Runner


class EngineError(KajiyaError):
    """The engine could not finish a request through no fault of the request."""


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What the engine knows of its model beside the runner that computes it."""

    context_tokens: int
    vocab_size: int
    eos_ids: frozenset[int]
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Weight names with their shapes, against which adapters are checked."""
    note: str = ""
    """Which runner drives the model, and why, in words."""
    origin: Origin | None = None
    """Where the weights are from, with which the bases of adapters are compared."""


class Engine:
    """Continuous batching over one causal language model and its adapters.

    Requests join and leave between steps; the answer to one does not depend on the others (to the bit with the native
    runner, up to rounding with the others). Not thread-safe: `serving.worker` gives it a thread of its own.
    """

    def __init__(
        self, runner: "Runner", facts: ModelFacts, max_batch: int, max_waiting: int, drafter: Drafter | None = None
    ) -> None:
        self.context_tokens = facts.context_tokens
        self.vocab_size = facts.vocab_size
        self.eos_ids = facts.eos_ids
        self.facts = facts
        self.runner = runner
        self.scheduler = Scheduler(BlockPool(runner.n_blocks, runner.block_tokens), max_batch, max_waiting)
        self.adapters: dict[str, Path] = {}
        self.n_drafted = 0
        self.n_confirmed = 0
        self._drafter = drafter
        self._grammars: Grammars | None = None
        self._why_no_grammars = "this engine has no tokenizer to bind a grammar to"
        self._sampler = Sampler()
        self._cancelled: list[Output] = []
        self._active: set[str] = set()
        self._n_generate_calls = 0

    # ---------------------------------------------------------------- requests

    def add(self, request: Request) -> None:
        """Queue a request; its outputs come from `step`.

        Raises `RequestError`: a parameter out of range, a token id that is none, a prompt that does not fit the context or
        the cache, an unknown adapter (400), a full queue (429).
        """
        self._check(request)
        if request.id in self._active:
            raise RequestError(f"a request with the id {request.id!r} is running already", param="id")
        sequence = new_sequence(request, self.eos_ids)
        if request.params.grammar is not None:
            sequence.matcher = self._require_grammars().matcher(request.params.grammar)
        self.scheduler.add(sequence)
        self._active.add(request.id)
        self._sampler.begin(request.id, request.params.seed)

    def prepare(self, params: SamplingParams) -> None:
        """Do what takes long of `add`, which then finds it done; on any thread. Raises `RequestError` as `add`."""
        if params.grammar is not None:
            self._require_grammars().compile(params.grammar)

    def cancel(self, request_id: str) -> bool:
        """Take a request back and free its blocks at once; the next step reports it. `False` when it is not here (any more)."""
        if not self.scheduler.cancel(request_id):
            return False
        self._forget(request_id)
        self._cancelled.append(Output(request_id, finish_reason=FINISHED_CANCELLED))
        return True

    @property
    def is_idle(self) -> bool:
        """Whether a step would bring nothing."""
        return self.scheduler.is_idle and not self._cancelled

    def step(self) -> list[Output]:
        """Compute one step; outputs of the requests that got tokens, read their prompt, or ended.

        When this raises, nothing is certain about what was running: call `fail_all`.
        """
        outputs, self._cancelled = self._cancelled, []
        plan = self.scheduler.plan(self._guess)
        if not plan.chunks:
            return outputs
        rows = self.runner.run(plan)
        ready = [chunk.is_last for chunk in plan.chunks]
        drawn = self._draw([*compress(plan.chunks, ready)], rows)
        for chunk, is_last in zip(plan.chunks, ready, strict=True):
            sequence = chunk.sequence
            if sequence.wants_prompt:
                sequence.prompt_logprobs.extend(_prompt_logprobs(chunk, rows[sequence.request.id]))
            if is_last:
                outputs += self._advance(chunk, drawn.get(sequence.request.id, []))
            else:
                self.scheduler.advance(chunk, ())
        return outputs

    def fail_all(self, reason: str) -> list[Output]:
        """End every request with an error and start afresh, after `step` has raised."""
        outputs, self._cancelled = self._cancelled, []
        for sequence in self.scheduler.drop_all():
            self._forget(sequence.request.id)
            outputs.append(Output(sequence.request.id, finish_reason=FINISHED_ERROR, error=reason))
        self.runner.clear(list(range(self.runner.n_blocks)))
        if self._drafter is not None:
            self._drafter.reset()
        return outputs

    # ---------------------------------------------------------------- weights, adapters, grammars

    def set_weights(self, tensors: Mapping[str, torch.Tensor], version: int) -> None:
        """Go on with new weights, named as in the Transformers model's `state_dict`.

        What is cached is forgotten; requests that run go on with the new weights behind what they have said.
        """
        self.runner.set_weights(tensors)
        self.facts = dataclasses.replace(self.facts, origin=None)
        self.scheduler.renew(version)
        if self._drafter is not None:
            self._drafter.reset()

    def load_adapter(self, name: str, folder: Path, adapter: LoraAdapter | None = None) -> None:
        """Serve the LoRA adapter that PEFT has saved in `folder` to requests that name it; `adapter` is what was read of it.

        Raises `RequestError` for a name that is taken, `ConfigError` for a folder that does not fit.
        """
        if name in self.adapters:
            raise RequestError(f"an adapter with the name {name!r} is loaded already", param="name", status=409)
        self.runner.load_adapter(name, adapter or read_adapter(folder, self.facts.shapes, self.facts.origin))
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises `RequestError` while requests use it, or when there is none of that name."""
        if name not in self.adapters:
            raise RequestError(f"no adapter {name!r} is loaded", param="name", status=404)
        held = [*self.scheduler.running.values(), *self.scheduler.waiting]
        n_using = sum(sequence.request.adapter == name for sequence in held)
        if n_using:
            raise RequestError(f"{n_using} requests use the adapter {name!r}; try again", param="name", status=409)
        self.runner.unload_adapter(name)
        self.scheduler.pool.forget_root((name, self.scheduler.version))
        del self.adapters[name]

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Have grammars for requests that ask for one; an engine in token ids alone knows none."""
        try:
            self._grammars = Grammars(tokenizer, self.vocab_size, self.eos_ids)
        except MissingExtraError as error:
            self._why_no_grammars = str(error)  # a server is of use without

    def _require_grammars(self) -> Grammars:
        if self._grammars is None:
            raise RequestError(self._why_no_grammars, code="unsupported_parameter", param="response_format")
        return self._grammars

    # ---------------------------------------------------------------- conveniences

    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        adapter: str | None = None,
        seeds: Rows[int] | None = None,
    ) -> list[Completion]:
        """Continue all prompts, as many at once as the batch holds; answers in the order of the prompts.

        The i-th prompt draws with the i-th of the `seeds`; without them, with a seed in `params`, from its own stream derived
        from that. Raises `RequestError` for a prompt that cannot be served, `EngineError` when the engine fails or has other
        requests; nothing of the call is left behind then.
        """
        if not self.is_idle:
            raise EngineError("generate needs the engine for itself, but other requests are in it")
        self._n_generate_calls += 1
        requests = [
            Request(
                f"generate-{self._n_generate_calls}-{i}",
                tuple(prompt),
                dataclasses.replace(params, seed=derive_seed(params.seed, i) if seeds is None else seeds[i]),
                adapter,
            )
            for i, prompt in enumerate(prompts)
        ]
        for request in requests:
            self._check(request)
        partial = {request.id: _Partial() for request in requests}
        waiting = list(reversed(requests))
        n_open = len(requests)
        try:
            while n_open:
                while waiting and self.scheduler.n_room > 0:
                    self.add(waiting.pop())
                for output in self.step():
                    n_open -= partial[output.id].take(output)
        except BaseException:
            for request in requests:
                self.cancel(request.id)
            self._cancelled.clear()
            raise
        return [partial[request.id].completion() for request in requests]

    def score(self, ids: Rows[int], adapter: str | None = None) -> list[float]:
        """Natural log-probability of each token given those before it; one shorter than `ids`, which are at least 2."""
        if len(ids) < 2:
            self.check_ids(ids, "ids")
            raise RequestError("score needs at least 2 tokens", param="ids")
        return self.score_all([ids], adapter)[0]

    def score_all(self, texts: Rows[Rows[int]], adapter: str | None = None) -> list[list[float]]:
        """`score` of many texts, batched."""
        params = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=True)
        found = self.generate([list(ids) for ids in texts], params, adapter)
        return [[one.logprob for one in each.prompt_logprobs or () if one is not None] for each in found]

    def embed(self, ids: Rows[int], adapter: str | None = None) -> list[float]:
        """The mean over tokens of the last hidden state, scaled to length 1; as many numbers as the model is wide.

        Raises `RequestError` with status 429 when running requests hold the blocks that it needs for a moment.
        """
        return next(vector for vector in self.embedding(ids, adapter) if vector is not None)

    def embedding(self, ids: Rows[int], adapter: str | None = None) -> Generator[list[float] | None, None, None]:
        """`embed`, read in pieces: `None` behind each but the last, then the vector. Steps may come in between; close it."""
        self.check_ids(ids, "input")
        self._check_adapter(adapter)
        request = Request("embed", tuple(ids), SamplingParams(max_tokens=0), adapter)
        return embedding(self.runner, self.scheduler, new_sequence(request, self.eos_ids))

    # ---------------------------------------------------------------- inside a step

    def _guess(self, sequences: list[Sequence]) -> dict[str, tuple[int, ...]]:
        if self._drafter is None:
            return {}
        wanted = [each for each in sequences if each.request.params.is_plain]
        return within(self._drafter.guess(wanted), wanted) if wanted else {}

    def _draw(self, ready: list[Chunk], rows: dict[str, Logits]) -> dict[str, list[TokenLogprob]]:
        """The next tokens of each sequence that is read to its end; with guesses, as many as they confirm and one more."""
        chunks = [chunk for chunk in ready if chunk.sequence.request.params.max_tokens]
        if not chunks:
            return {}
        given, unmodified = [], []
        for chunk in chunks:
            sequence, n = chunk.sequence, chunk.n_drafts + 1
            mine = rows[sequence.request.id].last(n)
            unmodified.append(mine)
            given.append(mine if sequence.request.params.is_plain else shaped(sequence, mine))
        ids = [chunk.sequence.request.id for chunk in chunks]
        drawn = self._sampler.draw(ids, given, [chunk.sequence.request.params for chunk in chunks], unmodified)
        found = {}
        for chunk, request_id, tokens in zip(chunks, ids, drawn, strict=True):
            n_same = 0
            if chunk.n_drafts:
                guesses = chunk.tokens[chunk.count - chunk.n_drafts :]
                n_same = next((i for i, guess in enumerate(guesses) if guess != tokens[i].token), chunk.n_drafts)
                self.n_drafted += chunk.n_drafts
                self.n_confirmed += n_same
            found[request_id] = tokens[: n_same + 1]
            self._sampler.used(request_id, n_same + 1)
        return found

    def _advance(self, chunk: Chunk, tokens: list[TokenLogprob]) -> list[Output]:
        """Record the drawn tokens (none: none was asked for) and end the sequence if it is complete."""
        sequence = chunk.sequence
        request_id = sequence.request.id
        prompt = tuple(sequence.prompt_logprobs) if sequence.wants_prompt else None
        for one in (*tokens, *prompt) if prompt else tokens:
            if one is not None and math.isnan(one.logprob):
                return self._fail_poisoned(sequence)
        if sequence.matcher is not None:
            for token in tokens:
                sequence.matcher.take(token.token)
            if sequence.matcher.problem is not None:
                problem = f"the answer cannot be held to its grammar: {sequence.matcher.problem}"
                return self._fail(sequence, problem, is_refused=True)
        sequence.is_reported = True
        kept: list[int] = []
        reason = None
        for token in tokens:
            kept.append(token.token)
            reason = sequence.finish_reason(kept)
            if reason:
                break
        if not tokens:
            reason = sequence.finish_reason([])
        self.scheduler.advance(chunk, tuple(kept))
        if reason:
            self.scheduler.finish(sequence)
            self._forget(request_id)
        if not kept:
            return [Output(request_id, None, prompt, reason)]
        last = len(kept) - 1
        return [
            Output(request_id, tokens[i], prompt if i == 0 else None, reason if i == last else None)
            for i in range(last + 1)
        ]

    def _fail(self, sequence: Sequence, problem: str, is_refused: bool = False) -> list[Output]:
        """End this request alone with an error."""
        self.scheduler.finish(sequence)
        self._forget(sequence.request.id)
        return [Output(sequence.request.id, finish_reason=FINISHED_ERROR, error=problem, is_refused=is_refused)]

    def _fail_poisoned(self, sequence: Sequence) -> list[Output]:
        """End a request whose numbers are not finite; nobody finds what it has read, and nobody reads what it has written."""
        blocks, pool = list(sequence.blocks), self.scheduler.pool
        outputs = self._fail(sequence, "the model's output is not finite")
        pool.forget_all()
        # What others hold stays: they go on over it, or fail by themselves.
        self.runner.clear([block for block in blocks if not pool.is_held(block)])
        return outputs

    def _forget(self, request_id: str) -> None:
        self._active.discard(request_id)
        self._sampler.end(request_id)
        if self._drafter is not None:
            self._drafter.end(request_id)

    # ---------------------------------------------------------------- checks

    def _check(self, request: Request) -> None:
        self.check_ids(request.prompt, "prompt")
        request.params.check(self.vocab_size)
        self._check_adapter(request.adapter)
        n_prompt, n_answer = len(request.prompt), request.params.max_tokens
        if n_prompt + n_answer > self.context_tokens:
            raise RequestError(
                f"This model's context length is {self.context_tokens} tokens, but the prompt has {n_prompt} and "
                f"max_tokens asks for {n_answer}. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
                param="max_tokens",
            )

    def _check_adapter(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self.adapters:
            raise RequestError(f"no adapter {adapter!r} is loaded", param="model", status=404)

    def check_ids(self, ids: Rows[int], param: str) -> None:
        """Raise `RequestError` naming `param` unless these are token ids, at least one, that fit the context."""
        if not ids:
            raise RequestError(f"{param} has no tokens", param=param)
        wrong = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{param}: {wrong} is no token id; they go from 0 to {self.vocab_size - 1}", param=param)
        if len(ids) > self.context_tokens:
            raise RequestError(
                f"This model's context length is {self.context_tokens} tokens, but {param} has {len(ids)}.",
                code="context_length_exceeded",
                param=param,
            )


class _Partial:
    """The answer to one request of `generate` while it grows."""

    def __init__(self) -> None:
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.finish_reason = ""

    def take(self, output: Output) -> bool:
        """Add an output; whether it was the last."""
        if output.error is not None:
            raise EngineError(output.error)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.token is not None:
            self.logprobs.append(output.token)
        self.finish_reason = output.finish_reason or ""
        return bool(output.finish_reason)

    def completion(self) -> Completion:
        tokens = [one.token for one in self.logprobs]
        return Completion(tokens, self.logprobs, self.finish_reason, self.prompt_logprobs)


def _prompt_logprobs(chunk: Chunk, rows: Logits) -> list[TokenLogprob]:
    """Log-probabilities of the prompt's tokens that a chunk predicts; rows of guesses are behind them."""
    sequence = chunk.sequence
    targets = sequence.tokens[chunk.start + 1 : min(chunk.start + chunk.count + 1, sequence.n_prompt)]
    n = len(targets)
    first = Logits(rows.logits[:n], rows.best[:n], rows.log_sums[:n])
    return with_logprobs(first, targets, sequence.request.params.n_logprobs)
