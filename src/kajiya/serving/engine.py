"""The engine: requests in token ids go in, every step brings a token to each that runs. One thread at a time."""

import dataclasses
import math
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import torch

from kajiya.errors import KajiyaError, RequestError
from kajiya.serving.runner import Runner
from kajiya.serving.sampler import Sampler, with_logprobs
from kajiya.serving.scheduler import Chunk, Scheduler
from kajiya.serving.sequence import (
    FINISHED_CANCELLED,
    FINISHED_ERROR,
    Completion,
    Output,
    Request,
    SamplingParams,
    TokenLogprob,
    derive_seed,
    new_sequence,
)


class EngineError(KajiyaError):
    """The engine could not finish a request through no fault of the request."""


class Engine:
    """Continuous batching over one causal language model.

    Requests join and leave between steps; the answer to one does not depend on the others (up to rounding in low
    precision). Not thread-safe: `serving.worker` gives it a thread of its own.
    """

    def __init__(self, model: Any, eos_ids: frozenset[int], max_batch: int, max_waiting: int) -> None:
        config = model.config.get_text_config()
        self.context_tokens: int = config.max_position_embeddings
        self.vocab_size: int = config.vocab_size
        self.eos_ids = eos_ids
        self.scheduler = Scheduler(max_batch, max_waiting)
        self.runner = Runner(model, max_batch)
        self._sampler = Sampler()
        self._cancelled: list[Output] = []
        self._active: set[str] = set()
        self._n_generate_calls = 0

    # ---------------------------------------------------------------- requests

    def add(self, request: Request) -> None:
        """Queue a request; its outputs come from `step`.

        Raises `RequestError`: a parameter out of range, a token id that is none, a prompt that does not fit the context
        (400), a full queue (429).
        """
        self._check(request)
        if request.id in self._active:
            raise RequestError(f"a request with the id {request.id!r} is running already", param="id")
        self.scheduler.add(new_sequence(request, self.eos_ids))
        self._active.add(request.id)
        self._sampler.begin(request.id, request.params.seed)

    def cancel(self, request_id: str) -> bool:
        """Take a request back and free its row at once; the next step reports it. `False` when it is not here (any more)."""
        if not self.scheduler.cancel(request_id):
            return False
        self._forget(request_id)
        self._cancelled.append(Output(request_id, finish_reason=FINISHED_CANCELLED))
        return True

    @property
    def is_idle(self) -> bool:
        """Whether a step would bring nothing."""
        return self.scheduler.is_idle and not self._cancelled

    @property
    def n_cached_tokens(self) -> int:
        """Positions of the key-value cache that running requests hold."""
        return sum(sequence.n_cached for sequence in self.scheduler.running.values())

    def step(self) -> list[Output]:
        """Compute one step; outputs of the requests that got a token, read their prompt, or ended.

        When this raises, nothing is certain about what was running: call `fail_all`.
        """
        outputs, self._cancelled = self._cancelled, []
        plan = self.scheduler.plan()
        if not plan.chunks:
            return outputs
        with torch.inference_mode():
            logits = self.runner.run(plan)
            prompt_logprobs = self._prompt_logprobs(plan.chunks, logits)
            ready = [chunk for chunk in plan.chunks if chunk.is_last]
            drawn = self._draw(ready, logits)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if chunk.start < sequence.n_prompt and sequence.request.params.prompt_logprobs:
                sequence.prompt_logprobs.extend(prompt_logprobs[sequence.request.id])
            if chunk.is_last:
                outputs.append(self._advance(chunk, drawn.get(sequence.request.id)))
            else:
                self.scheduler.advance(chunk, None)
        return outputs

    def fail_all(self, reason: str) -> list[Output]:
        """End every request with an error and start afresh, after `step` has raised."""
        outputs, self._cancelled = self._cancelled, []
        for sequence in self.scheduler.drop_all():
            self._forget(sequence.request.id)
            outputs.append(Output(sequence.request.id, finish_reason=FINISHED_ERROR, error=reason))
        self.runner.cache.drop()
        return outputs

    # ---------------------------------------------------------------- conveniences

    def generate(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        """Continue all prompts, as many at once as the batch holds; answers in the order of the prompts.

        With a seed, the i-th prompt draws from its own stream derived from it. Raises `RequestError` for a prompt that
        cannot be served, `EngineError` when the engine fails or has other requests; nothing of the call is left behind then.
        """
        if not self.is_idle:
            raise EngineError("generate needs the engine for itself, but other requests are in it")
        self._n_generate_calls += 1
        requests = [
            Request(
                f"generate-{self._n_generate_calls}-{i}",
                tuple(prompt),
                _with_seed(params, derive_seed(params.seed, i)),
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

    def score(self, ids: Rows[int]) -> list[float]:
        """Natural log-probability of each token given those before it; one shorter than `ids`, which are at least 2."""
        self.check_ids(ids, "ids")
        if len(ids) < 2:
            raise RequestError("score needs at least 2 tokens", param="ids")
        with torch.inference_mode():
            logits_TV = self.runner.all_logits(list(ids))[:-1]
            logprobs_TV = logits_TV.float().log_softmax(dim=-1)
            targets_T1 = torch.tensor(ids[1:], device=logprobs_TV.device).unsqueeze(1)
            scores: list[float] = logprobs_TV.gather(1, targets_T1).squeeze(1).tolist()
        return scores

    def embed(self, ids: Rows[int]) -> list[float]:
        """The mean over tokens of the last hidden state, scaled to length 1; as many numbers as the model is wide."""
        self.check_ids(ids, "input")
        with torch.inference_mode():
            mean_D = self.runner.hidden(list(ids)).mean(dim=0)
            vector: list[float] = torch.nn.functional.normalize(mean_D, dim=0).tolist()
        return vector

    # ---------------------------------------------------------------- inside a step

    def _prompt_logprobs(
        self, chunks: tuple[Chunk, ...], logits: dict[str, torch.Tensor]
    ) -> dict[str, list[TokenLogprob]]:
        """Log-probabilities of the prompt tokens that each chunk predicts."""
        found: dict[str, list[TokenLogprob]] = {}
        for chunk in chunks:
            sequence = chunk.sequence
            params = sequence.request.params
            if not params.prompt_logprobs or chunk.start >= sequence.n_prompt:
                continue
            targets = sequence.tokens[chunk.start + 1 : chunk.start + chunk.count + 1]
            rows = logits[sequence.request.id][: len(targets)]
            tokens = torch.tensor(targets, dtype=torch.long, device=rows.device)
            found[sequence.request.id] = with_logprobs(rows, tokens, [params.n_logprobs] * len(targets))
        return found

    def _draw(self, ready: list[Chunk], logits: dict[str, torch.Tensor]) -> dict[str, TokenLogprob]:
        requests = [chunk.sequence.request for chunk in ready if chunk.sequence.request.params.max_tokens]
        if not requests:
            return {}
        ids = [request.id for request in requests]
        rows = torch.stack([logits[request_id][-1] for request_id in ids])
        return dict(zip(ids, self._sampler.draw(ids, rows, [request.params for request in requests]), strict=True))

    def _advance(self, chunk: Chunk, token: TokenLogprob | None) -> Output:
        """Record the drawn token (`None`: none was asked for) and end the sequence if it is complete."""
        sequence = chunk.sequence
        request_id = sequence.request.id
        if token is not None and math.isnan(token.logprob):
            assert sequence.row is not None
            self.runner.cache.clear(sequence.row)
            self.scheduler.finish(sequence)
            self._forget(request_id)
            return Output(request_id, finish_reason=FINISHED_ERROR, error="the model's output is not finite")
        is_first = chunk.start < sequence.n_prompt
        self.scheduler.advance(chunk, token.token if token else None)
        reason = sequence.finish_reason()
        if reason:
            self.scheduler.finish(sequence)
            self._forget(request_id)
        with_prompt = is_first and sequence.request.params.prompt_logprobs
        return Output(request_id, token, tuple(sequence.prompt_logprobs) if with_prompt else None, reason)

    def _forget(self, request_id: str) -> None:
        self._active.discard(request_id)
        self._sampler.end(request_id)

    # ---------------------------------------------------------------- checks

    def _check(self, request: Request) -> None:
        self.check_ids(request.prompt, "prompt")
        request.params.check(self.vocab_size)
        n_prompt, n_answer = len(request.prompt), request.params.max_tokens
        if n_prompt + n_answer > self.context_tokens:
            raise RequestError(
                f"This model's context length is {self.context_tokens} tokens, but the prompt has {n_prompt} and "
                f"max_tokens asks for {n_answer}. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
                param="max_tokens",
            )

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


def _with_seed(params: SamplingParams, seed: int | None) -> SamplingParams:
    return dataclasses.replace(params, seed=seed)


def load_engine(folder: Path, *, precision: str, device: str, max_batch: int, max_waiting: int) -> Engine:
    """An engine over the model in `folder` (anything that plain `from_pretrained` loads; safetensors only).

    `precision` is auto, fp32 or bf16; `device` auto, cpu, cuda, cuda:0 or mps. Raises `KajiyaError` for a folder that
    does not load or a model that the engine cannot drive exactly.
    """
    from kajiya.serving.loading import check_drivable, end_tokens, load_for_serving

    model = load_for_serving(folder, precision, device)
    engine = Engine(model, end_tokens(folder, model), max_batch, max_waiting)
    check_drivable(engine.runner)
    return engine
