"""The evaluation stage over an endpoint: bits per byte and perplexity on the held-out documents, of which it is sent the text.

Positions are bytes of a text in UTF-8.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kajiya.config.digest import digest
from kajiya.config.schema import EvalConfig
from kajiya.data.documents import Documents, open_documents
from kajiya.errors import ConfigError, DataError, KajiyaError
from kajiya.evals.echo import Echo, Piece, is_letter_end
from kajiya.evals.endpoint import AT_ONCE, Endpoint, RefusedError
from kajiya.evals.fingerprint import Fingerprint, heldout_digest
from kajiya.evals.replies import Replies, kept_replies
from kajiya.evals.results import write_text_rows
from kajiya.run.code import code_revision
from kajiya.run.files import write_json
from kajiya.run.store import Artifact, Store, produce

Ask = Callable[[str], Echo]
"""Sends a text and gives it back in scored pieces."""

_BYTES_PER_TOKEN = 4.0
"""Of a text of which nothing is known yet."""
_REACH, _REACH_AFTER_REFUSAL = 1.2, 0.9
"""How much text is sent for the tokens that a window has room for: more, which is cut off, unless the endpoint refuses it."""
_UNSURE_PIECES = 4
"""At the end of what was sent, where a word may be cut in two."""
_MOST_REFUSALS = 8
"""Of a text that is cut shorter each time, at last to a tenth."""


def evaluate_endpoint(
    config: EvalConfig, endpoint: Endpoint, corpus: Artifact, store: Store, *, context_tokens: int
) -> tuple[Artifact, bool]:
    """The evaluation of the model behind `endpoint` on the held-out documents of `corpus`, which is always asked anew,
    but for the replies to an earlier attempt that broke off.

    Files: `evaluation.json`, `documents.jsonl` and `rows.parquet`, as `evaluate_model`'s. A document's end is not scored, for it
    is no text; nor are its first bytes where the endpoint puts no start token in front: neither figure nor bytes count them.
    """
    context = config.context_tokens or context_tokens
    stride = max(1, round(context * config.stride_fraction))
    manner = {"context_tokens": context, "stride_fraction": config.stride_fraction, "scored": "echoed text"}
    fingerprint = Fingerprint(
        data=heldout_digest(corpus),
        template=digest(manner),
        code=digest({}),
        engine=endpoint.engine,
        dtype=endpoint.dtype("text"),
        sampling="none",
        model=f"{endpoint.url} {endpoint.model}",
    )

    def make(folder: Path, replies: Replies) -> dict[str, Any]:
        began = time.perf_counter()
        documents = open_documents(corpus.path, "heldout")
        scores = _score_all(endpoint.remembering(replies).echo, documents, context, stride)
        nats, n_bytes, n_targets, n_unscored_bytes = np.array([each.sums for each in scores]).reshape(-1, 4).T
        if not n_bytes.sum():
            raise DataError(f"{endpoint.url} gives no log-probability of a single byte of the held-out text.")
        figures = write_text_rows(folder, documents.names, nats, n_bytes, n_targets) | {
            "n_unscored_bytes": int(n_unscored_bytes.sum()),
            "context_tokens": context,
            "dtype": fingerprint.dtype,
            "seconds": time.perf_counter() - began,
        }
        write_json(folder / "evaluation.json", figures)
        note = "no samples: an endpoint's model is scored alone"
        return figures | {"n_samples": 0, "note": note, "fingerprint": asdict(fingerprint)}

    code, asked = code_revision("kajiya.evals.evaluate_endpoint"), {"eval": config, "fingerprint": asdict(fingerprint)}
    with kept_replies(store, asked) as replies:
        return produce(
            store,
            "evaluation",
            code=code,
            config=asked | {"asked_at": time.time_ns()},
            parents={"corpus": corpus},
            make=partial(make, replies=replies),
        )


@dataclass(frozen=True)
class TextScore:
    """A text under a model."""

    nats: float = 0.0
    """Σ −log p of its tokens."""
    n_bytes: int = 0
    """Those that the tokens stand for."""
    n_tokens: int = 0
    n_unscored_bytes: int = 0
    """Those of tokens of which the endpoint gives no log-probability."""

    @property
    def sums(self) -> tuple[float, int, int, int]:
        """All of it, in order."""
        return self.nats, self.n_bytes, self.n_tokens, self.n_unscored_bytes

    def plus(self, pieces: Sequence[Piece]) -> "TextScore":
        """The score of a text with these pieces behind it."""
        nats, n_bytes, n_tokens, n_unscored_bytes = self.sums
        for piece in pieces:
            if piece.logprob is None:
                n_unscored_bytes += piece.end - piece.start
            else:
                nats -= piece.logprob
                n_bytes += piece.end - piece.start
                n_tokens += piece.n_tokens
        return TextScore(nats, n_bytes, n_tokens, n_unscored_bytes)


def score_text(ask: Ask, text: str, context_tokens: int, stride: int) -> TextScore:
    """Every byte of a text scored once, in windows of at most `context_tokens` + 1 tokens, as `cut_windows` makes them.

    A window begins where a token of the one before begins, and scores its last `stride` tokens, or as many of them as the
    endpoint took. The end of what was sent may have cut a word into other tokens than the text has: the next window counts.
    Raises `KajiyaError` for windows that are too long for the endpoint, or too short to get on.
    """
    raw = text.encode()
    windows = _Windows(ask, raw)
    score = TextScore()
    known: list[Piece] = []  # counted unless the next window, whose context they are, cuts them otherwise
    n_front = at = 0
    while at < len(raw):
        room = context_tokens + 1 - n_front
        n_kept = _n_last(known, room - stride)
        score = score.plus(known[: len(known) - n_kept])
        context = known[len(known) - n_kept :]
        start = context[0].start if context else at
        n_new = max(stride, room - sum(piece.n_tokens for piece in context))
        found = windows.ask(start, at, n_new)
        n_front = found.n_front
        pieces = found.pieces[: _n_first(found.pieces, context_tokens + 1 - n_front)]
        alike = {(piece.start, piece.end) for piece in pieces}
        while context and (context[-1].start, context[-1].end) not in alike:
            context.pop()
        begin = context[-1].end if context else start
        fresh = [piece for piece in pieces if piece.start >= begin]
        if found.pieces[-1].end < len(raw):
            n_cut_off = len(found.pieces) - len(pieces)
            for _ in range(min(_UNSURE_PIECES, stride // 2) - n_cut_off):
                if len(fresh) > 1 and fresh[-2].end > at:
                    fresh.pop()
        known = context + fresh
        if not known or known[-1].end <= at:
            raise ConfigError("eval.context_tokens", f"windows of {context_tokens} tokens do not get on", "Raise it.")
        at = known[-1].end
    score = score.plus(known)
    assert score.n_bytes + score.n_unscored_bytes == len(raw)
    return score


class _Windows:
    """Stretches of a text as an endpoint takes them: how many tokens there are is known only once it was asked."""

    def __init__(self, ask: Ask, raw: bytes) -> None:
        self._ask = ask
        self._raw = raw
        self._bytes_per_token = _BYTES_PER_TOKEN
        self._reach = _REACH

    def ask(self, start: int, at: int, n_new: int) -> Echo:
        """The text from `start` to about `n_new` tokens behind `at`; pieces by their places in the whole text."""
        n_bytes = int(n_new * self._bytes_per_token * self._reach) + 1
        for n_refusals in range(_MOST_REFUSALS):
            end = min(at + n_bytes, len(self._raw))
            while not is_letter_end(self._raw, end):
                end += 1
            try:
                found = self._ask(self._raw[start:end].decode())
                break
            except RefusedError as refusal:
                self._reach = _REACH_AFTER_REFUSAL
                n_bytes = (end - at) * 3 // 4
                # So short a text has fewer tokens than there is room for: it is not refused for its length.
                if n_bytes < n_new // 2 or n_refusals == _MOST_REFUSALS - 1:
                    raise _not_taken(refusal, end - start) from refusal
        n_tokens = sum(piece.n_tokens for piece in found.pieces)
        self._bytes_per_token = (end - start) / max(1, n_tokens)
        pieces = [replace(piece, start=start + piece.start, end=start + piece.end) for piece in found.pieces]
        return Echo(pieces, found.n_front)


def _not_taken(refusal: RefusedError, n_bytes: int) -> KajiyaError:
    return KajiyaError(
        f"{refusal}\nIt was sent {n_bytes:,} bytes of text with echo and logprobs. If its context is too short for them, lower "
        "eval.context_tokens; if it does not echo log-probabilities, serve the model with `kajiya serve` or vLLM."
    )


def _n_first(pieces: Sequence[Piece], most_tokens: int) -> int:
    """How many of the first pieces have at most that many tokens together."""
    return int(np.searchsorted(np.cumsum([piece.n_tokens for piece in pieces]), most_tokens, side="right"))


def _n_last(pieces: Sequence[Piece], most_tokens: int) -> int:
    """The same of the last ones, but at least one, where there are any."""
    return max(min(1, len(pieces)), _n_first(pieces[::-1], most_tokens))


def _score_all(ask: Ask, documents: Documents, context_tokens: int, stride: int) -> list[TextScore]:
    """The score of each document; a few are read and asked at once, and after an error none asks any further."""
    is_over = threading.Event()

    def ask_on(text: str) -> Echo:
        if is_over.is_set():
            raise KajiyaError("the evaluation was ended")
        return ask(text)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return list(
                pool.map(
                    lambda index: score_text(ask_on, documents.text(index), context_tokens, stride),
                    range(len(documents)),
                )
            )
        finally:
            is_over.set()
