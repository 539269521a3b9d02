"""Log-likelihood of documents under a model: strided windows, every token scored once, logits never held.

Shape letters: B windows, T tokens of the longest window.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.evals.head import target_scores
from kajiya.run.deferred import uncompiled

_PORTION_TOKENS = 1 << 20
"""Documents whose windows are sorted together."""


@dataclass(frozen=True)
class Window:
    """Tokens `start` … `end` of a document; its targets from index `first_scored` on (within the window) are scored."""

    document: int
    start: int
    end: int
    first_scored: int


def cut_windows(lengths: Sequence[int], context_tokens: int, stride: int) -> list[Window]:
    """Windows in which each token but the first of every document is a scored target exactly once.

    A window reads at most `context_tokens` tokens and, after a document's first, scores its last `stride` targets.
    """
    windows = []
    for document, length in enumerate(lengths):
        scored = 1
        while scored < length:
            start = 0 if scored == 1 else max(0, min(scored + stride, length) - 1 - context_tokens)
            end = min(start + context_tokens + 1, length)
            windows.append(Window(document, start, end, scored - start - 1))
            scored = end
    return windows


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within the block (no dropout); each layer gets the mode back that it had, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def score_documents(
    model: Any, documents: Iterable[np.ndarray], *, context_tokens: int, stride: int, batch: int, device: torch.device
) -> np.ndarray:
    """Sum of −log p over the targets of each document, nats, float64 [documents]; the model is in evaluation mode for it.

    `documents` are id arrays that begin with the start token, which is read but not scored; they are read as they are needed, a
    portion of about a million tokens at a time, so that memory does not grow with their number. `batch` windows of full
    length, or more short ones, pass through the model at once.
    """
    sums: list[np.ndarray] = []
    with evaluation_mode(model), torch.no_grad():
        for portion in _portions(documents):
            found = np.zeros(len(portion), dtype=np.float64)
            windows = cut_windows([len(ids) for ids in portion], context_tokens, stride)
            for together in _batches(windows, batch * context_tokens):
                rows = _rows(portion, together)
                losses = token_nll(model, rows.to(device)).cpu().double().sum(dim=1).numpy()
                np.add.at(found, [window.document for window in together], losses)
            sums.append(found)
    return np.concatenate(sums) if sums else np.zeros(0, dtype=np.float64)


def _portions(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    portion: list[np.ndarray] = []
    n_tokens = 0
    for ids in documents:
        portion.append(ids)
        n_tokens += len(ids)
        if n_tokens >= _PORTION_TOKENS:
            yield portion
            portion, n_tokens = [], 0
    if portion:
        yield portion


def token_nll(model: Any, batch: Batch) -> torch.Tensor:
    """−log p of each target, nats, float32 [B, T]; 0 where there is none. The logits are never held."""
    return -target_scores(model, batch, is_greedy_asked=False)[0]


def heldout_loss(model: Any, rows: list[Any], device: torch.device) -> float:
    """Mean −log p over the targets of packed held-out rows, nats per token; the hook's figure during training."""
    # The eager blocks serve here: compiling them again without gradients would cost more than it saves.
    with evaluation_mode(model), torch.no_grad(), uncompiled():
        total: float = sum(float(token_nll(model, batch.to(device)).cpu().double().sum()) for batch in rows)
    n_targets: int = sum(batch.n_targets for batch in rows)
    return total / n_targets


def _batches(windows: Sequence[Window], n_tokens: int) -> Iterator[list[Window]]:
    """Windows of like length together, as many as `n_tokens` hold; the longest first, so that too little memory shows at once."""
    by_length = sorted(windows, key=lambda window: window.start - window.end)
    first = 0
    while first < len(by_length):
        width = by_length[first].end - by_length[first].start - 1
        size = max(1, n_tokens // width)
        yield by_length[first : first + size]
        first += size


def _rows(documents: Sequence[np.ndarray], windows: list[Window]) -> Batch:
    width = max(window.end - window.start - 1 for window in windows)
    tokens = np.zeros((len(windows), width), dtype=np.int64)
    targets = np.full((len(windows), width), NO_TARGET, dtype=np.int64)
    for row, window in enumerate(windows):
        ids = documents[window.document][window.start : window.end].astype(np.int64)
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, window.first_scored : len(ids) - 1] = ids[1 + window.first_scored :]
    positions = np.broadcast_to(np.arange(width), tokens.shape).copy()
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        segments=torch.zeros(tokens.shape, dtype=torch.int64),
        n_targets=int((targets != NO_TARGET).sum()),
    )


@dataclass(frozen=True)
class ContinuationScore:
    """A given continuation under the model."""

    logprob: float
    """Σ log p of its tokens, nats."""
    is_greedy: bool
    """Whether every token of it is the likeliest one there."""
    n_tokens: int


@torch.no_grad()
def score_continuations(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, context_tokens: int, batch: int
) -> list[ContinuationScore]:
    """The score of each (context ids, continuation ids); of what does not fit the window, the context's beginning goes.

    Only the states that predict a continuation's token pass through the head. A continuation longer than the window is an
    assertion: its score would be of something else.
    """
    rows = []
    for context, continuation in pairs:
        if not context or len(continuation) > context_tokens:
            raise ValueError(f"a context of {len(context)} and a continuation of {len(continuation)} tokens")
        ids = [*context, *continuation][-(context_tokens + 1) :]
        rows.append((np.array(ids, dtype=np.int64), len(continuation)))
    found: dict[int, ContinuationScore] = {}
    device = next(model.parameters()).device
    documents = [ids for ids, _ in rows]
    windows = [Window(i, 0, len(ids), len(ids) - 1 - scored) for i, (ids, scored) in enumerate(rows)]
    longest = max((len(ids) for ids in documents), default=0)
    with evaluation_mode(model):
        for together in _batches(windows, batch * longest):
            packed = _rows(documents, together).to(device)
            logprobs, greedy = target_scores(model, packed)
            for row, window in enumerate(together):
                kept = packed.targets[row] != NO_TARGET
                total = float(logprobs[row][kept].double().sum())
                found[window.document] = ContinuationScore(
                    total, bool(greedy[row][kept].all()), rows[window.document][1]
                )
    return [found[i] for i in range(len(rows))]
