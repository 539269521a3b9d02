"""Log-likelihood of documents under a model: strided windows, every token scored once, logits never held.

Shape letters: B windows, T tokens of the longest window, N tokens flattened, D hidden width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kajiya.data.batch import NO_TARGET, Batch
from kajiya.models.hidden import all_logits, has_split_head, last_hidden


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


@torch.no_grad()
def score_documents(
    model: Any, documents: Sequence[np.ndarray], *, context_tokens: int, stride: int, batch: int, device: torch.device
) -> np.ndarray:
    """Sum of −log p over the targets of each document, nats, float64 [len(documents)]; the model is in evaluation mode for it.

    `documents` are id arrays that begin with the start token, which is read but not scored.
    """
    sums = np.zeros(len(documents), dtype=np.float64)
    with evaluation_mode(model):
        for windows in _batches(cut_windows([len(ids) for ids in documents], context_tokens, stride), batch):
            rows = _rows(documents, windows)
            losses = token_nll(model, rows.to(device)).cpu().double().sum(dim=1).numpy()
            np.add.at(sums, [window.document for window in windows], losses)
    return sums


def token_nll(model: Any, batch: Batch, chunk_tokens: int = 512) -> torch.Tensor:
    """−log p of each target, nats, float32 [B, T]; 0 where there is none. At most `chunk_tokens` rows of logits at once."""
    targets = batch.targets.reshape(-1)
    wanted = (targets != NO_TARGET).nonzero().squeeze(1)
    result = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    split = has_split_head(model)
    states = last_hidden(model, batch) if split else all_logits(model, batch)
    states = states.reshape(-1, states.shape[-1])
    for part in wanted.split(chunk_tokens):
        logits = model.get_output_embeddings()(states[part]) if split else states[part]
        result[part] = torch.nn.functional.cross_entropy(logits.float(), targets[part], reduction="none")
    return result.view_as(batch.targets)


def heldout_loss(model: Any, rows: list[Any], device: torch.device) -> float:
    """Mean −log p over the targets of packed held-out rows, nats per token; the hook's figure during training."""
    # The eager blocks serve here: compiling them again without gradients would cost more than it saves.
    with evaluation_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        total: float = sum(float(token_nll(model, batch.to(device)).cpu().double().sum()) for batch in rows)
    n_targets: int = sum(batch.n_targets for batch in rows)
    return total / n_targets


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Windows of like length together, the longest first: little padding, and too little memory shows at once."""
    by_length = sorted(windows, key=lambda window: window.start - window.end)
    for first in range(0, len(by_length), size):
        yield by_length[first : first + size]


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
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    with evaluation_mode(model):
        for first in range(0, len(by_length), batch):
            part = by_length[first : first + batch]
            windows = [Window(i, 0, len(rows[i][0]), len(rows[i][0]) - 1 - rows[i][1]) for i in part]
            packed = _rows([ids for ids, _ in rows], windows).to(device)
            logprobs, greedy = _target_scores(model, packed)
            for row, i in enumerate(part):
                kept = packed.targets[row] != NO_TARGET
                total = float(logprobs[row][kept].double().sum())
                found[i] = ContinuationScore(total, bool(greedy[row][kept].all()), rows[i][1])
    return [found[i] for i in range(len(rows))]


def _target_scores(model: Any, batch: Batch, chunk_tokens: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each target, float32 [B, T], and whether it is the likeliest token, bool [B, T]."""
    targets = batch.targets.reshape(-1)
    wanted = (targets != NO_TARGET).nonzero().squeeze(1)
    logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    greedy = torch.zeros(targets.shape, dtype=torch.bool, device=targets.device)
    split = has_split_head(model)
    states = last_hidden(model, batch) if split else all_logits(model, batch)
    states = states.reshape(-1, states.shape[-1])
    for part in wanted.split(chunk_tokens):
        logits = (model.get_output_embeddings()(states[part]) if split else states[part]).float()
        logprobs[part] = -torch.nn.functional.cross_entropy(logits, targets[part], reduction="none")
        greedy[part] = logits.argmax(dim=-1) == targets[part]
    return logprobs.view_as(batch.targets), greedy.view_as(batch.targets)
