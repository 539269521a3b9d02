"""Check of what an encoder–decoder reads and says: the input and the target of one row, whole, up to an end that it stops at."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kajiya.config.schema import DataConfig
from kajiya.data.batch import NO_TARGET, Seq2SeqBatch
from kajiya.data.documents import open_documents
from kajiya.data.shards import Split
from kajiya.models.outputs import decoder_start
from kajiya.preflight.ends import stops_of, unstoppable
from kajiya.preflight.said import bare, row_named
from kajiya.preflight.subject import Finding, Subject, failed, passed

_MOST_PAIRS = 256


def check_pairs(batches: Sequence[Seq2SeqBatch], subject: Subject) -> Finding:
    """Input and target are those of one row of the corpus, the decoder reads the token before each target, and ends are learnt."""
    n_targets = sum(batch.n_targets for batch in batches)
    if n_targets == 0:
        return failed("the first batches have no target to learn from", "Look at the data with `kajiya preview`.")
    start_id = decoder_start(subject.setup.model)
    wrong = sum(_n_wrong(batch, start_id) for batch in batches)
    if wrong:
        return failed(
            f"at {wrong:,} places the decoder does not read the token before the one that it is to say",
            "This is a fault of the loader, not of the config.",
        )
    found = unstoppable(subject) or _of_rows(batches, subject)
    if isinstance(found, Finding):
        return found
    return passed(f"{n_targets:,} targets in the first {len(batches)} batches; {found}", n_targets=n_targets)


def _n_wrong(batch: Seq2SeqBatch, start_id: int | None) -> int:
    """Targets that are not read in the place behind theirs, though more follow, and rows that do not begin with the start token."""
    goes_on = (batch.targets[:, :-1] != NO_TARGET) & (batch.targets[:, 1:] != NO_TARGET)
    astray = int((goes_on & (batch.tokens[:, 1:] != batch.targets[:, :-1])).sum())
    return astray if start_id is None else astray + int((batch.tokens[:, 0] != start_id).sum())


@dataclass(frozen=True)
class _Pair:
    """What the model reads and says of one row, and the row."""

    name: str
    row: dict[str, Any]
    ids: dict[str, list[int]]
    """Of `input` and `target`."""
    may_be_cut: bool


def _pairs(batches: Sequence[Seq2SeqBatch], subject: Subject) -> Iterator[_Pair]:
    split = subject.shards
    documents = open_documents(subject.corpus.path, "train")
    left = _MOST_PAIRS
    for batch in batches:
        for row, number in enumerate([] if batch.examples is None else batch.examples.tolist()):
            if not left:
                return
            left -= 1
            said = batch.targets[row]
            ids = {
                "input": batch.inputs[row][batch.inputs_mask[row]].tolist(),
                "target": said[said != NO_TARGET].tolist(),
            }
            name = split.names[number]
            yield _Pair(name, row_named(documents, name, number), ids, _may_be_cut(split, number, subject.config.data))


def _may_be_cut(split: Split, number: int, config: DataConfig) -> bool:
    """Whether the pair is too long for a row, under a config that then takes its end."""
    lengths = np.diff(split.offsets[2 * number : 2 * number + 3])
    is_long = lengths.sum() > config.row_tokens or lengths.max() > (config.max_tokens or config.row_tokens)
    return bool(is_long) and config.on_long == "cut"


def _of_rows(batches: Sequence[Seq2SeqBatch], subject: Subject) -> Finding | str:
    """What is wrong with the texts behind the ids, or what was proven of them."""
    stops = stops_of(subject)
    n_pairs = n_whole = n_endless = 0
    for pair in _pairs(batches, subject):
        n_pairs += 1
        for key, verb in (("input", "reads"), ("target", "is to say")):
            text = subject.tokenizer.decode(pair.ids[key], skip_special_tokens=True)
            if not is_text_of(text, pair.row[key], subject.tokenizer, is_whole=not pair.may_be_cut):
                return failed(
                    f"of {pair.name} the model {verb} {text[:60]!r}, and the row's {key} is {pair.row[key][:60]!r}",
                    "Look at the row with `kajiya preview`; what is made of it is not what it says.",
                )
        if not pair.may_be_cut:
            n_whole += 1
            n_endless += pair.ids["target"][-1] not in stops
    if n_endless:
        return failed(
            f"{n_endless} of the first {n_whole} targets have no end that is learnt: the model would not stop",
            "This is a fault of the mask, not of the config.",
        )
    if not n_pairs:
        return "of which rows they are is not known"
    return f"input and target of each of {n_pairs} pairs are its row's own; an end is learnt in each of {n_whole} whole targets"


def is_text_of(said: str, text: str, tokenizer: Any, *, is_whole: bool) -> bool:
    """Whether what was decoded is the row's text, or its beginning where it was cut; white space does not count.

    A tokenizer that loses case, accents or signs is asked what it makes of the text by itself.
    """
    # A cut may go through a character of several bytes.
    found = bare(said) if is_whole else bare(said).rstrip("\ufffd")

    def fits(wanted: str) -> bool:
        return found == wanted if is_whole else wanted.startswith(found)

    if fits(bare(text)):
        return True
    ids = tokenizer.encode(text, add_special_tokens=False)
    return fits(bare(tokenizer.decode(ids, skip_special_tokens=True)))
