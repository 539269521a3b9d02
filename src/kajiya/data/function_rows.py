"""Rows of every kind made of pairs of the standard library: what is preferred, judged, labelled or translated is the real code."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kajiya.config.options import StdlibPairsSource, StdlibSource
from kajiya.data.entries import Document, Found, Row, Unreadable
from kajiya.data.function_pairs import BODY, DOCSTRING, Pair, function_pairs
from kajiya.data.sources import python_files, stdlib_files


@dataclass(frozen=True)
class RowForm:
    """How pairs become rows of one kind."""

    kinds: tuple[str, ...]
    """Pairs that are used."""
    make: Callable[[Pair, str], Mapping[str, Any] | None]
    """The row of a pair in the file of that name; `None` where it makes none."""


def stdlib_pairs(options: StdlibPairsSource) -> Iterator[Found]:
    """A row for each pair in the files of the source `stdlib`, named `file:qualname (kind)`; a file is a group."""
    form = FORMS[options.rows]
    packages = None if options.packages is None else options.packages.split()
    files = [
        (name, path)
        for name, path in stdlib_files(StdlibSource(options.root))
        if packages is None or name.partition("/")[0] in packages
    ]
    for entry in python_files(files):
        if not isinstance(entry, Document):
            yield entry
            continue
        try:
            pairs = list(function_pairs(entry.text, form.kinds, options.max_bytes))
        except (SyntaxError, ValueError, RecursionError) as error:
            yield Unreadable(entry.name, f"is no Python source: {error}", entry.n_bytes)
            continue
        for pair in pairs:
            row = form.make(pair, entry.name)
            if row is not None:
                yield Row(f"{entry.name}:{pair.function.qualname} ({pair.kind})", row, group=entry.name)


def corrupted(body: str, name: str) -> str | None:
    """The body with its lines, or the words of its only line, mixed by a hash of the name; `None` where all are alike."""
    lines = body.split("\n")
    joint, parts = ("\n", lines) if len(set(lines)) > 1 else (" ", body.split(" "))
    if len(set(parts)) < 2:
        return None
    shuffle = random.Random(hashlib.sha256(name.encode(errors="backslashreplace")).digest())
    mixed = list(parts)
    while mixed == parts:
        shuffle.shuffle(mixed)
    return joint.join(mixed)


def _chat(pair: Pair, _file: str) -> Mapping[str, Any]:
    turns = (("user", pair.prompt), ("assistant", pair.completion))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _instruction(pair: Pair, _file: str) -> Mapping[str, Any]:
    return {"prompt": pair.prompt, "completion": pair.completion}


def _preference(pair: Pair, file: str) -> Mapping[str, Any] | None:
    rejected = corrupted(pair.completion, f"{file}:{pair.function.qualname}")
    return None if rejected is None else {"prompt": pair.prompt, "chosen": pair.completion, "rejected": rejected}


def _feedback(pair: Pair, file: str) -> Mapping[str, Any] | None:
    name = f"{file}:{pair.function.qualname}"
    is_good = hashlib.sha256(name.encode(errors="backslashreplace")).digest()[0] % 2 == 0
    completion = pair.completion if is_good else corrupted(pair.completion, name)
    return None if completion is None else {"prompt": pair.prompt, "completion": completion, "label": is_good}


def _labelled(pair: Pair, file: str) -> Mapping[str, Any] | None:
    package, below, _ = file.partition("/")
    function = pair.function
    return {"text": function.head + function.docstring + function.body, "label": package} if below else None


def _seq2seq(pair: Pair, _file: str) -> Mapping[str, Any]:
    function = pair.function
    return {"input": function.head + function.body, "target": function.words.split("\n")[0]}


FORMS: Mapping[str, RowForm] = {
    "chat": RowForm((BODY, DOCSTRING), _chat),
    "instruction": RowForm((BODY, DOCSTRING), _instruction),
    "preference": RowForm((BODY,), _preference),
    "feedback": RowForm((BODY,), _feedback),
    "labelled": RowForm((BODY,), _labelled),
    "seq2seq": RowForm((DOCSTRING,), _seq2seq),
}
"""By `data.source.options.rows` of the source `stdlib_pairs`. Chosen: the real body, rejected: a corrupted one; good and bad
alike; the class of a function is the package it is from; an encoder–decoder reads code and writes its docstring's first line."""
