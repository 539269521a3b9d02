"""Check of packed rows: their segments are the documents that were packed, and what the model says of one moves no other."""

from dataclasses import replace
from typing import Any

import torch

from kajiya.data.batch import Batch, RolloutBatch
from kajiya.models.hidden import all_logits
from kajiya.models.isolation import can_isolate
from kajiya.models.outputs import masked_logits
from kajiya.preflight.places import n_astray
from kajiya.preflight.portion import windows
from kajiya.preflight.prove_rows import HAS_ROWS, LOOKED_THROUGH
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped
from kajiya.training.fit import Setup

_WINDOW = 96
"""Most tokens about the end of a document."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest change of a logit in the other documents. Leaking changes them by tenths and more."""


def check_isolation(subject: Subject) -> Finding:
    """Segments of a row are its documents; change those before the end of one: what the model says of the rest must not move."""
    setup, config = subject.setup, subject.config
    rows = _first_rows(setup)
    if not rows or not (rows[0].is_causal or subject.shards.is_text):
        return skipped("rows of this kind hold one text each")
    if not config.data.isolate and subject.shards.is_text:
        return skipped("data.isolate=false: documents of a row see each other as the config says")
    astray = sum(n_astray(each, subject.shards) for each in rows)
    if astray:
        return failed(
            f"at {astray} places of the first rows the segments are not the documents that were packed",
            "This is a fault of the packing, not of the config.",
        )
    real = _about_an_end(rows)
    if not can_isolate(setup.model) and (real is None or ":" in config.model.name):
        why = "its forward takes no `segments`" if ":" in config.model.name else "its rows hold one document each"
        return skipped(f"the model cannot keep documents of a row apart: {why}")
    probe, cut = real or _in_two(rows[0])
    moved, own = _moved(setup, probe, cut, len(subject.tokenizer))
    limit = _TOLERANCE[next(setup.model.parameters()).dtype if setup.precision.autocast is None else torch.bfloat16]
    if config.model.quantize == "int8":
        # LLM.int8 takes its outlier columns from the whole batch, and so lets a trace of its rounding through.
        limit = 5e-2
    what = "the documents before the end of one" if real else "the first half of a row, as a document of its own,"
    if not moved <= limit:
        return failed(
            f"changing {what} moves the logits behind it by {moved:.2g} (its own by {own:.2g})",
            "Set model.attention=sdpa, or data.isolate=false if that is meant.",
            moved=moved,
        )
    return passed(f"changing {what} moves the logits behind it by {moved:.1g} (its own by {own:.2g})", moved=moved)


def _first_rows(setup: Setup) -> list[Batch]:
    """Packed rows of the first batches; of answers that must be drawn, those of one."""
    found: list[Batch] = []
    for _ in range(LOOKED_THROUGH):
        batch: Any = setup.loader.next()
        rows = batch.rows if isinstance(batch, HAS_ROWS) else batch
        if isinstance(rows, Batch):
            found.append(rows)
        if not isinstance(rows, Batch) or isinstance(batch, RolloutBatch):
            break
    return found


def _about_an_end(batches: list[Batch]) -> tuple[Batch, int] | None:
    """A window of a real row about the end of a document, and where the next begins in it; `None` where no row holds two."""
    for rows in batches:
        is_real = torch.ones_like(rows.tokens, dtype=torch.bool) if rows.sources is None else rows.sources >= 0
        is_end = (rows.segments[:, 1:] != rows.segments[:, :-1]) & is_real[:, 1:]
        if not is_end.any():
            continue
        width = rows.tokens.shape[1]
        # The end that has the most tokens on either side.
        row, at = min(is_end.nonzero().tolist(), key=lambda place: abs(2 * (place[1] + 1) - width))
        start = max(0, min(at + 1 - _WINDOW // 2, width - _WINDOW))
        return windows(rows, [row], [start], min(width, _WINDOW)), at + 1 - start
    return None


def _in_two(rows: Batch) -> tuple[Batch, int]:
    """The beginning of a real row as two documents, and where the second begins."""
    part = windows(rows, [0], [0], min(rows.tokens.shape[1], _WINDOW))
    cut = part.tokens.shape[1] // 2
    place = torch.arange(part.tokens.shape[1])[None]
    segments = (place >= cut).long()
    return replace(part, positions=torch.where(segments == 1, place - cut, place), segments=segments), cut


@torch.no_grad()
def _moved(setup: Setup, probe: Batch, cut: int, vocabulary: int) -> tuple[float, float]:
    """How far the logits from `cut` on move, and those before it, when the tokens before it are others."""
    changed = probe.tokens.clone()
    changed[:, :cut] = (changed[:, :cut] + 1 + vocabulary // 3) % vocabulary
    device = setup.strategy.device
    setup.model.eval()
    logits = all_logits if probe.is_causal else masked_logits
    with setup.precision.context(device):
        pair = (probe, replace(probe, tokens=changed))
        first, second = (logits(setup.model, each.to(device))[0].float() for each in pair)
    return float((first[cut:] - second[cut:]).abs().max()), float((first[:cut] - second[:cut]).abs().max())
