"""What a request asks to be done to its logits before a token is drawn: penalties, biases, a grammar.

Shape letters: V vocabulary, B biased tokens.
"""

import threading
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch

from kajiya.errors import MissingExtraError, RequestError
from kajiya.serving.rows import Rows
from kajiya.serving.sequence import Sequence


def shaped(sequence: Sequence, rows: Rows) -> Rows:
    """The one row of a sequence whose request asks for more than the model's own distribution.

    What is drawn from; log-probabilities are taken from the model's own.
    """
    params = sequence.request.params
    logits_V = rows.logits[-1].clone()
    answer = sequence.tokens[sequence.n_prompt :]
    if answer and (params.frequency_penalty or params.presence_penalty):
        counts = Counter(answer)
        ids = torch.tensor(list(counts), device=logits_V.device)
        times = torch.tensor(list(counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[ids] -= params.frequency_penalty * times + params.presence_penalty
    if params.logit_bias:
        if sequence.biases is None:
            tokens, biases = zip(*params.logit_bias, strict=True)
            sequence.biases = torch.tensor(tokens, device=logits_V.device), torch.tensor(biases, device=logits_V.device)
        ids_B, biases_B = sequence.biases
        logits_V[ids_B] += biases_B
    if sequence.matcher is not None:
        logits_V = sequence.matcher.masked(logits_V)
    return Rows(logits_V.unsqueeze(0), [int(logits_V.argmax())], rows.log_sums[-1:])


_COMPACT: Any = {"whitespace_flexible": False}
"""JSON without free white space, in which a small model can lose itself for good."""
_KEPT_GRAMMARS = 16


class Grammars:
    """Compiles JSON schemas for one tokenizer, by llguidance."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        try:
            import llguidance.hf
        except ImportError as error:
            raise MissingExtraError("llguidance", "serve", "response_format with a JSON schema") from error
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else min(eos_ids)
        # Its own vocabulary may be smaller than the model's, which is padded.
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)

    def compile(self, schema: str) -> Any:
        """The grammar of a schema; the latest are kept. On any thread. Raises `RequestError` for one that is not understood."""
        import llguidance

        with self._lock:
            if schema in self._compiled:
                self._compiled.move_to_end(schema)
                return self._compiled[schema]
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
        except ValueError as error:
            raise RequestError(f"the JSON schema is not supported: {error}", param="response_format") from error
        # Silent: its warnings would put pieces of answers on the server's output.
        found = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if found.is_error():
            raise RequestError(f"the JSON schema is not supported: {found.get_error()}", param="response_format")
        with self._lock:
            self._compiled[schema] = found
            if len(self._compiled) > _KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return found

    def matcher(self, schema: str) -> "Matcher":
        """The state of an answer that has not begun. Raises `RequestError` as `compile`."""
        return Matcher(self.compile(schema).deep_copy(), self._vocab_size, self._eos_ids)


class Matcher:
    """Which tokens may follow in one answer."""

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: list[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids

    @property
    def problem(self) -> str | None:
        """Why the answer cannot go on, as when the grammar has grown past llguidance's limits; `None`: it can."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    def masked(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The logits, −∞ where a token would break the grammar; behind its end only end-of-sequence tokens are left.

        What it gives is worth nothing when it has met a `problem`.
        """
        allowed_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        if self._matcher.is_stopped():
            allowed_V[self._eos_ids] = True
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            known = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
            allowed_V[: len(known)] = torch.from_numpy(known)
        return logits_V.masked_fill(~allowed_V.to(logits_V.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on behind a token of the answer; it may meet a `problem`."""
        if not self._matcher.is_stopped() and token not in self._eos_ids:
            self._matcher.consume_token(token)
