"""Which texts of a row are to be trained, told by the row alone, and whether its tokens are masked so.

Nothing here asks the code that renders: the tokens are decoded in runs of targets and of none, and every text must lie whole in
a run of its own kind. White space does not count: templates strip it, and some tokenizers move it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from kajiya.config.schema import RenderConfig
from kajiya.data.batch import NO_TARGET, Batch
from kajiya.data.documents import Documents
from kajiya.preflight.places import Place


@dataclass(frozen=True)
class Said:
    """A text of a row."""

    text: str
    is_trained: bool
    is_answer: bool


def row_named(documents: Documents, name: str, first: int) -> dict[str, Any]:
    """The row of that name; those that were dropped from the shards move it back from its number there, never forward."""
    number = next(number for number in range(first, len(documents)) if documents.names[number] == name)
    row: dict[str, Any] = json.loads(documents.text(number))
    return row


def texts_of(row: Mapping[str, Any], kind: str, render: RenderConfig) -> list[list[Said]]:
    """The texts of each sequence of a row of `data.format` chat, instruction, preference or feedback, in their order."""
    if kind == "chat":
        n, messages = row.get("n_prompt", 0), row["messages"]
        return [_of_pair({"prompt": messages[:n]}, messages[n:], render.train_on)]
    train_on = render.train_on if kind == "instruction" else "assistant"
    answers = [row["chosen"], row["rejected"]] if kind == "preference" else [row["completion"]]
    return [_of_pair(row, answer, train_on) for answer in answers]


def _of_pair(row: Mapping[str, Any], answer: Any, train_on: str) -> list[Said]:
    is_all = train_on == "all"
    if isinstance(row["prompt"], str):
        before = [row["system"]] if "system" in row else []
        return [*(Said(text, is_all, False) for text in (*before, row["prompt"])), Said(answer, True, True)]
    # What was said before is read, not trained, unless a message says so itself.
    prompt = [message if "weight" in message or is_all else message | {"weight": 0} for message in row["prompt"]]
    return _of_messages([*prompt, *answer], train_on)


def _of_messages(messages: Sequence[Mapping[str, Any]], train_on: str) -> list[Said]:
    return [
        Said(message["content"], _is_trained(messages, number, train_on), message["role"] == "assistant")
        for number, message in enumerate(messages)
        if message["content"]
    ]


def _is_trained(messages: Sequence[Mapping[str, Any]], number: int, train_on: str) -> bool:
    message, behind = messages[number], [each["role"] for each in messages[number + 1 :]]
    if "weight" in message:
        return bool(message["weight"] > 0)
    if train_on == "all":
        return True
    if message["role"] != "assistant":
        return False
    return {"assistant": True, "last": "assistant" not in behind, "completion": "user" not in behind}[train_on]


def marked_text(rows: Batch, place: Place, tokenizer: Any) -> tuple[str, list[bool]]:
    """The text of a segment without its white space, and of each character whether it is trained."""
    ids = rows.tokens[place.row, place.start : place.stop].tolist()
    # A target stands one place before its token; the first token of all, which cannot be one, counts with the second.
    wanted = (rows.targets[place.row, place.start : place.stop - 1] != NO_TARGET).tolist()
    marks = [*wanted[:1], *wanted] or [False]
    text, trained = "", []
    for is_target, run in groupby(zip(marks, ids, strict=True), key=lambda pair: pair[0]):
        decoded = bare(tokenizer.decode([token for _, token in run], skip_special_tokens=False))
        text += decoded
        trained += [is_target] * len(decoded)
    return text, trained


def compare(
    said: Sequence[Said], text: str, trained: Sequence[bool], *, is_whole: bool = True
) -> tuple[int, Said | None]:
    """How many of the texts lie whole in a run of their kind, in order, and the first that lies in one of the other kind.

    A text that a template has changed is found nowhere, and is neither; of a sequence that was cut, what follows such a one is not
    looked for.
    """
    n_found = begin = 0
    for each in said:
        wanted = bare(each.text)
        at = first = text.find(wanted, begin) if wanted else -1
        while at >= 0 and any(mark != each.is_trained for mark in trained[at : at + len(wanted)]):
            at = text.find(wanted, at + 1)
        if at >= 0:
            n_found, begin = n_found + 1, at + len(wanted)
        elif first >= 0:
            return n_found, each
        elif not is_whole:
            break
    return n_found, None


def bare(text: str) -> str:
    """The text without its white space."""
    return "".join(text.split())
