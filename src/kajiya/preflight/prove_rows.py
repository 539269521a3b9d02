"""Check of what the model reads: targets, the texts that they are of and their ends."""

from collections.abc import Iterator
from typing import Any

from kajiya.data.batch import NO_TARGET, Batch, ExampleBatch, RolloutBatch, Seq2SeqBatch
from kajiya.data.documents import open_documents
from kajiya.preflight.ends import ANSWERED, stops_of, unstoppable
from kajiya.preflight.places import Place, are_last, places
from kajiya.preflight.prove_pairs import check_pairs
from kajiya.preflight.said import Said, compare, marked_text, row_named, texts_of
from kajiya.preflight.subject import Finding, Subject, failed, passed, skipped

LOOKED_THROUGH = 12
"""Batches that are looked at before the first step; of answers that must be drawn, one."""
HAS_ROWS = (ExampleBatch, RolloutBatch)
_MOST_SEQUENCES = 256


def check_targets(subject: Subject) -> Finding:
    """Targets exist, follow their tokens, are of the text that is to be trained; ends are learnt, and the model stops there."""
    setup = subject.setup
    batches = [setup.loader.next()]
    if not isinstance(batches[0], RolloutBatch):
        # Answers must be drawn; of those of one batch all is known.
        batches += [setup.loader.next() for _ in range(LOOKED_THROUGH - 1)]
    if isinstance(batches[0], Seq2SeqBatch):
        return check_pairs(batches, subject)
    rows = [batch.rows if isinstance(batch, HAS_ROWS) else batch for batch in batches]
    n_targets = sum(batch.n_targets for batch in batches)
    n_tokens = sum(row.tokens.numel() for row in rows)
    facts = {"n_targets": n_targets, "n_tokens": n_tokens}
    said = f"{n_targets / n_tokens:.0%} of {n_tokens:,} tokens are targets"
    if subject.corpus.facts["format"] == "labelled":
        return passed(said + "; what is learnt are the labels", **facts)
    if n_targets == 0:
        return failed(
            f"none of the first {n_tokens:,} tokens is a target: there is nothing to learn from",
            "Look at the rows and at data.render: the mask leaves everything out.",
        )
    if not rows[0].is_causal:
        return passed(said, **facts)
    wrong = sum(_n_wrong(row) for row in rows)
    if wrong:
        return failed(
            f"{wrong:,} of {n_targets:,} targets are not the token that follows",
            "This is a fault of the loader, not of the config.",
        )
    found = unstoppable(subject) or _of_texts(batches[0], rows, subject)
    if isinstance(found, Finding):
        return found
    return passed(f"{said}, each the token that follows; {found}", **facts)


def _n_wrong(row: Batch) -> int:
    """Targets that are not the next token of their segment."""
    inside = row.segments[:, 1:] == row.segments[:, :-1]
    targets = row.targets[:, :-1]
    # Where a segment ends with its row or goes over into another, what follows is not in view.
    return int(((targets != NO_TARGET) & inside & (targets != row.tokens[:, 1:])).sum())


def _of_texts(first: Any, rows: list[Batch], subject: Subject) -> Finding | str:
    """What is wrong with the texts behind the targets, or what was proven of them."""
    if isinstance(first, RolloutBatch):
        return "the answers are the model's own"
    return _text(rows, subject) if subject.shards.is_text else _answers(rows, subject)


# ---------------------------------------------------------------- plain text


def _text(rows: list[Batch], subject: Subject) -> Finding | str:
    """Every token of a text is learnt from the one before it, end of text too; a finding of what is not, or words."""
    tokenizer = subject.tokenizer
    n_masked = n_ends = n_open = n_unlearnt = 0
    for row in rows:
        inside = row.segments[:, 1:] == row.segments[:, :-1]
        if row.sources is not None:
            inside = inside & (row.sources[:, 1:] >= 0)
        is_masked = inside & (row.targets[:, :-1] == NO_TARGET)
        is_last = are_last(row, subject.shards)
        is_end = row.tokens == tokenizer.eos_token_id
        n_masked += int(is_masked.sum())
        n_ends += int(is_last.sum())
        n_open += int((is_last & ~is_end).sum())
        n_unlearnt += int((is_masked & (is_last & is_end)[:, 1:]).sum())
    if n_open:
        return failed(
            f"{n_open} of {n_ends} texts that end in the first rows do so without end of text ({tokenizer.eos_token!r})",
            "This is a fault of the shards, not of the config.",
        )
    if n_unlearnt:
        return failed(
            f"end of text ({tokenizer.eos_token!r}) is no target at {n_unlearnt} of {n_ends} places: the model would not stop",
            "This is a fault of the mask, not of the config.",
        )
    if n_masked:
        return failed(
            f"{n_masked:,} tokens of the first texts are no target, and all of a text is to be learnt",
            "This is a fault of the mask, not of the config.",
        )
    return f"end of text a target at each of {n_ends} ends" if n_ends else "no text ends in the first rows"


# ---------------------------------------------------------------- answers


def _answers(rows: list[Batch], subject: Subject) -> Finding | str:
    """Each text of the first rows is trained or not as its row says, and each answer's end is learnt; a finding, or words."""
    kind = subject.corpus.facts["format"]
    if kind not in ANSWERED:
        return "of rows of this kind nothing more is known"
    stops = stops_of(subject)
    n_texts = n_found = n_ends = n_endless = n_lost = n_whole = 0
    for row, place, said in _looked_at(rows, subject):
        text, trained = marked_text(row, place, subject.tokenizer)
        n, wrong = compare(said, text, trained, is_whole=place.is_whole)
        n_texts, n_found = n_texts + len(said), n_found + n
        if place.is_whole:
            n_whole, n_lost = n_whole + len(said), n_lost + len(said) - n
        if wrong is not None:
            should = "is to be trained, and is not" if wrong.is_trained else "is trained, and is not to be"
            return failed(
                f"a text of a row {should} (data.render.train_on, weights): {wrong.text[:60]!r}",
                "Look at the row with `kajiya preview`; the mask does not say what the row does.",
            )
        if place.is_whole and any(each.is_answer and each.is_trained for each in said):
            n_ends += 1
            targets = row.targets[place.row, place.start : place.stop].tolist()
            n_endless += not stops & set(targets)
    if n_endless:
        return failed(
            f"{n_endless} of the first {n_ends} answers have no end among their targets: the model would not stop",
            "Look at the chat template and at data.render.append_eos.",
        )
    if not n_found or 2 * n_lost > n_whole:
        return skipped(
            f"{n_found} of the {n_texts} texts of the first rows stand in them as they are: the chat template changes the others, "
            "so that nothing tells whether they are trained as their rows say; look at some with `kajiya preview`",
            n_texts=n_texts,
            n_found=n_found,
        )
    where = f"{n_found} of {n_texts} texts of the rows found, each trained or not as it should be"
    return f"{where}; an end is learnt in each of {n_ends} whole answers"


def _looked_at(rows: list[Batch], subject: Subject) -> Iterator[tuple[Batch, Place, list[Said]]]:
    """The first sequences in the rows, with the texts that their documents hold."""
    split, kind = subject.shards, subject.corpus.facts["format"]
    documents = open_documents(subject.corpus.path, "train")
    left = _MOST_SEQUENCES
    for row in rows:
        for place in places(row, split):
            if not left:
                return
            left -= 1
            number, part = divmod(place.sequence, split.segments)
            document = row_named(documents, split.names[number], number)
            yield row, place, texts_of(document, kind, subject.config.data.render)[part]
