"""Check of what is held out: it is not trained on, neither whole rows nor their prompts."""

import hashlib
from collections import Counter

from kajiya.data.documents import Documents, open_documents
from kajiya.data.formats import prompt_of
from kajiya.preflight.subject import Finding, Subject, failed, passed

_MOST_ASKED = 0.1
"""Share of the held-out rows whose prompt may be trained on: a few short ones are found twice in any data."""
_FRAME_ROWS = 64
_MOST_ROWS = 200_000


def check_disjoint(subject: Subject) -> Finding:
    """No held-out document is also a training document, and hardly one's prompt is that of a training document."""
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
    said = f"none of {len(heldout):,} held-out documents is among {len(train):,} trained on"
    asked = _asked_in_both(heldout, train, subject.corpus.facts["format"])
    if asked is None:
        return passed(said)
    text = f"{len(asked)} of {len(heldout):,} held-out rows share their prompt with rows that are trained on"
    if len(asked) > _MOST_ASKED * len(heldout):
        by_source = subject.config.data.heldout_source.name is not None
        return failed(
            f"{text}, for example {asked[0]}",
            "Take these prompts out of data.source." if by_source else "Set data.heldout_by=prompt.",
            n_asked=len(asked),
        )
    return passed(f"{said}; {text}", n_asked=len(asked))


def _asked_in_both(heldout: Documents, train: Documents, kind: str) -> list[str] | None:
    """Names of the held-out rows whose prompt is one of the trained rows'; `None` of rows without a prompt apart.

    A prompt that very many rows have is a frame for what is learnt, and asks nothing. Of very many rows those that are looked at
    are spread evenly.
    """
    if prompt_of(kind, heldout.text(0)) is None:
        return None
    step = -(-len(train) // _MOST_ROWS)
    trained = Counter(_prompt_digest(train, index, kind) for index in range(0, len(train), step))
    return [
        heldout.names[index]
        for index in range(len(heldout))
        if 0 < trained[_prompt_digest(heldout, index, kind)] <= _FRAME_ROWS
    ]


def _prompt_digest(documents: Documents, index: int, kind: str) -> bytes:
    return hashlib.sha256(str(prompt_of(kind, documents.text(index))).encode()).digest()
