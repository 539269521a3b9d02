"""What the engine is asked, what it answers, and the state of a request in between; free of tensors."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kajiya.errors import RequestError
from kajiya.serving.blocks import Node

FINISHED_STOP = "stop"
"""The model ended its answer with an end-of-sequence token (or one of the request's stop tokens)."""
FINISHED_LENGTH = "length"
"""The answer reached `max_tokens`."""
FINISHED_CANCELLED = "cancelled"
"""The caller took the request back."""
FINISHED_ERROR = "error"
"""The engine failed while the request ran, or its grammar did; the output's `error` says why."""


MAX_BIASES = 1024
"""Tokens that a request may bias; they are added in every step."""


@dataclass(frozen=True)
class SamplingParams:
    """How the answer to one request is drawn."""

    max_tokens: int = 256
    """Longest answer, tokens; 0 only evaluates the prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int | None = None
    """Only the k most probable tokens stay; `None`: all."""
    top_p: float = 1.0
    """Only the smallest set of most probable tokens whose mass reaches this stays (after `top_k`)."""
    seed: int | None = None
    """The same seed and request draw the same tokens; `None`: fresh entropy."""
    n_logprobs: int = 0
    """Most probable alternatives that are reported with each token."""
    prompt_logprobs: bool = False
    """Report log-probabilities of the prompt's own tokens too."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer beside the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Go on past end-of-sequence tokens until `max_tokens`."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the answer has it."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the answer has."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what is added to their logits, at most `MAX_BIASES` of them."""
    grammar: str | None = None
    """A JSON schema (as JSON text) that the answer must fulfil; `None`: any text."""

    @property
    def is_plain(self) -> bool:
        """Whether logits are drawn from as the model gives them."""
        return not (self.frequency_penalty or self.presence_penalty or self.logit_bias or self.grammar)

    def check(self, vocab_size: int) -> None:
        """Raise `RequestError` naming the first parameter out of range."""
        bounds = (
            ("max_tokens", self.max_tokens >= 0, "at least 0", self.max_tokens),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more", self.temperature),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1", self.top_k),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1", self.top_p),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2", self.frequency_penalty),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2", self.presence_penalty),
            ("n_logprobs", 0 <= self.n_logprobs <= vocab_size, f"from 0 to {vocab_size}", self.n_logprobs),
        )
        for name, holds, words, value in bounds:
            if not holds:
                raise RequestError(f"{name} must be {words}, not {value}", param=name)
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} tokens, of {MAX_BIASES} at most", param="logit_bias"
            )
        wrong = next((token for token, _ in self.logit_bias if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"logit_bias: {wrong} is no token id; they go from 0 to {vocab_size - 1}", param="logit_bias"
            )


@dataclass(frozen=True)
class Request:
    """One prompt to be continued."""

    id: str
    """Name of the caller's choice, unique among the requests in the engine."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    params: SamplingParams = field(default_factory=SamplingParams)
    """How the answer is drawn."""
    adapter: str | None = None
    """Name of a loaded adapter; `None`: the model alone."""


class TokenLogprob(NamedTuple):
    """A token and what the model thought of it: natural logarithms of the unmodified (temperature 1) distribution."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens at this place with their log-probabilities, best first."""


class Output(NamedTuple):
    """What one step brought to one request."""

    id: str
    token: TokenLogprob | None = None
    """The new token; `None` when only the end is reported."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Once, when the prompt has been read, where asked for: one entry a prompt token, `None` for the first."""
    finish_reason: str | None = None
    """stop, length, cancelled or error, with the last output of a request."""
    error: str | None = None
    """What went wrong, with `finish_reason` error."""
    is_refused: bool = False
    """Whether it went wrong through the request itself: a grammar too large for what the answer has become."""


@dataclass(frozen=True)
class Completion:
    """The whole answer to one request."""

    token_ids: list[int]
    """The answer, with the end-of-sequence token that closed it, if one did."""
    logprobs: list[TokenLogprob]
    """One entry for each token of the answer."""
    finish_reason: str
    """stop or length."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """Where `SamplingParams.prompt_logprobs` asked for them."""


@dataclass
class Sequence:
    """State of one request in the engine: its tokens, how many of them the cache holds, and in which blocks."""

    request: Request
    eos_ids: frozenset[int]
    tokens: list[int]
    n_cached: int = 0
    blocks: list[int] = field(default_factory=list)
    node: Node | None = None
    """The place in the tree of prefixes behind the blocks that are remembered."""
    n_remembered: int = 0
    """Blocks that the tree knows."""
    n_shared: int = 0
    """Prompt tokens that were found in the cache when the sequence was last admitted."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    is_reported: bool = False
    """Whether the prompt has been read once: its log-probabilities are not wanted again after a preemption."""
    matcher: Any = None
    """State of the grammar, where there is one."""
    biases: Any = None
    """The `logit_bias` as tensors, once they have been wanted."""

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def n_generated(self) -> int:
        return len(self.tokens) - self.n_prompt

    @property
    def n_pending(self) -> int:
        """Tokens that the model has not read yet; 1 for a sequence that is being decoded."""
        return len(self.tokens) - self.n_cached

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be found."""
        return self.request.params.prompt_logprobs and not self.is_reported

    def finish_reason(self, drawn: list[int]) -> str | None:
        """Why the sequence is complete with these tokens drawn, or `None` while it is not."""
        params = self.request.params
        if drawn:
            last = drawn[-1]
            if last in params.stop_token_ids or (last in self.eos_ids and not params.ignore_eos):
                return FINISHED_STOP
        return FINISHED_LENGTH if self.n_generated + len(drawn) >= params.max_tokens else None


def new_sequence(request: Request, eos_ids: frozenset[int]) -> Sequence:
    """The state of a request that has just come in."""
    return Sequence(request, eos_ids, list(request.prompt))


def derive_seed(seed: int | None, index: int) -> int | None:
    """Seed of the `index`-th answer to one request: the seed itself for the first, independent ones after it."""
    if seed is None or index == 0:
        return seed
    # Any injective mixing will do: `random.Random` hashes what it is given.
    return seed + (index << 64)
