"""Checks of what the model reads: targets and their ends, rows whose documents are kept apart, held-out text not trained on."""

import hashlib
from typing import Any

import torch

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, RolloutBatch
from kajiya.data.documents import open_documents
from kajiya.models.hidden import all_logits
from kajiya.preflight.portion import first_batch
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped

_LOOKED_THROUGH = 12
_HAS_ROWS = (ExampleBatch, RolloutBatch)
_ISOLATION_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest change of a logit in the other documents. Leaking changes them by tenths and more."""


def check_targets(subject: Subject) -> Finding:
    """Targets exist, are the tokens that follow, end of text is learnt, and the model stops at what was learnt."""
    setup, tokenizer = subject.setup, subject.tokenizer
    batches = [setup.loader.next() for _ in range(_LOOKED_THROUGH)]
    rows = [batch.rows if isinstance(batch, _HAS_ROWS) else batch for batch in batches]
    if not isinstance(rows[0], Batch):
        n_targets = sum(batch.n_targets for batch in batches)
        if n_targets == 0:
            return failed("the first batches have no target to learn from", "Look at the data with `kajiya preview`.")
        return passed(f"{n_targets:,} targets in the first {len(batches)} batches", n_targets=n_targets)
    n_tokens = sum(row.tokens.numel() for row in rows)
    n_targets = sum(int((row.targets != NO_TARGET).sum()) for row in rows)
    is_judged_whole = isinstance(batches[0], ExampleBatch) and batches[0].labels is not None
    if n_targets == 0 and not is_judged_whole:
        return failed(
            f"none of the first {n_tokens:,} tokens is a target: there is nothing to learn from",
            "Look at the rows and at data.render: the mask leaves everything out.",
        )
    if not rows[0].is_causal or is_judged_whole:
        return passed(f"{n_targets:,} of {n_tokens:,} tokens are targets", n_targets=n_targets, n_tokens=n_tokens)
    wrong, ends, ends_learnt = (
        sum(parts) for parts in zip(*(_shifts(row, tokenizer.eos_token_id) for row in rows), strict=True)
    )
    if wrong:
        return failed(
            f"{wrong:,} of {n_targets:,} targets are not the token that follows",
            "This is a fault of the loader, not of the config.",
        )
    if ends and not ends_learnt:
        return failed(
            f"end of text ({tokenizer.eos_token!r}) stands at {ends} places and is a target at none: the model would never stop",
            "Look at data.render: the mask leaves the end out.",
        )
    stops = _stops(subject.setup.model)
    if stops is not None and tokenizer.eos_token_id not in stops:
        return failed(
            f"the model's generation config ends at {sorted(stops) or 'nothing'}, the text ends with {tokenizer.eos_token_id}",
            "Set eos_token_id of the base's generation_config.json to the tokenizer's.",
        )
    unsaid = _template_without_end(subject)
    if unsaid is not None:
        return unsaid
    said = f"end of text a target at {ends_learnt} of {ends}" if ends else "no text ends in the first rows"
    share = f"{n_targets / n_tokens:.0%} of {n_tokens:,} tokens are targets, each the token that follows; {said}"
    return passed(share, n_targets=n_targets, n_tokens=n_tokens, ends=ends, ends_learnt=ends_learnt)


def _shifts(row: Batch, eos_id: int) -> tuple[int, int, int]:
    """Targets that are not the next token of their segment; ends of text within a segment; those that are targets."""
    inside = row.segments[:, 1:] == row.segments[:, :-1]
    targets, following = row.targets[:, :-1], row.tokens[:, 1:]
    wanted = targets != NO_TARGET
    # Where a segment ends with its row or goes over into another, what follows is not in view.
    wrong = int((wanted & inside & (targets != following)).sum())
    ends = inside & (following == eos_id)
    return wrong, int(ends.sum()), int((ends & wanted).sum())


def _stops(model: Any) -> set[int] | None:
    """Ids at which the model's own settings end an answer; `None` where it has none."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.generation_config is None:
        return None
    named = model.generation_config.eos_token_id
    return set(named) if isinstance(named, list) else set() if named is None else {int(named)}


def _template_without_end(subject: Subject) -> Finding | None:
    """For conversations: the template must end an answer with a token that the model stops at."""
    tokenizer = subject.tokenizer
    if dict(subject.corpus.facts).get("format") not in ("chat", "instruction") or not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    stops = _stops(subject.setup.model) or {tokenizer.eos_token_id}
    behind = tokenizer.encode(text[text.rindex("answer") + len("answer") :], add_special_tokens=False)
    if stops & set(behind):
        return None
    return failed(
        "the chat template ends an answer with no token that the model stops at",
        "Set tokenizer.chat_template or its eos_token.",
    )


@torch.no_grad()
def check_isolation(subject: Subject) -> Finding:
    """Change the first document of a packed row: what the model says of the others must not move."""
    setup, config = subject.setup, subject.config
    batch = first_batch(setup)
    rows = batch.rows if isinstance(batch, _HAS_ROWS) else batch
    if not isinstance(rows, Batch) or not rows.is_causal:
        return skipped("rows of this kind hold one text each, or are read from both sides")
    if not config.data.isolate and not isinstance(batch, _HAS_ROWS):
        return skipped("data.isolate=false: documents of a row see each other as the config says")
    if ":" in config.model.name:
        return skipped("the model is the user's own module: what it does with segments is its own")
    ends = rows.segments[:, 1:] == rows.segments[:, :-1]
    # Of conversations, each answer may end with the token that ends a text.
    is_text = isinstance(batch, Batch) and dict(subject.corpus.facts).get("format") == "text"
    if is_text and bool((ends & (rows.tokens[:, :-1] == subject.tokenizer.eos_token_id)).any()):
        return failed("a segment goes on behind its end of text", "This is a fault of the loader, not of the config.")
    probe, cut = _two_documents(rows)
    device = setup.strategy.device
    changed = probe.tokens.clone()
    vocabulary = len(subject.tokenizer)
    changed[:, :cut] = (changed[:, :cut] + 1 + vocabulary // 3) % vocabulary
    other = Batch(changed, probe.targets, probe.positions, probe.segments, probe.n_targets)
    setup.model.eval()
    with setup.precision.context(device):
        first, second = (all_logits(setup.model, each.to(device))[0].float() for each in (probe, other))
    moved = float((first[cut:] - second[cut:]).abs().max())
    own = float((first[:cut] - second[:cut]).abs().max())
    limit = _ISOLATION_TOLERANCE[
        next(setup.model.parameters()).dtype if setup.precision.autocast is None else torch.bfloat16
    ]
    if config.model.quantize == "int8":
        # LLM.int8 takes its outlier columns from the whole batch, and so lets a trace of its rounding through.
        limit = 5e-2
    if not moved <= limit:
        return failed(
            f"changing one document of a row moves the logits of the next by {moved:.2g} (its own by {own:.2g})",
            "Set model.attention=sdpa, or data.isolate=false if that is meant.",
            moved=moved,
        )
    return passed(
        f"changing one document moves the next one's logits by {moved:.1g} (its own by {own:.2g})", moved=moved
    )


def _two_documents(rows: Batch) -> tuple[Batch, int]:
    """One row of the real tokens as two documents, and where the second begins."""
    tokens = rows.tokens[:1]
    n_tokens = tokens.shape[1]
    cut = n_tokens // 2
    place = torch.arange(n_tokens)[None]
    segments = (place >= cut).long()
    return Batch(tokens, rows.targets[:1], torch.where(segments == 1, place - cut, place), segments, 1), cut


def check_disjoint(subject: Subject) -> Finding:
    """No held-out document is also a training document."""
    heldout, train = (open_documents(subject.corpus.path, split) for split in ("heldout", "train"))
    sizes = {int(b - a) for a, b in zip(heldout.offsets[:-1], heldout.offsets[1:], strict=True)}
    known = {hashlib.sha256(heldout.read(index)).digest(): index for index in range(len(heldout))}
    shared = []
    for index, (a, b) in enumerate(zip(train.offsets[:-1], train.offsets[1:], strict=True)):
        # Only a document of the same length can be the same.
        if int(b - a) in sizes and (found := known.get(hashlib.sha256(train.read(index)).digest())) is not None:
            shared.append((train.names[index], heldout.names[found]))
    if shared:
        first, second = shared[0]
        return failed(
            f"{len(shared)} of {len(heldout):,} held-out documents are trained on, for example {second} as {first}",
            "Set data.near_duplicate=0.5, which removes them from the training text.",
        )
    return passed(f"none of {len(heldout):,} held-out documents is among {len(train):,} trained on")
